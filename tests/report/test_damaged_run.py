"""A metrics.csv or overlap.json that no run has written is refused; the report does without a missing one."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from run_helpers import dump, finished_run

from bilevel.report.command import main

ROW = {"step": [0, 1], "test_loss_w": [2.0, 1.5], "roc_auc": 0.5, "threshold": 1.0, "precision": 0.5, "recall": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    files = [dump(tmp_path / f"{name}.json", [{"text": name}] * 3) for name in ("a", "b")]
    weights = pd.DataFrame({"source": ["a", "b"], "weight": [0.5, 0.5], "samples": [3, 3]})
    folder = finished_run(tmp_path / "run", files, weights)
    pd.DataFrame(ROW).to_csv(folder / "metrics.csv", index=False)
    return folder


def test_the_right_one_is_read(run: Path) -> None:
    assert main([str(run)]) == 0
    (run / "metrics.csv").unlink()
    assert main([str(run)]) == 0
    (run / "metrics.csv").write_text("step,test_loss_w\n")  # a header alone
    assert main([str(run)]) == 0


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no text": lambda path: path.write_bytes(b"step\xff,a\n1,2\n"),
    "empty": lambda path: path.write_bytes(b""),
    "a word for a number": lambda path: path.write_text("step,test_loss_w\n0,much\n"),
    "no steps": lambda path: path.write_text("test_loss_w\n1\n"),
    "a step that is a word": lambda path: path.write_text("step,test_loss_w\nx,1\n"),
    "a step twice": lambda path: pd.DataFrame(ROW | {"step": [1, 1]}).to_csv(path, index=False),
    "no precision": lambda path: pd.DataFrame(ROW).drop(columns="precision").to_csv(path, index=False),
    "a folder": lambda path: path.mkdir(),
    "a FIFO": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_refused(damage: str, run: Path, capsys) -> None:
    (run / "metrics.csv").unlink()
    DAMAGES[damage](run / "metrics.csv")
    assert main([str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run}/metrics.csv is not what a run writes: ") and said.count("\n") == 1
    assert not (run / "report.html").exists()


def test_numbers_that_a_page_cannot_hold(run: Path, tmp_path: Path) -> None:
    """A threshold beyond all numbers, and a column that stands twice, which pandas renames."""
    files, weights = [tmp_path / "a.json"], pd.DataFrame({"file": "a.json", "index": range(3), "weight": [0.5, 1, 1.5]})
    folder = finished_run(tmp_path / "sample", files, weights)
    table = pd.DataFrame(ROW | {"threshold": float("inf")})
    table.to_csv(folder / "metrics.csv", index=False)
    text = (folder / "metrics.csv").read_text().split("\n")
    added = [",weight_q/0.5,weight_q/0.5", ",1.0,1.0", ",1.0,1.0", ""]
    (folder / "metrics.csv").write_text("\n".join(line + more for line, more in zip(text, added, strict=True)))
    assert main([str(folder)]) == 0


OVERLAPS: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda path: path.write_text("["),
    "another shape": lambda path: path.write_text('[{"first": "a"}]'),
    "words for numbers": lambda path: path.write_text(
        '[{"first": "train", "second": "val", "count": "x", "total": 3, "examples": []}]'
    ),
    "a FIFO": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("damage", OVERLAPS)
def test_a_damaged_list_of_overlaps_is_refused(damage: str, run: Path, capsys) -> None:
    OVERLAPS[damage](run / "overlap.json")
    assert main([str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run}/overlap.json is not what a run writes: ") and said.count("\n") == 1
