"""Kill a small run at random moments of its whole life, in each phase, and see that the same command ends it as usual.

    python -m tests.benchmarks.kills --out kills.csv                 200 kills, 20 in each phase: about half an hour
    python -m tests.benchmarks.kills --out kills.csv --launched 16   16 more, of train_bilevel.py and run_F2SA.sh

Each attempt is a run of a 0.1M-parameter model in a process of its own, forked from this one so that nothing is
imported again. When it reaches the phase whose turn it is, it is left alone for a random part of that phase and then
gets SIGKILL, SIGTERM, SIGHUP or SIGINT in turn. The same command follows, and metrics.csv, weights.csv and all of
model/ must then have the bytes of a run that nobody disturbed.

The table gets a row per kill: the phase that was aimed at, the phase that was hit, the signal, the exit code, and the
problem if there was one. If the file is there already, its kills count, and the command goes on after them. The exit
code is 1 if there was any problem.
"""

import argparse
import contextlib
import csv
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from run_helpers import ROOT, make_data, settings  # noqa: E402

import train_bilevel  # noqa: E402
from bilevel.data import rows  # noqa: E402
from bilevel.report import command as report  # noqa: E402
from bilevel.run import checkpoint  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
MODEL = {"model_type": "gpt2", "vocab_size": 400, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}
RUN = {"model_config": MODEL, "max_steps": 6, "save_every": 2, "eval_every": 3, "max_length": 96,
       "global_batch_size": 4, "val_batch_size": 4}  # fmt: skip
# Phase -> what is called when it begins.
PHASES: dict[str, tuple[Any, str]] = {
    "reading": (rows, "write_rows"),
    "tokenising": (train_bilevel, "load_samples"),
    "loading": (train_bilevel, "make_copies"),
    "step": (train_bilevel, "one_step"),
    "checkpoint": (checkpoint._Writing, "_write"),
    "evaluation": (train_bilevel, "evaluate"),
    "results": (train_bilevel, "write_results"),
    "report": (report, "write_report"),
}
AIMS = ("first step", *PHASES, "anywhere")  # the first step is the first time that `step` begins
COLUMNS = ("aim", "hit", "signal", "exit", "problem")
EACH = 20  # kills in each phase


