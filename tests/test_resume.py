"""Runs in several processes that are killed and go on; minutes, so behind a marker."""

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from run_helpers import ROOT, make_data
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

MODEL = "{model_type: gpt2, vocab_size: 400, n_positions: 256, n_embd: 32, n_layer: 3, n_head: 2}"
STEPS = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def start(folder: Path, data: Path, name: str, stage: int, **changes: str) -> subprocess.Popen:
    """Two processes under ZeRO, with LISA, that save every other step."""
    settings = {"max_steps": str(STEPS), "save_every": "2", "eval_every": "5", "tracker": "none", "upper_every": "3"}
    settings |= {"lisa_layers": "1", "lisa_interval": "3", "rounding_guard": "off", "run_name": name, "NPROC": "2"}
    settings |= {"data_dir": str(data), "zero_stage": str(stage), "OMP_NUM_THREADS": "1"} | changes
    return subprocess.Popen(
        ["bash", str(ROOT / "run_F2SA.sh"), "--model_config", MODEL],
        cwd=folder,
        env={name: os.environ[name] for name in ("PATH", "HOME", "HF_DATASETS_CACHE")} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(running: subprocess.Popen) -> None:
    """kill -9 of the launcher and of its processes, which have sessions of their own."""
    family = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    for process in family:
        process.kill()
    running.communicate()
    psutil.wait_procs(family, timeout=10)


def end(running: subprocess.Popen) -> tuple[int, str]:
    said, _ = running.communicate(timeout=300)
    return running.returncode, said


def rows(folder: Path, name: str) -> int:
    path = folder / "outputs" / name / "metrics.csv"
    return path.read_text().count("\n") if path.exists() else 0


def check_same(folder: Path, one: str, other: str) -> None:
    """Metrics, weights and the model to 1e-6."""
    frames = [pd.read_csv(folder / "outputs" / name / "metrics.csv") for name in (one, other)]
    pd.testing.assert_frame_equal(*frames, rtol=1e-6, atol=0)
    weights = [pd.read_csv(folder / "outputs" / name / "weights.csv")["weight"] for name in (one, other)]
    np.testing.assert_allclose(*weights, rtol=1e-6)
    models = [load_file(folder / "outputs" / name / "model" / "model.safetensors") for name in (one, other)]
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-6, atol=1e-9)


CASES = [
    (2, {"weights": "source"}),
    (2, {"weights": "sample"}),
    (3, {"weights": "source", "dtype": "bf16"}),
    (3, {"weights": "sample"}),
    (1, {"weights": "source", "dtype": "bf16", "lisa_residual": "host"}),
    (0, {"weights": "source"}),
]


@pytest.mark.parametrize(("stage", "changes"), CASES, ids=lambda value: str(value))
def test_two_killed_processes_go_on(data: Path, tmp_path: Path, stage: int, changes: dict[str, str]):
    """kill -9 at two moments; then the same command to the end."""
    code, said = end(start(tmp_path, data, "whole", stage, **changes))
    assert code == 0, said
    for moment in (5, 11):
        running = start(tmp_path, data, "killed", stage, **changes)
        while rows(tmp_path, "killed") <= moment:
            assert running.poll() is None, running.communicate()
            time.sleep(0.02)
        kill(running)
    code, said = end(start(tmp_path, data, "killed", stage, **changes))
    assert code == 0 and "from its checkpoint" in said, said
    check_same(tmp_path, "whole", "killed")


def test_sigterm_to_the_launcher_saves(data: Path, tmp_path: Path):
    """All processes agree on the step; other numbers of processes are refused; the same command goes on."""
    long = {"save_every": "0", "max_steps": "10000"}
    running = start(tmp_path, data, "r", 2, **long)
    while rows(tmp_path, "r") <= 4:
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    running.terminate()
    code, said = end(running)
    (saved,) = (tmp_path / "outputs" / "r" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert code != 0 and f"signal 15: ended after step {step}, saved" in said, said
    assert rows(tmp_path, "r") == 1 + step
    code, said = end(start(tmp_path, data, "r", 2, **long | {"NPROC": "3"}))
    assert code != 0 and "was written by 2 processes and this run has 3" in said, said
