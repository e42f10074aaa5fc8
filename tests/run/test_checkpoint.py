"""bilevel/run/checkpoint.py: a run that was stopped ends as if it had not been, and a checkpoint is whole or absent."""

import errno
import filecmp
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from run_helpers import ROOT, settings

import train_bilevel
from bilevel.errors import UserError
from bilevel.processes import ALONE
from bilevel.run import checkpoint_file
from bilevel.run.checkpoint import Checkpoints
from bilevel.run.checkpoint_file import DamagedCheckpoint, verify
from bilevel.run.interrupt import Interrupt
from bilevel.run.state import Run

RESULTS = ("metrics.csv", "weights.csv", "model/model.safetensors")
STATE = {
    "step": 3,
    "row": {"loss_w": 0.1 + 0.2, "weight/a": 1e-300},
    "x": {"x": torch.randn(5, dtype=torch.float64), "optimizer": {}},
    "copies": {"u": {"parameters": {"a.b": torch.randn(3, 4)}, "moments": {"a.b": {"step": torch.tensor(3.0)}}}},
}


def changes(data: Path, weights: str, lisa: bool) -> dict:
    """Settings of ten steps whose checkpoints, x steps, draws and evaluations fall on different steps."""
    steps = {"max_steps": 10, "save_every": 5, "eval_every": 4, "upper_every": 2, "weights": weights}
    steps |= {"global_batch_size": 8, "val_batch_size": 8}
    mixed = {"train_data": [str(data / "mixed" / "train_mixed.json")]} if weights == "sample" else {}
    return steps | mixed | ({"lisa_layers": 1, "lisa_interval": 3} if lisa else {})


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """A signal comes in this step of the next run."""
    calls, one_step = iter(range(1, 1000)), train_bilevel.one_step

    def signalled(run: Run) -> int:
        if next(calls) == step:
            os.kill(os.getpid(), number)
        return one_step(run)

    monkeypatch.setattr(train_bilevel, "one_step", signalled)


