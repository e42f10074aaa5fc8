"""bilevel/data/progress.py: a bar on a terminal, lines elsewhere, nothing for what is done at once."""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizer_kinds import tokenizer_of

from bilevel.data import progress, rows, samples, workers
from bilevel.data.samples import load_samples
from bilevel.data.sources import file_source
from bilevel.data.tokenise import Tokeniser

LINES = "".join(json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(100))


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for module in (rows, samples):
        monkeypatch.setattr(module, "ROWS", 10)


def load(path: Path) -> None:
    assert len(load_samples([file_source(path)], Tokeniser(tokenizer_of("gpt2"), 64, "response"))) == 100


def written(tmp_path: Path, ending: str) -> Path:
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        import pandas as pd

        pd.read_json(
            path.with_suffix(".jsonl").write_text(LINES) and path.with_suffix(".jsonl"), lines=True
        ).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(LINES.encode()) if ending.endswith("gz") else LINES.encode())
    return path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each look at the clock is 25 seconds later."""
    now = iter(range(0, 10**6, 25))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    yield


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_without_a_terminal_there_is_at_most_a_line_a_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture, clock: None, ending: str
) -> None:
    path = written(tmp_path, ending)
    load(path)
    lines = capsys.readouterr().err.splitlines()
    assert f"tokenising {path}: 30% after 1 min" in lines and f"tokenising {path}: 60% after 2 min" in lines
    if ending == ".parquet":
        assert f"reading {path}: 30 records after 1 min" in lines
    else:
        assert all("%" in line for line in lines)
    assert len(lines) <= 6


def test_what_is_done_at_once_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    load(written(tmp_path, ".jsonl"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("soon", [0.0, 30.0])
def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, soon: float
) -> None:
    monkeypatch.setattr(progress, "SOON", soon)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    path = written(tmp_path, ".jsonl")
    load(path)
    said = capsys.readouterr().err
    if soon:
        assert said == ""
    else:
        assert "reading a.jsonl: " in said and "B/s" in said and "tokenising a.jsonl: " in said and " records/s" in said


@pytest.mark.parametrize("rank, lines", [("0", True), ("1", False)])
def test_of_processes_that_do_the_same_one_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, clock: None, rank: str, lines: bool
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", rank)
    (tmp_path / "cache").write_text("not a folder")
    load(written(tmp_path, ".jsonl"))
    assert ("tokenising" in capsys.readouterr().err) == lines and workers.beside_others() == 1
