"""bilevel/data/layouts: each row of the table in docs/your-data.md, detection, `fields` and `prompt_suffix`."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from run_helpers import ROOT
from tokenizer_kinds import tokenizer_of

from bilevel.data.records import read_as, read_rows, row_notes
from bilevel.data.samples import load_samples
from bilevel.data.sources import Reading, Source, file_source
from bilevel.data.tokenise import IGNORE, Tokeniser
from bilevel.errors import DataError

Write = Callable[..., Path]
ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
ANSWERED = [{"role": "assistant", "content": "a"}]
USER = [("user", "q"), ("assistant", "a")]
HEADED = [("prompt", "### Instruction:\nq\n\n### Response:\n"), ("response", "a")]

# Each row of the table "Layouts" in docs/your-data.md: a record, and its turns.
LAYOUTS = {
    "instruction, input, output": (
        {"instruction": "q", "input": "i", "output": "a"},
        [("prompt", "### Instruction:\nq\n\n### Input:\ni\n\n### Response:\n"), ("response", "a")],
    ),
    "instruction, context, response": (
        {"instruction": "q", "context": "i", "response": "a", "category": "closed_qa"},
        [("prompt", "### Instruction:\nq\n\n### Input:\ni\n\n### Response:\n"), ("response", "a")],
    ),
    "messages": ({"messages": ASKED + ANSWERED}, [("system", "s"), *USER]),
    "conversations": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        USER,
    ),
    "dataset, id, messages": (
        {"dataset": "flan_v2", "id": "flan_0", "messages": ASKED + ANSWERED},
        [("system", "s"), *USER],
    ),
    "text": ({"text": "q"}, [("text", "q")]),
    "prompt, completion": ({"prompt": "q", "completion": " a"}, [("prompt", "q"), ("response", " a")]),
    "prompt, completion as messages": ({"prompt": ASKED, "completion": ANSWERED}, [("system", "s"), *USER]),
    "prompt, response": ({"prompt": "q", "response": "a"}, USER),
    "question, answer": ({"question": "q", "answer": "a"}, USER),
    "system_prompt, question, response": (
        {"id": "niv.1", "system_prompt": "s", "question": "q", "response": "a"},
        [("system", "s"), *USER],
    ),
    "problem, solution": ({"problem": "q", "solution": "a", "level": "Level 5", "type": "Algebra"}, USER),
    "query, response": ({"query": "q", "response": "a"}, USER),
    "input, output": ({"input": "q", "output": "a"}, USER),
    "context, question, answer": (
        {"context": "c", "question": "q", "answer": "a"},
        [("user", "c\n\nq"), ("assistant", "a")],
    ),
}  # fmt: skip


WRONG = [
    None,
    True,
    7,
    float("nan"),
    "",
    "\ud800",
    [],
    [[]],
    [None],
    [7],
    ["a"],
    [{}],
    [{"role": []}],
    {},
    {"a": 1},
    {"role": {}},
]


def read_as_is(write: Write, record: dict, format: str) -> bool:
    try:
        return len(read_rows(source_of(write, record, format=format))) == 1
    except DataError:
        return False


def turns(source: Source) -> list[tuple[str, str]]:
    row = read_rows(source)[0]
    return list(zip(row["roles"], row["contents"], strict=True))


def source_of(write: Write, *records: dict, **reading: object) -> Source:
    reading["fields"] = tuple(sorted(reading.get("fields", {}).items()))
    return file_source(write("a.jsonl", "\n".join(map(json.dumps, records))), Reading(**reading))


def refusal(source: Source) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    return str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(write: Write, name: str) -> None:
    record, expected = LAYOUTS[name]
    source = source_of(write, record)
    assert turns(source) == expected and read_as(source)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("format", ["auto", "alpaca", "chat", "text"])
def test_a_later_record_that_is_like_no_other_is_read_or_refused_in_words(write: Write, name: str, format: str) -> None:
    """Each field in turn is missing, or holds what no field should. What is refused can be skipped."""
    record, _ = LAYOUTS[name]
    if format != "auto" and not read_as_is(write, record, format):
        return
    for field in record:
        without = {other: value for other, value in record.items() if other != field}
        strange = [without, *(record | {field: value} for value in WRONG)]
        kept = len(read_rows(source_of(write, record, *strange, format=format, skip_bad_records=len(strange))))
        if kept <= len(strange):
            problems = re.findall(r"record (\d+)", refusal(source_of(write, record, *strange, format=format)))
            assert len(set(problems)) == 1 + len(strange) - kept and "0" not in problems, (field, problems)


def test_the_table_of_the_docs_is_the_one_that_is_tested() -> None:
    page = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8")
    rows = page.split("## Layouts")[1].split("\n## ")[0].splitlines()
    names = [row.split("|")[1].strip().replace("`", "") for row in rows if row.startswith("| `")]
    assert names == list(LAYOUTS)


def test_what_was_read_is_said(write: Write) -> None:
    assert (
        read_as(source_of(write, {"question": "q", "answer": "a"}))
        == "question (user turn) and answer (assistant turn)"
    )
    assert read_as(source_of(write, {"prompt": 3, "completion": "a"}, {"prompt": "q", "completion": "a"},
                             skip_bad_records=1)).startswith("prompt and completion")  # fmt: skip


def test_layouts_that_were_read_before_pairs_still_win(write: Write) -> None:
    assert turns(source_of(write, {"question": "q", "answer": "a", "text": "t"})) == [("text", "t")]
    assert turns(source_of(write, {"problem": "p", "solution": "s", "messages": ASKED + ANSWERED}))[1:] == USER


def test_a_record_that_could_be_read_in_two_ways_is_refused_with_the_way_out(write: Write) -> None:
    record = {"question": "q", "answer": "a", "response": "b"}
    text = refusal(source_of(write, record))
    assert "question (user turn) and answer" in text and "question (user turn) and response" in text
    assert "--fields '{prompt: NAME, response: NAME}'" in text
    assert turns(source_of(write, record, fields={"prompt": "question", "response": "answer"})) == USER


def test_what_is_not_read_is_named(write: Write) -> None:
    assert row_notes(source_of(write, {"problem": "q", "solution": "a", "answer": "7"})) == [
        "1 record (first: record 0): answer: not used"
    ]


def test_a_preference_pair_is_refused_with_the_way_out(write: Write) -> None:
    record = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert "the response is chosen" in refusal(source_of(write, record))
    source = source_of(write, record, fields={"prompt": "prompt", "response": "chosen"})
    assert turns(source) == USER and row_notes(source) == ["1 record (first: record 0): rejected: not used"]


@pytest.mark.parametrize(
    ("fields", "record", "expected"),
    [
        ({"prompt": "q", "response": "a"}, {"q": "q", "a": "a", "text": "t"}, USER),
        ({"question": "prompt", "answer": "completion"}, {"prompt": "q", "completion": "a"}, USER),
        ({"instruction": "q", "output": "a"}, {"q": "q", "a": "a"}, HEADED),
        ({"output": "target"}, {"instruction": "q", "input": "", "target": "a"}, HEADED),
        ({"text": "body"}, {"body": "t", "question": "q", "answer": "a"}, [("text", "t")]),
        ({"messages": "dialog", "role": "who", "content": "said"},
         {"dialog": [{"who": "user", "said": "q"}, {"who": "assistant", "said": "a"}]}, USER),
        ({"prompt": "q", "response": "a", "system": "s"}, {"q": "q", "a": "a", "s": "S"}, [("system", "S"), *USER]),
        ({"prompt": "q", "response": "a", "system": "s"}, {"q": "q", "a": "a"}, USER),
    ],
)  # fmt: skip
def test_fields(write: Write, fields: dict, record: dict, expected: list) -> None:
    assert turns(source_of(write, record, fields=fields)) == expected


def test_a_field_that_is_missing(write: Write) -> None:
    text = refusal(source_of(write, {"q": "q", "b": "a"}, fields={"prompt": "q", "response": "a"}))
    assert "record 0: no field 'a', which `fields` names response; it has ['b', 'q']" in text


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (LAYOUTS["question, answer"][0], [("user", "q\nStep by step."), ("assistant", "a")]),
        (LAYOUTS["prompt, completion"][0], [("prompt", "q\nStep by step."), ("response", " a")]),
        (LAYOUTS["instruction, input, output"][0],
         [("prompt", "### Instruction:\nq\n\n### Input:\ni\nStep by step.\n\n### Response:\n"), ("response", "a")]),
    ],
)  # fmt: skip
def test_prompt_suffix(write: Write, record: dict, expected: list) -> None:
    assert turns(source_of(write, record, prompt_suffix="Step by step.")) == expected


def test_prompt_suffix_without_a_prompt_is_said(write: Write) -> None:
    source = source_of(write, {"text": "t"}, prompt_suffix="x")
    assert turns(source) == [("text", "t")]
    assert row_notes(source) == ["1 record (first: record 0): prompt_suffix (text has no prompt): not used"]


def test_only_the_completion_is_learned(write: Write) -> None:
    prompt = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "3"},
    ]
    tokenizer = tokenizer_of("gpt2")
    for record in ({"prompt": prompt, "completion": ANSWERED}, {"prompt": "one two 3", "completion": "a"}):
        samples = load_samples([source_of(write, record)], Tokeniser(tokenizer, 100, "response"))
        learned = [label for label in samples.table["labels"][0] if label != IGNORE]
        assert tokenizer.decode(learned) == "a<|endoftext|>"


@pytest.mark.parametrize(
    ("record", "glued"),
    [
        ({"prompt": "What is 2 + 2?", "completion": "4"}, True),
        ({"prompt": "Answer:", "completion": "Yes"}, True),
        ({"prompt": "What is 2 + 2? ", "completion": "4"}, False),
        ({"prompt": "What is 2 + 2?", "completion": "\n4"}, False),
        ({"prompt": "print(", "completion": ")"}, False),
        ({"prompt": "二加二", "completion": "四"}, False),
        ({"prompt": "", "completion": "4"}, False),
        ({"question": "What is 2 + 2?", "answer": "4"}, False),
        ({"instruction": "Add 2 and 2.", "output": "4"}, False),
        ({"text": "What is 2 + 2?4"}, False),
    ],
)
def test_a_completion_that_runs_into_its_prompt_is_told(write: Write, record: dict, glued: bool) -> None:
    path = write("records.json", [record])
    notes = row_notes(file_source(path))
    told = ["1 record (first: record 0): nothing stands between prompt and completion"]
    assert [note.split(": end")[0] for note in notes] == (told if glued else [])
