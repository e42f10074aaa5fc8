"""Whether a long run needs more memory with every step: 5,000 steps of a tiny model in six ways of training.

    python -m tests.benchmarks.memory_over_steps [--steps 5000] [--only NAME ...] [--out tests/benchmarks/results]

Each way is a whole run of the script in a process of its own. Every 250 steps, after a garbage collection, it notes the
resident memory, the bytes that the C library has handed out, the number of Python objects, and the bytes of the tensors
among them. Writes memory_over_steps.csv, prints the curves, and then the growth of each per 1,000 steps between step
1,000 and the end, which is the slope of a straight line through the values. The exit code is 1 if a run's bytes in use
grow by more than 20 kB per 1,000 steps.
"""

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from run_helpers import make_data, settings  # noqa: E402

MODEL = {"model_type": "gpt2", "vocab_size": 400, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
RUN = {"model_config": MODEL, "max_length": 32, "global_batch_size": 2, "val_batch_size": 2, "save_every": 0,
       "eval_every": 500}  # fmt: skip
WAYS = {
    "per source": {},
    "per record": {"weights": "sample"},
    "LISA": {"lisa_layers": 1, "lisa_interval": 20, "model_config": MODEL | {"n_layer": 2}},
    "adapters": {"lora_rank": 2, "method": "fixed"},
    "weighted draws": {"weights": "sample", "sampling": "weighted"},
    "checkpoints": {"save_every": 100},
}
EVERY, WARM = 250, 1000  # steps between two measurements, and before the slope
MOST = 20_000  # bytes in use per 1,000 steps
VALUES = ("resident", "in_use", "objects", "tensors")


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                 "keepcost")]  # fmt: skip


def measure() -> dict[str, int]:
    """VALUES of this process now."""
    gc.collect()
    objects = gc.get_objects()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo2
    heap = mallinfo()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in objects if type(t) is torch.Tensor
    }
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    values = (resident, heap.uordblks + heap.hblkhd, len(objects), sum(storages.values()))
    return dict(zip(VALUES, values, strict=True))


def run(way: str, steps: int, out: Path) -> None:
    """Train in this process; a row for each measurement goes to a file."""
    import train_bilevel

    rows, one_step = [], train_bilevel.one_step

    def measured(run: train_bilevel.Run) -> int:
        if run.step and run.step % EVERY == 0:
            rows.append({"way": way, "step": run.step} | measure())
        return one_step(run)

    train_bilevel.one_step = measured
    data = make_data(out.parent / "data", size=24)
    whole = RUN | WAYS[way] | {"max_steps": steps + 1}
    whole["train_data"] = [str(data / ("mixed" if "weights" in whole else "") / "train_*.json")]
    if code := train_bilevel.main(settings(data, out.parent / "run", **whole)):
        raise SystemExit(code)
    pd.DataFrame(rows).to_csv(out, index=False)


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Growth of each value per 1,000 steps after WARM steps."""
    late = table[table["step"] >= WARM]
    return pd.DataFrame(
        {name: {way: np.polyfit(part["step"] / 1000, part[name], 1)[0] for way, part in late.groupby("way", sort=False)}
         for name in VALUES}
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=[*WAYS], metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "benchmarks" / "results")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run(options.only[0], options.steps, options.here)
        return 0
    tables = []
    for way in options.only:
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder) / "memory.csv"
            command = [sys.executable, "-m", "tests.benchmarks.memory_over_steps", "--only", way, "--here", str(here)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            command += ["--steps", str(options.steps)]
            subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
            tables.append(pd.read_csv(here))
            print(tables[-1].to_string(index=False), flush=True)
    table = pd.concat(tables)
    table.to_csv(options.out / "memory_over_steps.csv", index=False)
    growth = slopes(table)
    print("\ngrowth per 1,000 steps (bytes; objects: number)", growth.round(0).to_string(), sep="\n")
    return int((growth["in_use"] > MOST).any())


if __name__ == "__main__":
    sys.exit(main())
