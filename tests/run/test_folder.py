"""bilevel/run/folder.py: who may take a run's folder, which checkpoints count there, what is said when a run ends
early."""

import errno
import filecmp
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from run_helpers import settings, train, train_until

import train_bilevel
from bilevel.baselines import scores as baselines
from bilevel.processes import World
from bilevel.run import checkpoint, folder
from bilevel.run.lock import hold

pytestmark = pytest.mark.usefixtures("no_old_log")

RESULTS = ("metrics.csv", "weights.csv", "model/model.safetensors")
UNFINISHED = ".0123456789abcdef.new"  # the name of a file that was being written
TEN = {"max_steps": 10, "save_every": 2, "eval_every": 5, "global_batch_size": 8, "val_batch_size": 8}


def damage(run: Path) -> None:
    """All checkpoints there are."""
    for path in (run / "checkpoints").glob("step_*"):
        (path / "rank0.json").write_text("{}")


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints that a run does not go on from


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "r"
    train(data, out, **TEN)
    return out


@pytest.mark.slow
def test_after_damage_the_new_checkpoints_count(data: Path, tmp_path: Path, whole: Path, capsys):
    """All are damaged: the run begins again, and what it writes then is what is kept, named and gone on from."""
    out = tmp_path / "r"
    arguments = settings(data, out, **TEN)
    assert train_until(7, arguments) == 143
    assert saved(out) == ["step_000006", "step_000008"]
    damage(out)
    assert train_until(2, arguments) == 143
    assert saved(out) == ["step_000002", "step_000003"]
    said = capsys.readouterr().out
    assert f"the last checkpoint is {out / 'checkpoints' / 'step_000003'}, the same command goes on from it" in said
    assert "step_000008 is beyond step 0, after which the run goes on: set aside as step_000008.aside" in said
    assert train_bilevel.main(arguments) == 0 and "going on after step 3" in capsys.readouterr().out
    for name in RESULTS:
        assert filecmp.cmp(out / name, whole / name, shallow=False), name


@pytest.mark.slow
def test_going_on_from_an_older_checkpoint_leaves_the_newer_behind(data: Path, tmp_path: Path, whole: Path, capsys):
    """It ends before it has saved anything: the same settings go on from there, and no row is missing."""
    out = tmp_path / "r"
    assert train_until(7, settings(data, out, keep_checkpoints=3, **TEN)) == 143
    assert saved(out) == ["step_000004", "step_000006", "step_000008"]
    from_four = settings(data, out, resume=str(out / "checkpoints" / "step_000004"), keep_checkpoints=3, **TEN)

    def fails(*args) -> int:
        raise RuntimeError("no power")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(train_bilevel, "train", fails)
        train_bilevel.main(from_four)
    assert saved(out) == ["step_000004", "step_000006.aside", "step_000008.aside"]
    capsys.readouterr()
    train(data, out, keep_checkpoints=3, **TEN)
    assert "going on after step 4" in capsys.readouterr().out
    assert saved(out) == ["step_000006", "step_000008", "step_000010"]
    for name in RESULTS:
        assert filecmp.cmp(out / name, whole / name, shallow=False), name
    assert pd.read_csv(out / "timing.csv")["step"].tolist() == list(range(11))


# ----------------------------------------------------------------------------------------------------------------------
# what the end of a run says


@pytest.mark.slow
def test_a_signal_says_which_command_goes_on(data: Path, tmp_path: Path, capsys):
    """Each sentence is tried: the command that it names goes on from the checkpoint that it names."""
    out = tmp_path / "r"
    never, path = settings(data, out, resume="never", **TEN), str(out / "checkpoints" / "step_000004")
    assert train_until(4, never) == 143
    last = f"the last checkpoint is {out / 'checkpoints'}/step_"
    assert f"after step 5, saved; {last}000005, the same command with resume=auto goes on from it" in _said(capsys)
    assert train_bilevel.main(never) == 2
    assert train_until(4, settings(data, out, resume=path, **TEN)) == 143
    assert f"after step 5, saved; {last}000005, the same command with resume=auto goes on from it" in _said(capsys)
    assert train_until(5, settings(data, out, **TEN)) == 143
    said = _said(capsys)
    assert "going on after step 5" in said and f"saved; {last}000006, the same command goes on from it" in said


