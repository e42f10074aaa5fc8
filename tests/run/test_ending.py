"""bilevel/run/ending.py and interrupt.py: nothing is lost before the first step and after the last."""

import errno
import filecmp
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from run_helpers import settings, train, train_until

import train_bilevel
from bilevel.baselines import scores as baselines
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import ALONE
from bilevel.report import command as report
from bilevel.run import ending, interrupt, picture
from bilevel.run.checkpoint import Checkpoints
from bilevel.run.interrupt import Interrupt, watch_launcher
from bilevel.run.state import Run
from bilevel.weights import csv_file

pytestmark = pytest.mark.usefixtures("no_old_log")

RESULTS = ("metrics.csv", "weights.csv", "model/model.safetensors")
SHORT = {"max_steps": 3, "save_every": 0, "eval_every": 2, "global_batch_size": 8, "val_batch_size": 8}
# What is called at the end of a run, in order, and the exit code of a run that gets SIGTERM then.
MOMENTS = {
    "the model": (TorchCopy, "save", 143),
    "the picture": (picture, "draw_weights", 0),
    "the weights": (csv_file, "write_weights", 0),
    "the report": (report, "write_report", 0),
    "the words": (ending, "summary", 0),
}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "r"
    train(data, out, **SHORT)
    return out


def check_whole(out: Path, whole: Path) -> None:
    for name in RESULTS:
        assert filecmp.cmp(out / name, whole / name, shallow=False), name
    left = {path.name for path in out.iterdir()}
    assert left == {path.name for path in whole.iterdir()} and "report.html" in left
    assert not left & {"lock", "checkpoints"}  # no checkpoints were asked for


def before(call: Callable, do: Callable[[], object]) -> Callable:
    def replaced(*args, **kwargs):
        do()
        return call(*args, **kwargs)

    return replaced


