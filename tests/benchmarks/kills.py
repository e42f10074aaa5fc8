"""Kill a small run at random moments of its whole life, in each phase, and see that the same command ends it as usual.

    python tests/benchmarks/kills.py --kills 200 --out kills.csv

Each attempt is a run of a 0.1M-parameter model in a process of its own, forked from this one so that nothing is
imported again. When it reaches the phase whose turn it is, it is left alone for a random part of that phase and then
gets SIGKILL, SIGTERM, SIGHUP or SIGINT in turn. The same command follows, and metrics.csv, weights.csv and all of
model/ must then have the bytes of a run that nobody disturbed. A row per kill goes to the table: the phase that the run
was in, the signal, its exit code, and the problem if there was one. The exit code is 1 if there was any.
"""

import argparse
import csv
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from run_helpers import make_data, settings  # noqa: E402

import train_bilevel  # noqa: E402
from bilevel.data import records  # noqa: E402
from bilevel.report import command as report  # noqa: E402
from bilevel.run import checkpoint  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
MODEL = {"model_type": "gpt2", "vocab_size": 400, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}
RUN = {"model_config": MODEL, "max_steps": 12, "save_every": 4, "eval_every": 3}
# Phase -> what is called when it begins.
PHASES: dict[str, tuple[Any, str]] = {
    "reading": (records, "_write_rows"),
    "tokenising": (train_bilevel, "load_samples"),
    "loading": (train_bilevel, "make_copies"),
    "first step": (train_bilevel, "one_step"),
    "checkpoint": (checkpoint._Writing, "_write"),
    "evaluation": (train_bilevel, "evaluate"),
    "results": (train_bilevel, "write_results"),
    "report": (report, "write_report"),
}


def note_phases(log: Path) -> None:
    """From here on, a line with phase and time when a phase begins and when it ends."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(name: str, call: Callable) -> Callable:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            os.write(file, f"{name},{time.monotonic()}\n".encode())
            try:
                return call(*args, **kwargs)
            finally:
                os.write(file, f"after {name},{time.monotonic()}\n".encode())

        return replaced

    for name, (owner, attribute) in PHASES.items():
        setattr(owner, attribute, noted(name, getattr(owner, attribute)))


def phases(log: Path) -> list[tuple[str, float]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [(name, float(when)) for name, when in (line.split(",") for line in lines)]


def start(line: list[str], folder: Path, log: Path, cache: Path) -> int:
    """Fork a run; its process id. What it says goes to a file beside its folder."""
    if child := os.fork():
        return child
    try:
        os.environ["HF_DATASETS_CACHE"] = str(cache)
        said = os.open(folder.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        note_phases(log)
        code = train_bilevel.main(line)
        sys.stdout.flush()
        os._exit(code)
    finally:  # an exception, which has no other way to show
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def end(process: int) -> int:
    """The exit code of a process, negative after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def strike(process: int, log: Path, phase: str, nth: int, wait: float, number: int) -> str:
    """Send a signal when the phase begins for the nth time and `wait` seconds are over; the phase that it hits."""
    while [name for name, _ in phases(log)].count(phase) <= nth:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return "ended before"
        time.sleep(0.001)
    time.sleep(wait)
    reached = phases(log)[-1][0]
    os.kill(process, number)  # of a process that has ended and was not waited for: nothing happens
    return reached


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The results of a run."""
    found = [folder / "metrics.csv", folder / "weights.csv", *sorted((folder / "model").glob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.exists()}


def attempt(home: Path, data: Path, whole: Path, spans: dict[str, list[float]], phase: str, number: int, draw) -> dict:
    """One run that is killed, and the same command; a row of the table."""
    folder, log = home / "r", home / "phases.log"
    cache = home / "cache" if phase in ("reading", "tokenising") else whole.parent / "cache"
    line = settings(data, folder, **RUN)
    process = start(line, folder, log, cache)
    nth = draw.randrange(len(spans[phase]))
    hit = strike(process, log, phase, nth, draw.uniform(0, spans[phase][nth]), number)
    code = end(process)
    problem = "" if code in (0, -number, 128 + number) else f"exit code {code}"
    finished = (folder / "weights.csv").exists() and not (folder / "lock").exists()
    log.unlink(missing_ok=True)
    again = 2 if finished else 0
    if (found := end(start(line, folder, log, cache))) != again:
        problem += f" then {found} and not {again}"
    expected, made = bytes_of(whole), bytes_of(folder)
    if different := [name for name in expected | made if expected.get(name) != made.get(name)]:
        problem += f" different: {', '.join(different)}"
    if b"Traceback" in folder.with_suffix(".said").read_bytes():
        problem += " a traceback"
    return {"phase": phase, "hit": hit, "signal": signal.Signals(number).name, "exit": code, "problem": problem.strip()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=16, help="how many in all (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="table to write: a row per kill")
    options = parser.parse_args()
    draw, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        data, whole, log = make_data(home / "data", size=48), home / "whole", home / "whole.log"
        if end(start(settings(data, whole, **RUN), whole, log, home / "cache")):
            raise SystemExit(whole.with_suffix(".said").read_text())
        reached = phases(log)
        spans: dict[str, list[float]] = {name: [] for name in PHASES}
        for i, (name, begun) in enumerate(reached):
            if name in PHASES:
                spans[name].append(next(t for after, t in reached[i:] if after == f"after {name}") - begun)
        for number, phase in zip(range(options.kills), itertools.cycle(PHASES), strict=False):
            place = home / str(number)
            place.mkdir()
            how = SIGNALS[number // len(PHASES) % len(SIGNALS)]
            rows.append(attempt(place, data, whole, spans, phase, how, draw))
            print(number, rows[-1], flush=True)
            if not rows[-1]["problem"]:
                shutil.rmtree(place)
    hits = Counter(row["hit"] for row in rows)
    print("hit: " + ", ".join(f"{name} {count}" for name, count in hits.most_common()))
    bad = [row for row in rows if row["problem"]]
    print(f"{len(rows)} kills, {len(bad)} with a problem")
    if options.out:
        with options.out.open("x", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