def test_a_checkpoint_that_was_not_written_is_not_said_to_be(data: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "r"
    assert train_until(3, settings(data, out, **TEN)) == 143

    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_state", full)
        assert train_until(6, settings(data, out, **TEN)) == 143
    last = out / "checkpoints" / "step_000004"
    assert f"ended after step 7; the last checkpoint is {last}, the same command goes on from it" in _said(capsys)


def test_a_baseline_that_is_stopped_says_that_it_begins_anew(data: Path, tmp_path: Path, monkeypatch, capsys):
    arguments = settings(data, tmp_path / "r", method="loss", score_epochs=1)
    tick, calls = baselines.Scoring.lr_y, []

    def signalled(*args) -> float:
        calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return tick(*args)

    with monkeypatch.context() as patch:
        patch.setattr(baselines.Scoring, "lr_y", signalled)
        assert train_bilevel.main(arguments) == 143
    said = _said(capsys)
    assert len(calls) == 1 and "there is no checkpoint yet, the same command begins anew" in said
    assert "saved" not in said and not (tmp_path / "r" / "checkpoints").exists()


def _said(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# two starts, and one that fails


def contents(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_start_that_another_overtakes_touches_nothing(data: Path, tmp_path: Path, monkeypatch, capsys):
    """Another process takes the folder, works, and ends or not, all while this one is loading."""
    out = tmp_path / "r"
    arguments, setup = settings(data, out, max_steps=3, save_every=1), train_bilevel.setup
    others: dict[str, Callable[[], object]] = {
        "a process is still at work in": lambda: (out.mkdir(), hold(out))[1],
        "another process has been at work in": lambda: train_until(1, arguments),
        "already holds a run, which is never overwritten": lambda: train_bilevel.main(arguments),
    }
    for message, other in others.items():
        before, kept = {}, []

        def overtaken(*args, other=other, before=before, kept=kept):
            found = setup(*args)
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(train_bilevel, "setup", setup)
                kept.append(other())
            before |= contents(out)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(train_bilevel, "setup", overtaken)
            assert train_bilevel.main(arguments) == 2
        assert message in capsys.readouterr().err and contents(out) == before
        kept.clear()


def test_two_that_take_the_folder_in_the_same_moment(data: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "r"
    monkeypatch.setattr(folder, "hold", lambda path: None)
    assert train_bilevel.main(settings(data, out)) == 2
    assert f"a process is still at work in {out}" in capsys.readouterr().err and not list(out.iterdir())


def test_all_processes_end_when_one_cannot_have_the_folder(data: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(World, "gather", lambda world, value: [value, "the other process has no room"])
    assert train_bilevel.main(settings(data, tmp_path / "r")) == 2
    assert capsys.readouterr().err == "error: the other process has no room\n"


def test_what_a_killed_start_leaves_is_no_run(data: Path, tmp_path: Path, capsys):
    """Killed before its settings stood in the folder; while its process lives, the folder is taken."""
    out = tmp_path / "r"
    arguments = settings(data, out, max_steps=2, resume="never")
    out.mkdir()
    (out / UNFINISHED).write_text("alpha: 1")
    lock = hold(out)
    assert train_bilevel.main(arguments) == 2
    assert f"a process is still at work in {out}" in capsys.readouterr().err
    lock.close()
    assert sorted(path.name for path in out.iterdir()) == [UNFINISHED, "lock"]
    assert train_bilevel.main(arguments) == 0


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "metrics.csv"])
def test_a_start_without_room_says_so_and_can_be_tried_again(data: Path, tmp_path: Path, monkeypatch, capsys, name):
    out, arguments = tmp_path / "r", settings(data, tmp_path / "r", max_steps=2)
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target.name == name:
            os.truncate(path, 9)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert train_bilevel.main(arguments) == 2
    said = capsys.readouterr().err
    assert f"error: {out} cannot be written: [Errno 28] No space left" in said and said.count("\n") == 1
    assert not list(out.glob("*.new")) and not (out / "weights.csv").exists()
    assert train_bilevel.main(arguments) == 0
