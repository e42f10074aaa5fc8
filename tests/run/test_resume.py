"""Runs that are killed and go on, in one process and in two; minutes, so behind a marker."""

import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from launch_helpers import STEPS, end, kill, start
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def rows(folder: Path, name: str) -> int:
    path = folder / "outputs" / name / "metrics.csv"
    return path.read_text().count("\n") if path.exists() else 0


def check_same(folder: Path, one: str, other: str, rtol: float) -> None:
    """Metrics and weights, and all of the last checkpoint: w, u, x, their moments and sums."""
    runs = [folder / "outputs" / name for name in (one, other)]
    frames = [pd.read_csv(run / "metrics.csv") for run in runs]
    pd.testing.assert_frame_equal(*frames, rtol=rtol, atol=0, check_exact=rtol == 0)
    weights = [pd.read_csv(run / "weights.csv")["weight"] for run in runs]
    np.testing.assert_allclose(*weights, rtol=rtol)
    files = sorted((runs[0] / "checkpoints" / f"step_{STEPS:06d}").glob("rank*.safetensors"))
    assert files
    for file in files:
        mine, theirs = (load_file(run / "checkpoints" / file.parent.name / file.name) for run in runs)
        assert mine.keys() == theirs.keys() and any(name.startswith("copies > u") for name in mine)
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=rtol, atol=1e-9 if rtol else 0)


LISA = {"lisa_layers": "1", "lisa_interval": "3"}
BF16 = {"dtype": "bf16", **LISA}
CASES = [
    (None, {"weights": "source", **LISA}, 5),
    (None, {"weights": "sample"}, 5),
    (2, {"weights": "source"}, 5),
    (2, {"weights": "sample", **LISA}, 5),
    (3, {"weights": "source", **LISA}, 5),
    (3, {"weights": "sample"}, 5),
    (0, {"weights": "source", **LISA}, 2),
    (1, {"weights": "source", "lisa_residual": "host", **BF16}, 2),
    (3, {"weights": "sample", **BF16}, 2),
]


@pytest.mark.parametrize(("stage", "changes", "kills"), CASES, ids=lambda value: str(value))
def test_killed_processes_go_on(data: Path, tmp_path: Path, stage: int | None, changes: dict[str, str], kills: int):
    """kill -9 at random moments, every other one in the middle of writing a checkpoint; then the same command."""
    code, said = end(start(tmp_path, data, "whole", stage, **changes))
    assert code == 0, said
    draw = random.Random(f"{stage} {changes}")
    for number in range(kills):
        target = 2 + (STEPS - 8) * number // kills + draw.randrange(4)
        running = start(tmp_path, data, "killed", stage, **changes)
        checkpoints = tmp_path / "outputs" / "killed" / "checkpoints"
        while rows(tmp_path, "killed") <= target or (number % 2 and not list(checkpoints.glob("*.partial"))):
            assert running.poll() is None, running.communicate()
            time.sleep(0.001)
        time.sleep(0 if number % 2 else draw.uniform(0, 0.1))
        kill(running)
    code, said = end(start(tmp_path, data, "killed", stage, **changes))
    assert code == 0 and "from its checkpoint" in said, said
    check_same(tmp_path, "whole", "killed", rtol=0 if stage is None else 1e-6)


def test_sigterm_to_the_launcher_saves(data: Path, tmp_path: Path):
    """All processes agree on the step; other numbers of processes are refused; the same command goes on."""
    long = {"save_every": "0", "max_steps": "10000"}
    running = start(tmp_path, data, "r", 2, **long)
    while rows(tmp_path, "r") <= 4:
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    running.terminate()
    before = time.monotonic()
    code, said = end(running)
    assert time.monotonic() - before < 12
    (saved,) = (tmp_path / "outputs" / "r" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert code == 143 and "Traceback" not in said and f"signal 15: ended after step {step}, saved" in said, said
    assert rows(tmp_path, "r") == 1 + step
    code, said = end(start(tmp_path, data, "r", 2, **long | {"NPROC": "3"}))
    assert code != 0 and "was written by 2 processes and this run has 3" in said, said


def test_a_dead_process_ends_the_others(data: Path, tmp_path: Path):
    """kill -9 of one of two: the launcher ends with an error, nothing stays behind, and the same command goes on."""
    running = start(tmp_path, data, "r", 2)
    while rows(tmp_path, "r") <= 6:
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    family = psutil.Process(running.pid).children(recursive=True)
    workers = [process for process in family if any("train_bilevel.py" in word for word in process.cmdline()[:4])]
    assert len(workers) == 2
    workers[1].kill()
    code, said = end(running)
    assert code not in (0, 143) and not psutil.wait_procs(family, timeout=20)[1], said
    code, said = end(start(tmp_path, data, "r", 2))
    assert code == 0 and "from its checkpoint" in said, said
