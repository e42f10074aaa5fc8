"""bilevel/report/trained.py: the page shows records as they were trained on."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
from tokenizer_kinds import chatml_tokenizer, tokenizer_of
from transformers import PreTrainedTokenizerBase

from bilevel.data.sources import Reading, Source, file_source
from bilevel.report.command import as_html
from bilevel.report.trained import LONGEST, trained_on
from bilevel.run.finished import FinishedRun

HOSTILE = "</script><script>owned = 1</script>"


def run_of(folder: Path, tokenizer: PreTrainedTokenizerBase, sources: list[Source]) -> FinishedRun:
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": len(tokenizer)}))
    settings = types.SimpleNamespace(
        max_length=9999, loss_on="response", turns="all", template_kwargs={}, special_tokens_in_text=False
    )
    return FinishedRun(folder, settings, [], sources, [np.ones(1)] * len(sources), True)


def chat(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def test_the_first_records_with_what_is_learned(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([chat("q 0", HOSTILE), "{", *(chat(f"q {i}", "a") for i in range(9))]))
    run = run_of(tmp_path, chatml_tokenizer(), [file_source(tmp_path / "a.jsonl", Reading(skip_bad_records=1))])
    found = trained_on(run)
    [[name, records]] = found["sources"]
    assert name == "a" and found["note"] is None
    assert [head.partition(":")[0] for head, _ in records] == ["record 0", "record 2", "record 3"]
    learned = [[text for text, learned in parts if learned] for _, parts in records]
    assert learned == [[HOSTILE + "<|im_end|>"], ["a<|im_end|>"], ["a<|im_end|>"]]
    assert "".join(text for text, _ in records[1][1]).startswith("<|im_start|>user\nq 0<|im_end|>\n<|im_start|>assist")


def test_long_records_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * 2000}))
    [[_, [[head, parts]]]] = trained_on(run_of(tmp_path, tokenizer_of("gpt2"), [file_source(tmp_path / "a.jsonl")]))[
        "sources"
    ]
    assert len(parts[0][0]) == LONGEST and "more characters" in parts[-1][0] and parts[-1][1] is False


def test_without_a_tokenizer_it_says_why(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, types.SimpleNamespace(), [], [], [], True)
    assert trained_on(run) == {"note": f"Not shown: {tmp_path / 'model'} holds no tokenizer.", "sources": []}


def test_a_tokenizer_that_cannot_be_read_does_not_spoil_the_page(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(chat("q", "a"))
    run = run_of(tmp_path, chatml_tokenizer(), [file_source(tmp_path / "a.jsonl")])
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    found = trained_on(run)
    assert found["sources"] == [] and found["note"].startswith("Not shown: ")


@pytest.mark.parametrize("text", [HOSTILE, "<!-- <mark>", "\u2028"])
def test_no_text_of_them_becomes_markup(text: str) -> None:
    """The data of the page hold no character of markup, and charts.js makes text nodes of them."""
    page = as_html({"trained": {"note": None, "sources": [["a", [["record 0", [[text, True]]]]]]}}).decode()
    data = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data) and json.loads(data)["trained"]["sources"][0][1][0][1][0][0] == text
