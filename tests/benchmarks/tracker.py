"""Step times beside a wandb server that never answers, against those of a run without a tracker.

    python -m tests.benchmarks.tracker [--pairs 5] [--steps 300]

Each pair runs the script twice, in turns: tracker=none, and tracker=wandb with a key and a local socket that accepts
connections and says nothing. The run goes past the 30 seconds after which it is kept offline. Medians of timing.csv.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]


def run(folder: str, name: str, steps: int, **environment: str) -> pd.Series:
    """Seconds of each step."""
    settings = {"max_steps": steps, "output_dir": f"{folder}/{name}", "save_every": 0, "eval_every": steps}
    settings["tracker"] = "wandb" if environment else "none"
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "train_bilevel.py", "--config", ROOT / "configs" / "tiny.yaml", *flags]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True)
    return pd.read_csv(f"{folder}/{name}/timing.csv")["seconds"].diff().dropna()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    if not (ROOT / "data_alpaca_0.5" / "val.json").exists():
        subprocess.run([sys.executable, ROOT / "data_alpaca_0.5" / "process.py"], check=True)
    ratios = []
    with socket.socket() as server, tempfile.TemporaryDirectory() as folder:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        silent = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "a" * 40}
        for pair in range(given.pairs):
            alone = run(folder, f"none{pair}", given.steps)
            beside = run(folder, f"wandb{pair}", given.steps, **silent)
            ratios.append(beside.median() / alone.median())
            print(f"median step {alone.median():.4f} s alone, {beside.median():.4f} s beside it: {ratios[-1]:.3f}; "
                  f"95% {alone.quantile(0.95):.4f} and {beside.quantile(0.95):.4f} s", flush=True)  # fmt: skip
    print(f"beside / alone: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
