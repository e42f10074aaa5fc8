"""What goes wrong while a run is on its way: numbers that are not finite, a full disk, a tracker that is silent."""

import csv
import errno
import math
import os
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from run_helpers import make_data, settings, train, train_until

import train_bilevel
from bilevel.data.batches import MicroBatch
from bilevel.model import heldout
from bilevel.model.torch_copy import TorchCopy
from bilevel.monitor import metrics
from bilevel.monitor.metrics import Columns, MetricsLog
from bilevel.monitor.tracker import NoTracker, WandbTracker
from bilevel.run.state import Run
from bilevel.step import f2sa
from bilevel.weights.learned import SourceWeights

pytestmark = pytest.mark.usefixtures("no_old_log")


# ----------------------------------------------------------------------------------------------------------------------
# not finite

AT = 3  # the bad step, from 1


def spoil(monkeypatch: pytest.MonkeyPatch, what: str, at: tuple[int, ...] = (AT,)) -> None:
    """In these steps u's first loss is NaN, or w's gradients are."""
    one_step, losses, now = train_bilevel.one_step, TorchCopy.losses, {}

    def counted(run: Run) -> int:
        now.update(step=run.step + 1, u=run.copies["u"], done=False)
        return one_step(run)

    def spoiled(copy: TorchCopy, batch: MicroBatch, *rest) -> torch.Tensor:
        found = losses(copy, batch, *rest)
        if now.get("step") not in at or not torch.is_grad_enabled():
            return found
        if what == "loss" and copy is now["u"] and not now["done"]:
            now["done"] = True
            return found + torch.where(torch.arange(len(found)) == 0, math.nan, 0.0)
        if what == "gradient" and copy is not now["u"]:
            found.register_hook(lambda gradient: gradient * math.nan)
        return found

    monkeypatch.setattr(train_bilevel, "one_step", counted)
    monkeypatch.setattr(TorchCopy, "losses", spoiled)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_it_stops_says_where_and_goes_on_when_asked(data: Path, tmp_path: Path, monkeypatch, capsys, what: str):
    out, changes = tmp_path / "r", {"save_every": 2, "max_steps": 4}
    spoil(monkeypatch, what)
    assert train_bilevel.main(settings(data, out, **changes)) == 1
    said = capsys.readouterr().out
    assert f"step {AT}: a loss or gradient is not finite" in said
    assert f"the last checkpoint is {out / 'checkpoints' / 'step_000002'}" in said and "skip_nonfinite=1" in said
    (line,) = [line for line in said.splitlines() if "is not finite" in line]
    named = {file: line.count(f"{file}.json: ") for file in ("train_clean", "train_noisy", "val")}
    assert sum(named.values()) == (1 if what == "loss" else 3), said

    assert train_bilevel.main(settings(data, out, skip_nonfinite=1, **changes)) == 0
    said = capsys.readouterr().out
    assert "going on after step 2" in said and "Left out, 1 of 1" in said
    table = pd.read_csv(out / "metrics.csv").set_index("step")
    bad = "loss_u" if what == "loss" else "grad_norm_w"
    assert table[bad].isna().tolist() == [step in (0, AT) for step in table.index]


class Idle:
    """A copy that takes no step."""

    def __init__(self, copy: TorchCopy):
        self.copy = copy

    def __getattr__(self, name: str):
        return getattr(self.copy, name)

    def step(self, lr: float, norm: float) -> None:
        self.copy.discard()


@pytest.mark.slow
def test_a_step_left_out_never_was(data: Path, tmp_path: Path, monkeypatch):
    """x and the parameters are those of a run in which the copies and x did nothing in that step."""
    changes = {"max_steps": 6, "skip_nonfinite": 1, "eval_every": 1}
    with monkeypatch.context() as patch:
        spoil(patch, "gradient")
        left_out = train(data, tmp_path / "a", **changes)
    with monkeypatch.context() as patch:
        step, steps = f2sa.step, iter(range(1, 100))

        def idle(copies, weights, *rest):
            if next(steps) != AT:
                return step(copies, weights, *rest)
            still = {name: Idle(copy) for name, copy in copies.items()}
            return step(still, SourceWeights(weights.source_ids, weights.p, 1.0, "sgd"), *rest)

        patch.setattr(f2sa, "step", idle)
        idled = train(data, tmp_path / "b", **changes)
    names = ["weight/train_noisy", "test_loss_w", "test_loss_u"]
    pd.testing.assert_frame_equal(left_out[names], idled[names], check_exact=True)
    assert left_out["test_loss_w"][AT] == left_out["test_loss_w"][AT - 1] != left_out["test_loss_w"][AT + 1]


