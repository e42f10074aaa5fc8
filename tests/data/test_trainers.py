"""Layouts in the documentation of other trainers: each is read, or refused with a way out (docs/other-trainers.md)."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import ROOT

from bilevel.data.records import read_rows
from bilevel.data.sources import Reading, file_source
from bilevel.errors import DataError

Write = Callable[..., Path]
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
USER = [("user", "q"), ("assistant", "a")]
HEADED = [("prompt", "### Instruction:\nq\n\n### Response:\n"), ("response", "a")]
AS_IT_IS = [("prompt", "q"), ("response", "a")]
SYSTEM = [("system", "s"), *USER]
EARLIER = [("user", "q0"), ("assistant", "a0"), *USER]
PREFERENCE = "of a preference pair, the response is chosen"

# Trainer and layout -> a record, the setting `fields`, and its turns; or words of the message that refuses it.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, str], list[tuple[str, str]] | str]] = {
    "TRL text": ({"text": "t"}, {}, [("text", "t")]),
    "TRL messages": ({"messages": [Q, A]}, {}, USER),
    "TRL prompt, completion": ({"prompt": "q", "completion": "a"}, {}, AS_IT_IS),
    "TRL prompt, completion as messages": ({"prompt": [Q], "completion": [A]}, {}, USER),
    "TRL prompt alone": ({"prompt": "q"}, {}, "format not recognised"),
    "TRL preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}, PREFERENCE),
    "TRL stepwise": ({"prompt": "q", "completions": ["a"], "labels": [True]}, {}, "a record with prompt and"),
    "LLaMA-Factory alpaca": ({"instruction": "q", "output": "a", "history": []}, {}, HEADED),
    "LLaMA-Factory KTO": ({"instruction": "q", "output": "a", "kto_tag": True}, {}, HEADED),
    "LLaMA-Factory ranking": ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, {}, PREFERENCE),
    "LLaMA-Factory sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, {}, SYSTEM,
    ),
    "LLaMA-Factory images": ({"messages": [Q, A], "images": ["a.png"]}, {}, "images"),
    "axolotl alpaca": ({"instruction": "q", "input": "", "output": "a"}, {}, HEADED),
    "axolotl gpteacher": ({"instruction": "q", "input": "", "response": "a"}, {}, HEADED),
    "axolotl jeopardy": ({"question": "q", "category": "c", "answer": "a"}, {}, USER),
    "axolotl explainchoice": ({"question": "q", "choices": ["a"], "solution": "a"},
                              {"response": "solution", "prompt": "question"}, USER),
    "axolotl oasst": ({"INSTRUCTION": "q", "RESPONSE": "a"},
                      {"instruction": "INSTRUCTION", "output": "RESPONSE"}, HEADED),
    "axolotl summarizetldr": ({"article": "q", "summary": "a"}, {"prompt": "article", "response": "summary"}, USER),
    "axolotl completion": ({"text": "t"}, {}, [("text", "t")]),
    "axolotl chat_template": ({"messages": [Q, {**A, "training": True}]}, {}, USER),
    "axolotl input_output": ({"segments": [{"label": True, "text": "a"}]}, {}, "write the last learned text"),
    "axolotl tokenized": ({"input_ids": [1], "labels": [1]}, {}, "tokens cannot be read"),
    "torchtune instruct": ({"input": "q", "output": "a"}, {}, USER),
    "torchtune column_map": ({"incorrect": "q", "correct": "a"}, {"prompt": "incorrect", "response": "correct"}, USER),
    "torchtune samsum": ({"dialogue": "q", "summary": "a"}, {"prompt": "dialogue", "response": "summary"}, USER),
    "torchtune chat": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}, USER),
    "OpenRLHF input_key, output_key": ({"question": "q", "response": "a"}, {}, USER),
    "OpenRLHF messages": ({"context_messages": [Q], "winner": [A]},
                          {"prompt": "context_messages", "completion": "winner"}, USER),
    "OpenRLHF preference": ({"chosen": [Q, A], "rejected": [Q, A]}, {}, PREFERENCE),
    "unsloth alpaca": ({"instruction": "q", "input": "", "output": "a"}, {}, HEADED),
    "unsloth chat": ({"conversations": [Q, A]}, {}, USER),
    "ms-swift messages": ({"messages": [Q, A]}, {}, USER),
    "ms-swift query, response": ({"system": "s", "query": "q", "response": "a"}, {}, SYSTEM),
    "ms-swift history": ({"query": "q", "response": "a", "history": [["q0", "a0"]]}, {}, EARLIER),
    "ms-swift conversation": ({"conversation": [{"human": "q", "assistant": "a"}]}, {}, "write the texts as messages"),
    "LMFlow text_only": ({"text": "t"}, {}, [("text", "t")]),
    "LMFlow text2text": ({"input": "q", "output": "a"}, {}, USER),
    "LMFlow conversation": ({"conversation_id": 1, "system": "s", "messages": [Q, A]}, {}, SYSTEM),
    "LMFlow paired_conversation": ({"chosen": {"messages": [Q, A]}, "rejected": {"messages": [Q, A]}}, {}, PREFERENCE),
    "open-instruct messages": ({"dataset": "d", "id": "1", "messages": [Q, A]}, {}, USER),
    "open-instruct preference": ({"chosen": [Q, A], "rejected": [Q, A]}, {}, PREFERENCE),
    "NeMo input, output": ({"input": "q", "output": "a"}, {}, USER),
    "NeMo chat": (
        {"mask": "User", "system": "s",
         "conversations": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}]}, {}, SYSTEM,
    ),
    "NeMo squad": ({"context": "c", "question": "q", "answers": {"text": ["a"]}}, {}, "--fields"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_read_or_refused_with_a_way_out(write: Write, name: str) -> None:
    record, fields, expected = LAYOUTS[name]
    source = file_source(write("a.jsonl", json.dumps(record)), Reading(fields=tuple(fields.items())))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=re.escape(expected)):
            read_rows(source)
    else:
        row = read_rows(source)[0]
        assert list(zip(row["roles"], row["contents"], strict=True)) == expected


def test_the_page_names_each() -> None:
    page = (ROOT / "docs" / "other-trainers.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    rows = rows[next(i for i, row in enumerate(rows) if row[0] == "trainer") + 1 :]
    assert [f"{row[0]} {row[1]}".replace("`", "") for row in rows] == list(LAYOUTS)
    for trainer, layout, _, outcome in rows:
        refused = isinstance(LAYOUTS[f"{trainer} {layout}".replace("`", "")][2], str)
        assert outcome.startswith("refused") == refused, layout


WAYS_OUT = {  # refused layout -> the setting `fields` that reads it all the same, and the turns
    "TRL preference": ({"prompt": "prompt", "response": "chosen"}, USER),
    "LLaMA-Factory ranking": ({"instruction": "instruction", "output": "chosen"}, HEADED),
    "OpenRLHF preference": ({"messages": "chosen"}, USER),
    "open-instruct preference": ({"messages": "chosen"}, USER),
}


@pytest.mark.parametrize("name", WAYS_OUT)
def test_the_way_out_works(write: Write, name: str) -> None:
    fields, expected = WAYS_OUT[name]
    source = file_source(write("a.jsonl", json.dumps(LAYOUTS[name][0])), Reading(fields=tuple(fields.items())))
    row = read_rows(source)[0]
    assert list(zip(row["roles"], row["contents"], strict=True)) == expected
