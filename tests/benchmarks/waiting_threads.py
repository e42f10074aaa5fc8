"""How long OpenMP's threads should spin while they wait for each other, on a machine that may have other work.

    python -m tests.benchmarks.waiting_threads [--rounds 20] [--out DIR]

A step of configs/tiny.yaml makes thousands of short products, and after each the threads wait for each other. A thread
that spins notices the end of a wait at once, but holds its core, perhaps against the thread it waits for. Each setting
has a process of its own, which computes forward and backward passes of four blocks of that model's size, in turn with
the others: beside no other work, one and two processes that only compute. Ratios to the default are taken within a
round. Writes waiting_threads.csv, a row per setting and number of busy processes: seconds of a turn, quartiles of the
ratio, processor seconds of a turn, and the machine's load, as other people's work counts as busy processes, too.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd

SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
BUSY = (0, 1, 2)
WORKER = """
import resource, sys, time, torch
wide = lambda: torch.nn.Sequential(
    torch.nn.LayerNorm(128), torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128))
model, x = torch.nn.Sequential(*[wide() for _ in range(4)]), torch.randn(1024, 128)
for _ in sys.stdin:
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(5):
        model(x).square().mean().backward()
    now = resource.getrusage(resource.RUSAGE_SELF)
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    print(time.perf_counter() - start, processor, flush=True)
"""


class Worker:
    """A process with one setting. OpenMP reads the variables when torch is imported there."""

    def __init__(self, variables: dict[str, str]):
        names = {name for setting in SETTINGS.values() for name in setting}
        environment = {name: value for name, value in os.environ.items() if name not in names} | variables
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.turn()  # imports torch and warms up

    def turn(self) -> tuple[float, float]:
        """Seconds by the clock and of the processor."""
        print(file=self.process.stdin, flush=True)
        seconds, processor = self.process.stdout.readline().split()
        return float(seconds), float(processor)


def measured(workers: dict[str, Worker], busy: int, rounds: int) -> pd.DataFrame:
    """A row per setting, beside so many busy processes."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        turns = [{name: worker.turn() for name, worker in workers.items()} for _ in range(rounds)]
    finally:
        for process in others:
            process.kill()
            process.wait()
    rows = []
    for name in workers:
        seconds, processor = zip(*(turn[name] for turn in turns), strict=True)
        low, middle, high = statistics.quantiles((turn[name][0] / turn["default"][0] for turn in turns), n=4)
        row = {"busy": busy, "setting": name, "seconds": statistics.median(seconds), "low": low, "ratio": middle}
        rows.append(row | {"high": high, "processor": statistics.median(processor), "load": os.getloadavg()[0]})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    workers, tables = {name: Worker(variables) for name, variables in SETTINGS.items()}, []
    for busy in BUSY:
        tables.append(measured(workers, busy, options.rounds))
        print(tables[-1].round(3).to_string(index=False), flush=True)
        pd.concat(tables).round(4).to_csv(options.out / "waiting_threads.csv", index=False)
    for worker in workers.values():
        worker.process.stdin.close()
        worker.process.wait()


if __name__ == "__main__":
    main()
