"""A run that is ended early by the file `finish` in its folder leaves its results."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import pytest
import torch
from run_helpers import settings, train, train_until

import train_bilevel
from bilevel.run.interrupt import FINISH, Interrupt
from bilevel.run.state import Run
from bilevel.weights.learned import SampleWeights

pytestmark = pytest.mark.usefixtures("no_old_log")

EIGHT = {"max_steps": 8, "save_every": 2, "eval_every": 4, "global_batch_size": 8, "val_batch_size": 8}
RESULTS = {"weights.csv", "weights.png", "report.html", "metrics.csv", "model"}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """metrics.csv of the run that nobody ends."""
    return train(data, tmp_path_factory.mktemp("whole") / "r", **EIGHT)


def ended_in(step: int, arguments: list[str], out: Path) -> int:
    """Run the script; the file appears when this step, from 0, begins."""
    one_step = train_bilevel.one_step

    def touched(run: Run) -> int:
        if run.step == step:
            (out / FINISH).touch()
        return one_step(run)

    with mock.patch.object(train_bilevel, "one_step", touched):
        return train_bilevel.main(arguments)


def check(out: Path, whole: pd.DataFrame, steps: int) -> None:
    """The rows are those of the whole run up to that step, which also has the results of an evaluation."""
    rows = pd.read_csv(out / "metrics.csv")
    assert rows["step"].tolist() == list(range(steps + 1))
    learned = ["loss_w", "loss_u", "weight/train_clean", "lr_y"]
    pd.testing.assert_frame_equal(rows[learned], whole[learned][: steps + 1])
    assert rows["test_loss_w"].notna().tolist()[-1] and {path.name for path in out.iterdir()} >= RESULTS
    weights = pd.read_csv(out / "weights.csv").set_index("source")["weight"]
    assert weights["train_clean"] == rows["weight/train_clean"].iloc[-1]
    assert f"ended early: {EIGHT['max_steps']} were planned" in (out / "report.html").read_text()


def test_a_run_ends_after_its_step_with_results(data: Path, tmp_path: Path, whole: pd.DataFrame, capsys):
    out = tmp_path / "r"
    assert ended_in(2, settings(data, out, **EIGHT), out) == 0
    assert "finish is in the run's folder: the run ends after step 3 of 8, with results" in capsys.readouterr().out
    check(out, whole, 3)
    assert not (out / "lock").exists() and (out / FINISH).exists()


def test_a_run_that_was_stopped_finishes_where_it_is(data: Path, tmp_path: Path, whole: pd.DataFrame, capsys):
    """And the clock of timing.csv goes on where it stood."""
    out = tmp_path / "r"
    assert train_until(4, settings(data, out, **EIGHT)) == 143
    assert f"; after `touch {out / FINISH}` it writes its results instead" in capsys.readouterr().out
    before = pd.read_csv(out / "timing.csv")["seconds"]
    (out / FINISH).touch()
    assert train_bilevel.main(settings(data, out, **EIGHT)) == 0
    check(out, whole, 5)
    seconds = pd.read_csv(out / "timing.csv")["seconds"]
    assert seconds.is_monotonic_increasing and seconds.iloc[-1] > before.iloc[-1]


def test_a_run_of_which_no_step_is_done_makes_one(data: Path, tmp_path: Path, whole: pd.DataFrame):
    out = tmp_path / "r"
    assert train_until(0, settings(data, out, **EIGHT)) == 143
    (out / FINISH).touch()
    assert train_bilevel.main(settings(data, out, **EIGHT)) == 0
    check(out, whole, 1)


@pytest.mark.parametrize("more", [{}, {"x_warmup_steps": 4}], ids=["", "in the warm-up"])
def test_weights_are_concluded_once_before_the_results(data: Path, tmp_path: Path, more: dict):
    """Before the last evaluation, and also while x still waits for its first step."""
    found = []

    def log_row(run: Run, metrics: object, evaluating: bool, pause: object) -> dict:
        found.append((run.step, evaluating, called.call_count))
        return whole_row(run, metrics, evaluating, pause)

    whole_row, conclude = train_bilevel.log_row, SampleWeights.conclude
    mixed = {"train_data": [str(data / "mixed" / "train_mixed.json")], "weights": "sample", "x_optimizer": "auto"}
    with (
        mock.patch.object(SampleWeights, "conclude", autospec=True, side_effect=conclude) as called,
        mock.patch.object(train_bilevel, "log_row", log_row),
    ):
        assert ended_in(2, settings(data, tmp_path / "r", **EIGHT | mixed | more), tmp_path / "r") == 0
    assert found[-1] == (3, True, 1) and found[-2][2] == 0


@pytest.mark.parametrize("main", [True, False])
def test_all_processes_know_of_it(tmp_path: Path, main: bool):
    """The main process looks for the file; the votes of two processes are summed."""
    asked: list[list[int]] = []

    def total(votes: torch.Tensor) -> torch.Tensor:
        asked.append(votes.tolist())
        return votes + torch.tensor([0, 0, int(not main)])

    (tmp_path / FINISH).touch()
    interrupt = Interrupt()
    interrupt.hold(SimpleNamespace(size=2, rank=int(not main), main=main, sum=total), tmp_path)
    interrupt.check()
    assert interrupt.finishing and asked == [[0, 0, int(main)]]