OFTEN = (1, 6, 3)  # steps of each start: after steps 1, 7 and 10, the last
STOPS = [
    ("sample", True, 1, (7,)),
    *((weights, lisa, 1, OFTEN) for weights in ("source", "sample") for lisa in (False, True)),
    ("source", True, 2, OFTEN),
]


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "lisa", "order", "stops"), STOPS)
def test_a_stopped_run_ends_as_if_it_had_not_been(
    data: Path, tmp_path: Path, monkeypatch, capsys, weights: str, lisa: bool, order: int, stops: tuple[int, ...]
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    changed = changes(data, weights, lisa) | {"order": order}
    assert train_bilevel.main(settings(data, whole, **changed)) == 0
    for step in stops:
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            assert train_bilevel.main(settings(data, stopped, **changed)) == 143
    assert train_bilevel.main(settings(data, stopped, **changed)) == 0
    assert "going on after step 7, from its checkpoint" in capsys.readouterr().out
    for name in RESULTS:
        assert filecmp.cmp(whole / name, stopped / name, shallow=False), name


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_newest_checkpoint(data: Path, tmp_path: Path):
    """kill -9 at any moment: what is left is cut back to the checkpoint."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changed = changes(data, "source", True) | {"save_every": 1, "max_steps": 40}
    assert train_bilevel.main(settings(data, whole, **changed)) == 0
    command = [sys.executable, str(ROOT / "train_bilevel.py"), *settings(data, killed, **changed)]
    for rows in (3, 17, 31):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
        wait_for(lambda rows=rows: lines(killed / "metrics.csv") > rows)
        running.kill()
        running.wait()
    with (killed / "metrics.csv").open("a") as file:
        file.write("39,0.5,1.2")  # half a row
    (killed / "checkpoints" / "step_000099.partial").mkdir()  # goes with the next checkpoint
    assert train_bilevel.main(settings(data, killed, **changed)) == 0
    for name in RESULTS:
        assert filecmp.cmp(whole / name, killed / name, shallow=False), name
    assert not list((killed / "checkpoints").glob("*.partial"))


def test_what_a_killed_run_was_writing_goes_with_the_next_checkpoint(tmp_path: Path):
    """Also the file that safetensors had not renamed yet; a file of somebody else stays, and its folder with it."""
    ours, theirs = tmp_path / "checkpoints" / "step_000003.partial", tmp_path / "checkpoints" / "step_000004.partial"
    for folder, name in ((ours, ".tmpmZipK6"), (ours, "rank0.json"), (theirs, "notes.txt")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    saved = Checkpoints(tmp_path / "checkpoints", ALONE, {}, {}, keep=2)
    saved.begin(5, STATE | {"step": 5})
    assert saved.finish()
    assert not ours.exists() and [path.name for path in theirs.iterdir()] == ["notes.txt"]


def test_the_newest_is_that_of_most_steps(tmp_path: Path):
    """Beyond a million steps names have another length."""
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=2)
    for step in (999_999, 1_000_000):
        saved.begin(step, STATE | {"step": step})
        assert saved.finish()
    assert saved.read("auto")["step"] == 1_000_000
    (tmp_path / "step_1000000" / "rank0.json").unlink()
    assert saved.read("auto")["step"] == 999_999


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_exits(data: Path, tmp_path: Path, number: int, code: int):
    out = tmp_path / "r"
    command = [sys.executable, str(ROOT / "train_bilevel.py"), *settings(data, out, max_steps=100_000, save_every=0)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    wait_for(lambda: lines(out / "metrics.csv") > 3)
    running.send_signal(number)
    said, _ = running.communicate(timeout=10)
    (saved,) = (out / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert running.returncode == code and f"signal {int(number)}: ended after step {step}, saved" in said
    assert lines(out / "metrics.csv") == 1 + step


def test_a_second_signal_exits_at_once(monkeypatch: pytest.MonkeyPatch):
    """Not one of the same moment: a launcher passes on what the scheduler has sent to all, and not always as it was."""
    left: list[int] = []
    now = [100.0]
    monkeypatch.setattr(os, "_exit", left.append)
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(ALONE, clock=lambda: now[0]) as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.agreed() == signal.SIGTERM and not left
        now[0] += 1.9
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.agreed() == signal.SIGTERM and not left
        now[0] += 0.2
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]
    assert signal.getsignal(signal.SIGINT) is before


# ----------------------------------------------------------------------------------------------------------------------
# what may not go on


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(data: Path, tmp_path: Path, capsys):
    """As when kill -9 took the launcher and left its processes."""
    out = tmp_path / "r"
    flags = settings(data, out, max_steps=100_000)
    command = [sys.executable, str(ROOT / "train_bilevel.py"), *flags]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
    wait_for(lambda: lines(out / "metrics.csv") > 1)
    assert train_bilevel.main(flags) == 2
    running.kill()
    running.wait()
    assert f"a process is still at work in {out}" in capsys.readouterr().err


SHORT = {"max_steps": 4, "save_every": 2, "eval_every": 100}


@pytest.fixture
def unfinished(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped after step 3."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert train_bilevel.main(settings(data, tmp_path / "r", **SHORT)) == 143
    return tmp_path / "r"


def test_other_settings_are_refused(data: Path, unfinished: Path, capsys):
    changed = SHORT | {"lr_x": 0.5, "seed": 3}
    assert train_bilevel.main(settings(data, unfinished, **changed)) == 2
    said = capsys.readouterr().err
    assert "of other settings, lr_x was 0.1 and is 0.5, seed was 0 and is 3: change them back, or" in said
    free = SHORT | {"save_every": 4, "keep_checkpoints": 1, "gpu_memory_gib": 24}
    assert train_bilevel.main(settings(data, unfinished, **free)) == 0
    assert [path.name for path in (unfinished / "checkpoints").iterdir()] == ["step_000004"]


def test_never_and_a_finished_run_are_refused(data: Path, unfinished: Path, capsys):
    assert train_bilevel.main(settings(data, unfinished, resume="never", **SHORT)) == 2
    assert "already holds an unfinished run and resume is never" in capsys.readouterr().err
    assert train_bilevel.main(settings(data, unfinished, **SHORT)) == 0
    assert train_bilevel.main(settings(data, unfinished, **SHORT)) == 2
    assert "already holds a run, which is never overwritten" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_by_its_path(data: Path, unfinished: Path, tmp_path: Path, capsys):
    path = unfinished / "checkpoints" / "step_000002"
    changed = SHORT | {"resume": str(path)}
    assert train_bilevel.main(settings(data, unfinished, **changed)) == 0
    assert "going on after step 2" in capsys.readouterr().out
    (tmp_path / "no").mkdir()
    changed["resume"] = str(tmp_path / "no")
    assert train_bilevel.main(settings(data, tmp_path / "other", **changed)) == 2
    assert "manifest.json cannot be read" in capsys.readouterr().err


def test_another_number_of_processes_is_refused(tmp_path: Path):
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=1)
    saved.begin(3, STATE)
    assert saved.finish()
    manifest = json.loads((tmp_path / "step_000003" / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["processes"] = 2
    manifest["sha256"] = checkpoint_file._digest(manifest)
    (tmp_path / "step_000003" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was written by 2 processes and this run has 1"):
        saved.read("auto")


# ----------------------------------------------------------------------------------------------------------------------
# whole or absent


def test_a_state_comes_back_bit_for_bit(tmp_path: Path):
    saved = Checkpoints(tmp_path, ALONE, {"alpha": 1.0}, {}, keep=2)
    saved.begin(3, STATE)
    assert saved.finish()
    back = saved.read("auto")
    assert back["row"] == STATE["row"] and back["step"] == 3 and back["x"]["optimizer"] == {}
    for path in (("x", "x"), ("copies", "u", "parameters", "a.b"), ("copies", "u", "moments", "a.b", "step")):
        mine, theirs = STATE, back
        for key in path:
            mine, theirs = mine[key], theirs[key]
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


def test_the_state_is_that_of_the_step_though_training_goes_on(tmp_path: Path):
    state = {"step": 1, "x": torch.zeros(1000)}
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=1)
    saved.begin(1, state)
    state["x"].add_(1)
    assert saved.finish() and not saved.read("auto")["x"].any()


def test_the_oldest_go_when_the_newest_is_whole(tmp_path: Path):
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=2)
    for step in (1, 2, 3, 4):
        saved.begin(step, STATE | {"step": step})
        assert saved.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000004"]


def test_the_one_just_written_stays_and_those_set_aside_go_first(tmp_path: Path, caplog):
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=3)

    def write(step: int) -> None:
        saved.begin(step, STATE | {"step": step})
        assert saved.finish() and saved.last == tmp_path / f"step_{step:06d}"

    for step in (2, 6, 8):
        write(step)
    saved.set_aside(5)
    assert "step_000008 is beyond step 5, after which the run goes on: set aside as step_000008.aside" in caplog.text
    with pytest.raises(UserError, match="it is step_000008 under another name"):
        saved.read(str(tmp_path / "step_000008.aside"))
    kept = []
    for step in (7, 9):
        write(step)
        kept.append(sorted(path.name for path in tmp_path.iterdir()))
    assert kept == [["step_000002", "step_000007", "step_000008.aside"], ["step_000002", "step_000007", "step_000009"]]
    saved.keep = 1
    write(3)  # and not the one of most steps
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


WRITES = ["save_file", "write_text rank0.json", "write_text rank0.sums", "write_text manifest.json", "fsync", "rename",
          "mkdir"]  # fmt: skip


@pytest.mark.parametrize("where", WRITES)
def test_a_full_disk_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, where: str):
    """No space at any point of writing: the one before stays, nothing half is left, the next one succeeds."""
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=3)
    saved.begin(3, STATE)
    assert saved.finish()
    with monkeypatch.context() as patch:
        break_write(patch, where)
        saved.begin(4, STATE | {"step": 4})
        assert not saved.finish()
    assert "NO CHECKPOINT WRITTEN" in caplog.text and "No space left on device" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"] and saved.read("auto")["step"] == 3
    saved.begin(5, STATE | {"step": 5})
    assert saved.finish() and saved.read("auto")["step"] == 5


def break_write(patch: pytest.MonkeyPatch, where: str) -> None:
    """The call raises as it does on a full disk; the files written before it are there, cut short."""
    kind, _, name = where.partition(" ")
    owner = {"save_file": safetensors.torch, "fsync": os, "write_text": Path, "rename": Path, "mkdir": Path}[kind]
    whole = getattr(owner, kind)

    def full(*args, **kwargs):
        if kind == "write_text" and args[0].name != name:
            return whole(*args, **kwargs)
        if kind == "write_text":
            whole(args[0], args[1][: len(args[1]) // 2], **kwargs)
        if kind == "save_file":
            args[1].write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(owner, kind, full)


def test_a_limit_on_the_size_of_files_at_any_byte(tmp_path: Path, caplog):
    """As a disk that fills up: wherever writing ends, the checkpoint before is the newest one that is whole."""
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=3)
    saved.begin(3, STATE)
    assert saved.finish()
    largest = max(path.stat().st_size for path in (tmp_path / "step_000003").iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, largest, max(1, largest // 40)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            saved.begin(4, STATE | {"step": 4})
            assert not saved.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in tmp_path.iterdir()] == ["step_000003"] and saved.read("auto")["step"] == 3
    assert caplog.text.count("NO CHECKPOINT WRITTEN") >= 40
    saved.begin(5, STATE | {"step": 5})
    assert saved.finish() and saved.read("auto")["step"] == 5


def test_too_little_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    saved.begin(3, STATE)
    assert not saved.finish() and "0.00 GB are free on the disk" in caplog.text and not list(tmp_path.iterdir())


def flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(bytes(content))


FILES = ("rank0.safetensors", "rank0.json", "manifest.json")
DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"{name} is gone": lambda folder, name=name: (folder / name).unlink() for name in FILES},
    **{f"{name} is empty": lambda folder, name=name: (folder / name).write_bytes(b"") for name in FILES},
    **{
        f"{name} lost its end": lambda folder, name=name: os.truncate(folder / name, (folder / name).stat().st_size - 1)
        for name in FILES
    },
    **{
        f"a bit of {name}, {share:.0%} in": lambda folder, name=name, share=share: flip(folder / name, share)
        for name in FILES
        for share in (0.01, 0.5, 0.99)
    },
    "more at the end": lambda folder: (folder / "rank0.json").write_text((folder / "rank0.json").read_text() + " "),
    "another step's files": lambda folder: shutil.copy(folder.parent / "step_000002" / "rank0.json", folder),
    "another step's manifest": lambda folder: shutil.copy(folder.parent / "step_000002" / "manifest.json", folder),
    "renamed": lambda folder: folder.rename(folder.with_name("step_000007")),
    "everything gone": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a folder for a file": lambda folder: ((folder / "rank0.json").unlink(), (folder / "rank0.json").mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog, damage: str):
    saved = Checkpoints(tmp_path, ALONE, {"alpha": 2.0}, {}, keep=3)
    for step in (2, 3):
        saved.begin(step, STATE | {"step": step})
        assert saved.finish()
    DAMAGES[damage](tmp_path / "step_000003")
    assert saved.read("auto")["step"] == 2
    assert "is damaged and passed over" in caplog.text


def test_files_that_are_none_of_ours_are_harmless(tmp_path: Path):
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=1)
    saved.begin(3, STATE)
    assert saved.finish()
    (tmp_path / "step_000003" / "notes.txt").write_text("mine")
    (tmp_path / "step_final").mkdir()
    (tmp_path / "step_000009.partial").mkdir()
    verify(tmp_path / "step_000003", 0)
    assert saved.read("auto")["step"] == 3
    with pytest.raises(DamagedCheckpoint):
        verify(tmp_path / "step_final", 0)