def no_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(train_bilevel, "one_step", None)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_while_the_results_are_written(
    data: Path, tmp_path: Path, whole: Path, monkeypatch, capsys, moment: str
):
    """What takes seconds is finished; the same command writes what is missing, and makes no step again."""
    owner, name, code = MOMENTS[moment]
    out, arguments = tmp_path / "r", settings(data, tmp_path / "r", **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, before(getattr(owner, name), lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert train_bilevel.main(arguments) == code
    if code:
        said = capsys.readouterr().out
        assert f"ended after step 3, saved; the last checkpoint is {out / 'checkpoints' / 'step_000003'}" in said
        no_steps(monkeypatch)
        assert train_bilevel.main(arguments) == 0
    check_whole(out, whole)


@pytest.mark.parametrize("moment", [name for name in MOMENTS if name != "the report"])
def test_a_process_that_is_gone_while_the_results_are_written(
    data: Path, tmp_path: Path, whole: Path, monkeypatch, moment: str
):
    """As after kill -9: nothing more is done. The same command writes what is missing, and makes no step again."""

    class Gone(BaseException):
        pass

    def gone(*args, **kwargs):
        raise Gone

    owner, name, _ = MOMENTS[moment]
    arguments = settings(data, tmp_path / "r", **SHORT)
    with monkeypatch.context() as patch, pytest.raises(Gone):
        patch.setattr(owner, name, gone)
        train_bilevel.main(arguments)
    no_steps(monkeypatch)
    assert train_bilevel.main(arguments) == 0
    check_whole(tmp_path / "r", whole)


def test_a_run_whose_report_is_missing_loads_nothing_to_write_it(data: Path, tmp_path: Path, monkeypatch, capsys):
    arguments = settings(data, tmp_path / "r", track_report=True, **SHORT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(report, "write_report", before(report.write_report, sys.exit))
        train_bilevel.main(arguments)
    assert not (tmp_path / "r" / "report.html").exists() and (tmp_path / "r" / "lock").exists()
    monkeypatch.setattr(train_bilevel, "setup", None)
    assert train_bilevel.main([*arguments, "--dry_run"]) == 0
    assert not (tmp_path / "r" / "report.html").exists()
    assert train_bilevel.main(arguments) == 0
    assert (tmp_path / "r" / "report.html").exists() and not (tmp_path / "r" / "lock").exists()
    assert "it has not been sent to wandb (track_report)" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["the model", "the picture", "the weights"])
def test_a_full_disk_while_the_results_are_written(
    data: Path, tmp_path: Path, whole: Path, monkeypatch, capsys, moment: str
):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name, _ = MOMENTS[moment]
    arguments = settings(data, tmp_path / "r", **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert train_bilevel.main(arguments) == 1
    said = capsys.readouterr().out
    assert "the results cannot be written: [Errno 28] No space left on device. Make room; the last checkpoint" in said
    no_steps(monkeypatch)
    assert train_bilevel.main(arguments) == 0
    check_whole(tmp_path / "r", whole)


def test_no_room_for_a_state_still_leaves_the_results(data: Path, tmp_path: Path, whole: Path, monkeypatch, capsys):
    """The state is three times as large as the model that is left."""
    monkeypatch.setattr(Checkpoints, "begin", lambda *args: None)
    monkeypatch.setattr(Checkpoints, "finish", lambda *args: False)
    train(data, tmp_path / "r", **SHORT)
    check_whole(tmp_path / "r", whole)


def test_a_baseline_computes_its_scores_once(data: Path, tmp_path: Path, monkeypatch):
    """A full disk when its results are written, or a signal just before: the scores are in a checkpoint."""
    changes = {"method": "loss", "score_epochs": 0.1, "max_steps": 3}
    train(data, tmp_path / "whole", **changes)
    arguments = settings(data, tmp_path / "r", **changes)
    with monkeypatch.context() as patch:
        row = before(train_bilevel.log_row, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(train_bilevel, "log_row", row)
        assert train_bilevel.main(arguments) == 143
    monkeypatch.setattr(baselines, "loss_score", None)
    assert train_bilevel.main(arguments) == 0
    for name in ("metrics.csv", "weights.csv"):
        assert filecmp.cmp(tmp_path / "r" / name, tmp_path / "whole" / name, shallow=False)
    assert not (tmp_path / "r" / "checkpoints").exists()


# ----------------------------------------------------------------------------------------------------------------------
# signals


def test_a_lost_connection_saves_the_run(data: Path, tmp_path: Path, capsys):
    arguments = settings(data, tmp_path / "r", **SHORT)
    assert train_until(1, arguments, signal.SIGHUP) == 129
    assert "signal 1: ended after step 2, saved" in capsys.readouterr().out


def test_a_signal_is_answered_at_once(data: Path, tmp_path: Path, capfd):
    """A step can take minutes."""
    told: list[str] = []
    one_step = train_bilevel.one_step

    def signalled(run: Run) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        told.append(capfd.readouterr().err)
        return one_step(run)

    with mock.patch.object(train_bilevel, "one_step", signalled):
        assert train_bilevel.main(settings(data, tmp_path / "r", **SHORT)) == 130
    assert told == ["\nsignal 2: the run ends and saves its state when this step is done\n"]


def test_a_signal_is_noted_where_nothing_can_be_written(tmp_path: Path):
    """A lost terminal, or a pipe whose reader has ended, which is also why the signal came."""
    reading, writing = os.pipe()
    os.close(reading)
    kept = os.dup(2)
    os.dup2(writing, 2)
    try:
        with Interrupt() as held:
            held.hold(ALONE, tmp_path)
            os.kill(os.getpid(), signal.SIGHUP)
            assert held.agreed() == signal.SIGHUP
    finally:
        os.dup2(kept, 2)
        for descriptor in (kept, writing):
            os.close(descriptor)


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(ALONE) as held:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not held.agreed()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_while_the_run_is_loading(data: Path, tmp_path: Path, monkeypatch, capsys, number: int):
    """It ends at once, with a sentence and no traceback, and leaves no folder."""
    monkeypatch.setattr(train_bilevel, "setup", lambda *args: (os.kill(os.getpid(), number), time.sleep(5)))
    with pytest.raises(SystemExit) as stopped:
        train_bilevel.main(settings(data, tmp_path / "r"))
    assert stopped.value.code == 128 + number
    said = capsys.readouterr()
    assert f"signal {int(number)}: ended before the first step; the same command starts again" in said.err
    assert not (tmp_path / "r").exists()


def test_a_process_whose_launcher_is_gone_gets_sigterm(monkeypatch):
    monkeypatch.setattr(interrupt, "WATCH", 0.01)
    parents = iter([7, 7, 7])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    with Interrupt(ALONE) as held:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        watch_launcher()  # nobody launched it
        time.sleep(0.1)
        assert not held.agreed()
        monkeypatch.setenv("LOCAL_RANK", "0")
        watch_launcher()
        deadline = time.monotonic() + 10
        while not held.agreed():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert held.agreed() == signal.SIGTERM
