"""run_F2SA.sh from start to end, stopped by a signal and resumed, on a small model of GPT-2's shape."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu.rows import Rows

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"model_type": "gpt2", "vocab_size": 2048, "n_positions": 256, "n_embd": 128, "n_layer": 2, "n_head": 2}
STEPS = 12
BATCH = {"cuda": 32, "cpu": 8}  # on a CPU there is nothing to find, but the script must work


def check(device: str, rows: Rows) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, stopped = Path(folder, "whole"), Path(folder, "stopped")
        code = run(device, whole).wait()
        rows.holds("run_F2SA.sh ends with exit code 0", code == 0)
        for name in ("metrics.csv", "weights.csv", "weights.png", "report.html", "model/model.safetensors"):
            rows.holds(f"it leaves {name}", (whole / name).is_file())
        rows.holds("a run that SIGTERM stops resumes and ends", resumed(device, stopped))
        same = all(
            (whole / name).read_bytes() == (stopped / name).read_bytes() for name in ("metrics.csv", "weights.csv")
        )
        rows.add(
            "metrics.csv and weights.csv of the resumed run",
            "the same bytes" if same else "other bytes",
            "the same",
            same,
        )


def run(device: str, out: Path, **changes: object) -> subprocess.Popen:
    """Start run_F2SA.sh on the shipped data."""
    settings = {
        "model_config": json.dumps(SHAPE),
        "lr_y": 1e-3,
        "global_batch_size": BATCH[device],
        "val_batch_size": BATCH[device],
        "max_steps": STEPS,
        "save_every": 4,
        "eval_every": 6,
        "tracker": "none",
        "rounding_guard": "off",
        "output_dir": out,
        "x_warmup_steps": 0,
    } | changes
    from bilevel.settings.fields import FIELDS  # here: a machine without pydantic leaves these parts out

    if unknown := settings.keys() - FIELDS.keys():  # the launcher takes no notice of other variables
        raise ValueError(f"no settings: {unknown}")
    words = {name: str(value) for name, value in settings.items()}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = (
        os.environ | hidden | {"CONFIG": str(ROOT / "configs" / "tiny.yaml"), "PYTHON": sys.executable} | words
    )
    return subprocess.Popen(["bash", str(ROOT / "run_F2SA.sh")], cwd=ROOT, env=environment)


def resumed(device: str, out: Path, **changes: object) -> bool:
    """Stop a run by SIGTERM after a few steps, and give the same command again."""
    first = run(device, out, **changes)
    while first.poll() is None and rows_of(out / "metrics.csv") < 4:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    if first.wait() == 0:
        print("the signal came too late")
    return run(device, out, **changes).wait() == 0 and (out / "weights.csv").is_file()


def rows_of(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0
