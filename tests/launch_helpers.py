"""Start the launcher on a small run, kill it with all its processes, or wait for its end."""

import os
import subprocess
from pathlib import Path

import psutil
from run_helpers import ROOT

MODEL = "{model_type: gpt2, vocab_size: 400, n_positions: 256, n_embd: 32, n_layer: 3, n_head: 2}"
STEPS = 40


def start(folder: Path, data: Path, name: str, stage: int | None, **changes: str) -> subprocess.Popen:
    """Two processes under ZeRO, or with no stage one of plain torch, that save every other step."""
    settings = {"max_steps": str(STEPS), "save_every": "2", "eval_every": "5", "tracker": "none", "upper_every": "3"}
    settings |= {"rounding_guard": "off", "run_name": name, "data_dir": str(data), "OMP_NUM_THREADS": "1"}
    settings |= {"NPROC": "1"} if stage is None else {"NPROC": "2", "zero_stage": str(stage)}
    return subprocess.Popen(
        ["bash", str(ROOT / "run_F2SA.sh"), "--model_config", MODEL],
        cwd=folder,
        env={name: os.environ[name] for name in ("PATH", "HOME", "HF_DATASETS_CACHE")} | settings | changes,
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
