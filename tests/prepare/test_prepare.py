"""bilevel.prepare: what it prints, what it leaves in the cache, and what it says of mistakes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_helpers import ROOT, TINY, make_data
from tokenizer_kinds import tokenizer_of

from bilevel.data.marked import GREEN, marked
from bilevel.data.samples import load_samples
from bilevel.data.sources import file_source
from bilevel.data.tokenise import Tokeniser
from bilevel.prepare.command import main

Write = Callable[..., Path]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = make_data(tmp_path / "data", size=24)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({
        "train_data": [f"{data}/train_*.json"], "val_data": [f"{data}/val.json"], "test_data": [f"{data}/test.json"],
        "model_config": TINY, "max_length": 300, "output_dir": str(tmp_path / "r"),
    }))  # fmt: skip
    return path


def test_it_says_what_it_found_and_writes_no_run(config: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(config), "--show", "1"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["train"], ["val"], ["test"])]
    table = [row for row in rows if len(row) > 6]
    assert [row[:2] for row in table[:2]] == [["train", "train_clean"], ["train", "train_noisy"]]
    assert "alpaca (instruction, input, output)" in out and "in the cache" in out
    assert out.count("tokens, ") == 4 and out.count("[[") == out.count("<|endoftext|>]]") == 4
    assert not (config.parent / "r").exists()


def test_the_run_then_tokenises_nothing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([str(config)]) == 0
    monkeypatch.setattr(Tokeniser, "__call__", lambda *_: pytest.fail("tokenised again"))
    assert main([str(config), "--show", "2"]) == 0


def test_a_run_folder_that_is_taken_does_not_matter(config: Path) -> None:
    (config.parent / "r").mkdir()
    (config.parent / "r" / "mine").write_text("kept")
    assert main([str(config)]) == 0


def test_every_bad_record_of_all_files_is_told(config: Path, capsys: pytest.CaptureFixture) -> None:
    data = config.parent / "data"
    for name in ("train_clean.json", "val.json"):
        records = json.loads((data / name).read_text())
        records[2]["output"], records[4]["output"] = None, 3
        (data / name).write_text(json.dumps(records))
    assert main([str(config)]) == 2
    said = capsys.readouterr().err
    assert "4 problems" in said and [said.count(f"{name}, record {i}: 'output'") for name in
                                     ("train_clean.json", "val.json") for i in (2, 4)] == [1] * 4  # fmt: skip
    assert main([str(config), "--skip_bad_records", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("2 left out (skip_bad_records)") == 2 and f"{data}/val.json, record 4: 'output'" in out


@pytest.mark.slow
def test_help_and_mistakes_come_before_slow_imports() -> None:
    code = "import sys; from bilevel.prepare.command import main; main(['none.yaml']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == "False\n" and "error: the configuration has" in said.stderr


def test_a_chat_as_it_is_trained_on(write: Write) -> None:
    """The example of the issue: what the template writes, and in brackets what is learned."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x \u00e9\U0001f600 y"}]
    tokenizer = tokenizer_of("gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    source = file_source(write("a.json", [{"messages": messages}]))
    samples = load_samples([source], Tokeniser(tokenizer, 99, "response"))
    row = samples.table[0]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[x \u00e9\U0001f600 y<|im_end|>]]\n"
    assert marked(tokenizer, row["input_ids"], row["labels"]) == expected
    coloured = marked(tokenizer, row["input_ids"], row["labels"], GREEN)
    assert coloured == expected.replace("[[", "\x1b[32m").replace("]]", "\x1b[0m")