def test_only_so_many_are_left_out(data: Path, tmp_path: Path, capsys):
    assert train_bilevel.main(settings(data, tmp_path / "r", lr_y=1e30, save_every=0)) == 1
    assert "there is no checkpoint yet" in capsys.readouterr().out
    assert train_bilevel.main(settings(data, tmp_path / "r", lr_y=1e30, save_every=1, skip_nonfinite=2)) == 1
    said = capsys.readouterr().out
    assert "Left out, 2 of 2" in said and "skip_nonfinite=3" in said and "the last checkpoint is" in said


def test_a_baseline_leaves_steps_out_too(data: Path, tmp_path: Path, capsys):
    """Of six steps of its model all but the first meet parameters that are not finite."""
    changes = {"method": "loss", "score_epochs": 0.5, "lr_y": 1e30, "warmup_ratio": 0}
    assert train_bilevel.main(settings(data, tmp_path / "r", skip_nonfinite=2, **changes)) == 1
    said = capsys.readouterr().out
    assert "step 2 of the model trained on 192 samples: a loss or gradient is not finite" in said
    assert "step 3 of the model" in said and "Left out, 2 of 2" in said and "skip_nonfinite=3" in said
    assert said.count("train_clean.json: ") == 3


def test_what_was_left_out_counts_after_a_resume(data: Path, tmp_path: Path, monkeypatch, capsys):
    """Steps 2 and 4 are bad, one may be left out, and the run was ended in between."""
    spoil(monkeypatch, "loss", at=(2, 4))
    changes = {"max_steps": 5, "skip_nonfinite": 1, "save_every": 0}
    assert train_until(2, settings(data, tmp_path / "r", **changes)) == 143
    assert train_bilevel.main(settings(data, tmp_path / "r", **changes)) == 1
    said = capsys.readouterr().out
    assert "Left out, 1 of 1" in said and "step 4: a loss" in said and "skip_nonfinite=2" in said


# ----------------------------------------------------------------------------------------------------------------------
# a full disk, a late signal, other data


def test_rows_wait_for_a_disk_that_is_full(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture):
    columns = Columns(["a"], per_sample=False, tested=False, noise_known=False, bf16=False)
    rows = MetricsLog(tmp_path, columns, NoTracker())
    rows.write({"step": 0, "weight/a": 0.1 + 0.2})
    real = metrics.Path.open

    def full(path: Path, *args, **kwargs):
        file = real(path, *args, **kwargs)
        if path.name == "metrics.csv":
            os.lseek(file.fileno(), 0, os.SEEK_END)
            os.write(file.fileno(), b"1,half a r")
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Path, "open", full)
        rows.write({"step": 1})
        rows.write({"step": 2})
    rows.write({"step": 3, "weight/a": 1 / 3})
    rows.close()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["0", "1", "2", "3"]
    assert float(table[0]["weight/a"]) == 0.1 + 0.2 and float(table[3]["weight/a"]) == 1 / 3
    assert len(caplog.records) == 1 and "CANNOT BE WRITTEN" in caplog.text


def test_no_room_for_the_results_loses_no_run(data: Path, tmp_path: Path, monkeypatch, capsys):
    out, changes = tmp_path / "r", {"save_every": 1, "max_steps": 2}
    with monkeypatch.context() as patch:

        def full(*args) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("bilevel.run.picture.draw_weights", full)
        assert train_bilevel.main(settings(data, out, **changes)) == 1
    assert "the results cannot be written" in capsys.readouterr().out and not (out / "weights.csv").exists()
    assert train_bilevel.main(settings(data, out, **changes)) == 0
    assert "going on after step 2" in capsys.readouterr().out and (out / "weights.csv").exists()