def note_phases(log: Path) -> None:
    """From here on, write a line with phase and time when a phase begins and when it ends."""
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
    """The lines of a log: a phase, or `after` and a phase, and when."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(name, float(when)) for name, when in (line.split(",") for line in lines)]


def current(log: Path) -> str:
    """The phase that began last and has not ended; otherwise `before` or `after` a phase."""
    seen = [name for name, _ in phases(log)]
    going = [name for name in seen if name in PHASES]
    for name in seen:
        if name not in PHASES:
            going.remove(name.removeprefix("after "))
    if not going:
        return seen[-1] if seen else "before reading"
    inner = max(going, key=lambda name: len(seen) - seen[::-1].index(name))
    return "first step" if inner == "step" and seen.count("step") == 1 else inner


def start(line: list[str], folder: Path, log: Path, cache: Path) -> int:
    """Fork a run; its process id. What it says, and what it has imported, goes to files beside its folder."""
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
        folder.with_suffix(".imported").write_text("\n".join(sys.modules))
        os._exit(code)
    except SystemExit as stop:  # a signal while the run was loading
        os._exit(stop.code)
    finally:  # an exception, which has no other way to show
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def launch(line: list[str], folder: Path, cache: Path, shell: bool) -> int:
    """Start a run as a user does, in a process group of its own; its process id."""
    command = ["bash", str(ROOT / "run_F2SA.sh")] if shell else [sys.executable, str(ROOT / "train_bilevel.py"), *line]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "CONFIG": line[1], "PYTHON": sys.executable}
    with folder.with_suffix(".said").open("ab") as said:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, start_new_session=True
        ).pid


def end(process: int) -> int:
    """The exit code of a process, negative after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def has_ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The results of a run."""
    found = [folder / "metrics.csv", folder / "weights.csv", *sorted((folder / "model").glob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.exists()}


class Undisturbed:
    """Runs that nobody disturbs: what a run leaves, and when each of its phases begins and ends."""

    def __init__(self, home: Path):
        self.home, self.data, self.folder = home, make_data(home / "data", size=24), home / "whole"
        self.cache = home / "cache"
        self._run(home / "cold", home / "cold.log", home / "cold-cache")
        for name in (home / "cold.imported").read_text().split("\n"):
            with contextlib.suppress(ImportError):  # what a run imports late, and every child would again
                importlib.import_module(name)
        self.spans = {"anywhere": [0.0]}
        cold = self._run(home / "again", home / "again.log", home / "again-cache")
        warm = self._run(self.folder, home / "whole.log", self.cache, home / "again-cache")
        for name in PHASES:
            seen = cold if name in ("reading", "tokenising") else warm
            self.spans[name] = spans(seen, name)
        self.spans["first step"] = self.spans["step"][:1]
        self.spans["step"] = self.spans["step"][1:]
        self.results = bytes_of(self.folder)

    def line(self, folder: Path) -> list[str]:
        return settings(self.data, folder, **RUN)

    def _run(self, folder: Path, log: Path, cache: Path, copied: Path | None = None) -> list[tuple[str, float]]:
        """Run to the end; the phases."""
        if copied:
            shutil.copytree(copied, cache)
        begun = time.monotonic()
        if end(start(self.line(folder), folder, log, cache)):
            raise SystemExit(folder.with_suffix(".said").read_text())
        self.seconds = time.monotonic() - begun
        return phases(log)


def spans(seen: list[tuple[str, float]], phase: str) -> list[float]:
    """The seconds that a phase has taken, each time."""
    return [
        next(t for after, t in seen[i:] if after == f"after {phase}") - begun
        for i, (name, begun) in enumerate(seen)
        if name == phase
    ]


def strike(process: int, log: Path, aim: str, whole: Undisturbed, number: int, draw: random.Random) -> str:
    """Send a signal at a random moment of the phase; returns the phase that it hits."""
    if aim == "anywhere":
        time.sleep(draw.uniform(0.05, whole.seconds))  # a fork needs a moment before it is a run
    else:
        name = "step" if aim == "first step" else aim
        nth = draw.randrange(len(whole.spans[aim]))
        wait = draw.uniform(0, whole.spans[aim][nth])
        before = nth + (aim == "step")
        while [seen for seen, _ in phases(log)].count(name) <= before and not has_ended(process):
            time.sleep(0.002)
        time.sleep(wait)
    reached = "ended" if has_ended(process) else current(log)
    os.kill(process, number)  # to a process that has ended and was not waited for: nothing happens
    return reached


def problems(code: int, again: int, number: int, finished: bool, folder: Path, whole: Undisturbed) -> str:
    """What is wrong after a kill with exit code `code` and the same command with `again`; empty if nothing is."""
    found = [] if code in (0, -number, 128 + number) else [f"exit code {code}"]
    if again != (2 if finished else 0):
        found.append(f"the same command: exit code {again}")
    made = bytes_of(folder)
    if different := [name for name in whole.results | made if whole.results.get(name) != made.get(name)]:
        found.append(f"different: {' '.join(different)}")
    if left := [path.name for path in folder.glob(".*") if path.name.endswith(".new")]:
        found.append(f"left: {' '.join(left)}")
    if b"Traceback" in folder.with_suffix(".said").read_bytes():
        found.append("a traceback")
    return "; ".join(found)


def attempt(home: Path, whole: Undisturbed, aim: str, number: int, draw: random.Random) -> dict[str, Any]:
    """One run that is killed, and the same command; a row of the table."""
    folder, log = home / "r", home / "phases.log"
    cache = home / "cache" if aim in ("reading", "tokenising", "anywhere") else whole.cache
    line = whole.line(folder)
    process = start(line, folder, log, cache)
    hit = strike(process, log, aim, whole, number, draw)
    code = end(process)
    finished = (folder / "weights.csv").exists() and not (folder / "lock").exists()
    again = end(start(line, folder, home / "again.log", cache))
    problem = problems(code, again, number, finished, folder, whole)
    return dict(zip(COLUMNS, (aim, hit, signal.Signals(number).name, code, problem), strict=True))


def launched(home: Path, whole: Undisturbed, shell: bool, seconds: float, number: int, draw: random.Random) -> dict:
    """As `attempt`, of a run in an interpreter of its own, killed at any time within `seconds`."""
    folder, line = home / "r", whole.line(home / "r")
    process = launch(line, folder, whole.cache, shell)
    time.sleep(draw.uniform(0, seconds))
    hit = "ended" if has_ended(process) else "alive"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, number)  # as a terminal or a scheduler does
    code = end(process)
    finished = (folder / "weights.csv").exists() and not (folder / "lock").exists()
    said = folder.with_suffix(".said")
    if b"KeyboardInterrupt" in said.read_bytes():  # before the first line of the program
        said.write_bytes(b"")
    again = end(launch(line, folder, whole.cache, shell))
    problem = problems(code, again, number, finished, folder, whole)
    aim = "run_F2SA.sh" if shell else "train_bilevel.py"
    return dict(zip(COLUMNS, (aim, hit, signal.Signals(number).name, code, problem), strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    """Kills by the phase that was hit and the signal."""
    hits = Counter((row["hit"], row["signal"]) for row in rows)
    names = [number.name for number in SIGNALS]
    order = ["first step", *PHASES]
    found = sorted({hit for hit, _ in hits}, key=lambda hit: (order.index(hit) if hit in order else 99, hit))
    lines = [f"{'hit':20}" + "".join(f"{name:>9}" for name in (*names, "all"))]
    for hit in found:
        counts = [hits[hit, name] for name in names]
        lines.append(f"{hit:20}" + "".join(f"{count:9}" for count in (*counts, sum(counts))))
    bad = [row for row in rows if row["problem"]]
    return "\n".join([*lines, f"{len(rows)} kills, {len(bad)} with a problem", *map(str, bad)])


def next_aim(rows: list[dict[str, Any]], most: int) -> str | None:
    """The phase that has been hit least often; None when there are enough kills, or far too many."""
    hits = Counter(row["hit"] for row in rows)
    aimed = Counter(row["aim"] for row in rows)
    rare = {aim: hits[aim] if aim != "anywhere" else aimed[aim] for aim in AIMS}
    if len(rows) >= most and min(rare.values()) >= EACH or len(rows) >= 2 * most:
        return None
    return min(AIMS, key=lambda aim: (rare[aim], aimed[aim]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="table to write, or to go on with: a row per kill")
    parser.add_argument("--kills", type=int, default=200, help="how many in all, at least (default: 200)")
    parser.add_argument("--launched", type=int, default=0, help="instead, this many runs as a user starts them")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored, and so by children
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        rows = list(csv.DictReader(options.out.open(newline="")))
    done, draw = len(rows), random.Random(len(rows))
    with tempfile.TemporaryDirectory() as temporary, options.out.open("a", newline="") as file:
        home = Path(temporary)
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        whole, seconds = Undisturbed(home), 0.0
        if options.launched:
            begun = time.monotonic()
            end(launch(whole.line(home / "first"), home / "first", whole.cache, shell=True))
            seconds = time.monotonic() - begun
        while len(rows) < done + options.launched if options.launched else (aim := next_aim(rows, options.kills)):
            place = home / str(len(rows))
            place.mkdir()
            if options.launched:
                number = SIGNALS[len(rows) // 2 % len(SIGNALS)]
                row = launched(place, whole, len(rows) % 2 == 0, seconds, number, draw)
            else:
                number = SIGNALS[sum(row["aim"] == aim for row in rows) % len(SIGNALS)]
                row = attempt(place, whole, aim, number, draw)
            rows.append(row)
            writer.writerow(row)
            file.flush()
            print(len(rows), *row.values(), flush=True)
            if row["problem"]:
                print(place.joinpath("r.said").read_text(errors="replace"), flush=True)
            shutil.rmtree(place)
    print(table(rows))
    return int(any(row["problem"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