@pytest.mark.slow
def test_a_signal_does_not_wait_for_an_evaluation(data: Path, tmp_path: Path, monkeypatch):
    """In the middle of one it is left, and made anew by the run that goes on."""
    changes = {"save_every": 0, "eval_every": 2, "max_steps": 4, "micro_batch_tokens": 1024}
    changes |= {"global_batch_size": 4, "val_batch_size": 4}
    real, calls, last = heldout.token_losses, [], math.inf

    def signalled(*args):
        calls.append(args)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(heldout, "token_losses", signalled)
        whole = train(data, tmp_path / "whole", **changes)
        last = len(calls) // 3 + 1  # the first of the second of three evaluations, each of several micro-batches
        calls.clear()
        assert last > 4 and train_bilevel.main(settings(data, tmp_path / "r", **changes)) == 143
    assert len(calls) == last
    (saved,) = (tmp_path / "r" / "checkpoints").iterdir()
    again = train(data, tmp_path / "r", **changes)
    assert saved.name == "step_000002"
    pd.testing.assert_frame_equal(again, whole, check_exact=True)


def test_data_that_has_changed_is_refused(tmp_path: Path, monkeypatch, capsys):
    data, out, changes = make_data(tmp_path / "data"), tmp_path / "r", {"max_steps": 2}
    with monkeypatch.context() as patch:
        one_step = train_bilevel.one_step
        patch.setattr(train_bilevel, "one_step", lambda run: (os.kill(os.getpid(), signal.SIGINT), one_step(run))[1])
        assert train_bilevel.main(settings(data, out, **changes)) == 130
    file = data / "val.json"
    before = file.read_text()
    file.write_text(before.replace("the", "THE"))
    assert train_bilevel.main(settings(data, out, **changes)) == 2
    assert "was made from other data (val val.json)" in capsys.readouterr().err
    file.write_text(before)
    assert train_bilevel.main(settings(data, out, **changes)) == 0


# ----------------------------------------------------------------------------------------------------------------------
# trackers and secrets


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
def test_a_wandb_server_that_hangs_costs_nothing(data: Path, tmp_path: Path, monkeypatch, capsys, silent_server: str):
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(WandbTracker, "PATIENCE", 4)
    waited: list[float] = []
    put = WandbTracker.log
    monkeypatch.setattr(WandbTracker, "log", lambda *args: waited.append(timed(lambda: put(*args))))
    rows = train(data, tmp_path / "r", tracker="wandb")
    said = capsys.readouterr().out
    assert "wandb cannot be reached" in said and "wandb: kept offline" in said, said
    assert len(waited) == len(rows) and statistics.median(waited) < 1e-3
    assert (tmp_path / "r" / "weights.csv").exists() and list((tmp_path / "r").glob("wandb/offline-run-*/*.wandb"))


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_a_resumed_run_is_the_same_run_in_wandb(data: Path, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch:
        one_step = train_bilevel.one_step
        patch.setattr(train_bilevel, "one_step", lambda run: (os.kill(os.getpid(), signal.SIGINT), one_step(run))[1])
        assert train_bilevel.main(settings(data, tmp_path / "r", tracker="wandb", max_steps=2)) == 130
    train(data, tmp_path / "r", tracker="wandb", max_steps=2)
    known = (tmp_path / "r" / "wandb" / "run_id").read_text()
    found = list((tmp_path / "r").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(found) == 2 and {path.stem for path in found} == {f"run-{known}"}


def test_no_secret_is_written(data: Path, tmp_path: Path, monkeypatch, capsys):
    """Tokens in the environment, through a run that stops and goes on: in no file of its folder, nor on the screen."""
    secrets = {
        "WANDB_API_KEY": "5ec7e7" * 6 + "abcd",
        "HF_TOKEN": "hf_5ec7e75ec7e7",
        "HUGGING_FACE_HUB_TOKEN": "hf_old5ec",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(data, tmp_path / "r", tracker="wandb", save_every=1, max_steps=2)
    written = b"".join(path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file())
    said = "".join(capsys.readouterr())
    assert b"safetensors" in written and b"lr_y" in written
    for value in secrets.values():
        assert value.encode() not in written and value not in said
