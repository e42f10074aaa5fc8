"""How long a start takes: 52,000 records tokenised, cold and cached, --help, mistakes, and the way to the first step.

    python -m tests.benchmarks.start [--records 52000] [--rounds 5] [--out tests/benchmarks/results]

The records are made here, with the lengths of Alpaca (tatsu-lab/alpaca, alpaca_data.json; Taori et al. 2023): LENGTHS
has quantiles of the characters of each field in 4,000 of its records, NO_INPUT the share without input. The fields of a
record hardly correlate there (at most 0.08) and are drawn apart here. The words are made up, as often as those of a
language are: the word of rank r with frequency in proportion to 1 / (r + 2.7). By a byte-level BPE of 8,192 tokens
trained on the data themselves a record has 99 tokens on average, Alpaca's 97.

Loading is the whole of bilevel.data.samples.load_samples (digest, JSON, checks, tokens, tables), cold with an empty
cache. The first step counts from the start of the process to the end of step 1 of configs/tiny.yaml on these records,
without test data and wandb; cold, its tokenizer is trained as well. All takes turns, round after round, each in a new
process. Writes start.csv and start.png, and prints the table that docs/costs.md shows.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[2]
LEVELS = [0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.9, 100]  # percent
LENGTHS = {  # characters
    "instruction": [15, 26, 33, 38, 44, 49, 54, 58, 62, 67, 74, 86, 98, 125, 178, 244],
    "input": [1, 3, 6, 9, 15, 21, 28, 34, 43, 56, 75, 127, 192, 395, 603, 607],
    "output": [0, 3, 12, 25, 46, 73, 120, 198, 288, 383, 483, 617, 747, 1228, 2071, 2297],
}
NO_INPUT = 0.596
WORDS = 80_000  # distinct ones, as 52,000 records of Alpaca have by the growth of theirs (Heaps' law, exponent 0.55)
SHAPE = {"model_type": "gpt2", "vocab_size": 8192}
HELD_OUT = 512  # records of validation and of test
TARGETS = {  # seconds; None: none was set
    "load, cold": 20,
    "load, cached": 3,
    "--help": 3,
    "wrong setting": 3,
    "wrong setting, launcher": 3,
    "missing file": 3,
    "broken record": 3,
    "max_length beyond the model": 3,
    "first step, cold": None,
    "first step, cached": None,
}
LOAD = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
import train_bilevel
from bilevel.data.samples import load_samples
from bilevel.data.sources import file_source
from bilevel.data.tokenise import Tokeniser

train_bilevel.quiet_libraries()
tokeniser = Tokeniser(AutoTokenizer.from_pretrained(sys.argv[1]), 512, "response")
start, cpu = time.perf_counter(), time.process_time()
samples = load_samples([file_source(file) for file in sys.argv[2:]], tokeniser)
print(time.perf_counter() - start, time.process_time() - cpu)
"""
FIRST_STEP = """
import sys, time
import train_bilevel

step = train_bilevel.one_step
def first_step(run):
    step(run)
    print(time.time() - float(sys.argv[1]), time.process_time())
    sys.exit()

train_bilevel.one_step = first_step
train_bilevel.main(sys.argv[2:])
"""


def make_records(n: int, seed: int) -> list[dict[str, str]]:
    """Alpaca records of made-up words."""
    random = np.random.default_rng(seed)
    words = np.array(make_words(random), dtype=object)
    frequency = 1 / (np.arange(1, WORDS + 1) + 2.7)
    lengths = {key: np.interp(random.uniform(0, 100, n), LEVELS, of).round().astype(int) for key, of in LENGTHS.items()}
    lengths["input"][random.random(n) < NO_INPUT] = 0
    needed = sum(of.sum() for of in lengths.values())
    text = " ".join(words[random.choice(WORDS, needed // 4, p=frequency / frequency.sum())])
    records, place = [], 0
    for i in range(n):
        record = {}
        for key, of in lengths.items():
            record[key] = text[place : place + of[i]]
            place += of[i]
        records.append(record)
    assert place <= len(text)
    return records


def make_words(random: np.random.Generator) -> list[str]:
    """WORDS different words of one to four syllables, short ones first."""
    syllables = [a + b + c for a in "bcdfghlmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s")]
    words: dict[str, None] = {}
    while len(words) < WORDS:
        longest = 1 + min(3, int(np.log10(len(words) + 1)))
        words["".join(random.choice(syllables, random.integers(max(1, longest - 1), longest + 1)))] = None
    return list(words)


def make_data(folder: Path, n: int) -> None:
    """Two training files, validation, test, one with a broken record, and a tokenizer trained on the training files."""
    train, held_out = make_records(n, 0), make_records(2 * HELD_OUT, 1)
    files = {
        "train_clean": [record | {"is_noisy": False} for record in train[::2]],
        "train_noisy": [record | {"is_noisy": True} for record in train[1::2]],
        "val": held_out[:HELD_OUT],
        "test": held_out[HELD_OUT:],
        "broken": [*held_out, {"instruction": "no output"}],
    }
    for name, records in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # before datasets is imported
    from bilevel.data.sources import file_source
    from bilevel.model.loading import load_tokenizer
    from bilevel.settings.fields import Settings

    settings = Settings(train_data=["-"], val_data=["-"], model_config=SHAPE)
    tokenizer = load_tokenizer(settings, [file_source(folder / f"train_{kind}.json") for kind in ("clean", "noisy")])
    tokenizer.save_pretrained(folder / "tokenizer")


def timed(command: list[str], cache: Path, code: int = 0) -> tuple[float, float, str]:
    """Seconds, seconds of processors, and what was printed, by a command that must end with this exit code."""
    unset = {"OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "RANK", "WORLD_SIZE"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def one_round(data: Path) -> dict[str, tuple[float, float]]:
    """Seconds and seconds of processors of everything in TARGETS."""
    script = [sys.executable, "train_bilevel.py", "--config", "configs/tiny.yaml"]
    files = [
        "--train_data",
        f"{data}/train_*.json",
        "--val_data",
        f"{data}/val.json",
        "--test_data",
        f"{data}/test.json",
    ]
    load = [LOAD, data / "tokenizer", data / "train_clean.json", data / "train_noisy.json"]
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("load, cold", "load, cached"):
            found[name] = reported([sys.executable, "-c", *map(str, load)], Path(cache))
        mistakes = {
            "--help": ([sys.executable, "train_bilevel.py", "--help"], 0),
            "wrong setting": ([*script, *files, "--lr_z", "1"], 2),
            "wrong setting, launcher": (["bash", "run_F2SA.sh", *files, "--lr_z", "1"], 2),
            "missing file": ([*script, *files, "--val_data", "nowhere.json"], 2),
            "broken record": ([*script, *files, "--test_data", f"{data}/broken.json"], 2),
            "max_length beyond the model": ([*script, *files, "--max_length", "100000"], 2),
        }
        for name, (command, code) in mistakes.items():
            found[name] = timed(command, Path(cache), code)[:2]
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first step, cold", "first step, cached"):
            run = [*script[2:], *files[:4], "--test_data", "[]", "--tracker", "none", "--output_dir", f"{cache}/{name}"]
            found[name] = reported([sys.executable, "-c", FIRST_STEP, str(time.time()), *run], Path(cache))
    return found


def reported(command: list[str], cache: Path) -> tuple[float, float]:
    """The two numbers in the last line that a command prints."""
    seconds, cpu = timed(command, cache)[2].splitlines()[-1].split()
    return float(seconds), float(cpu)


def summarise(rounds: list[dict[str, tuple[float, float]]]) -> pd.DataFrame:
    rows = []
    for name, target in TARGETS.items():
        seconds, cpu = zip(*(found[name] for found in rounds), strict=True)
        row = {"start": name, "target_s": target, "median_s": statistics.median(seconds), "min_s": min(seconds)}
        rows.append(row | {"max_s": max(seconds), "cpu_s": statistics.median(cpu), "rounds": len(rounds)})
    return pd.DataFrame(rows)


def machine() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "datasets"))
    return f"{os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}, {libraries}"


def draw(table: pd.DataFrame, path: Path) -> None:
    """Medians as bars, the range of the rounds as whiskers, targets as marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, places = figure.subplots(), np.arange(len(table))
    spread = [table["median_s"] - table["min_s"], table["max_s"] - table["median_s"]]
    axes.barh(places, table["median_s"], xerr=spread, color="tab:blue", alpha=0.7, ecolor="0.3", capsize=3)
    axes.plot(table["target_s"], places, linestyle="", marker="|", markersize=18, markeredgewidth=2, color="tab:red",
              label="at most")  # fmt: skip
    for place, seconds in zip(places, table["max_s"], strict=True):
        axes.annotate(f"{table['median_s'][place]:.2f} s", (seconds, place), (6, 0), textcoords="offset points",
                      va="center", bbox={"color": "white", "pad": 1})  # fmt: skip
    axes.set_yticks(places, table["start"])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="seconds, median and range", title=f"Start-up, {table['records'][0]:,} records")
    axes.set_xlim(0.02, 4 * table["max_s"].max())
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=150)


def markdown(table: pd.DataFrame) -> str:
    lines = ["| start | seconds, median (range) | processor seconds | at most |", "|---|---|---|---|"]
    for row in table.itertuples():
        at_most = "" if np.isnan(row.target_s) else f"{row.target_s:.0f}"
        seconds = f"{row.median_s:.2f} ({row.min_s:.2f} to {row.max_s:.2f})"
        lines.append(f"| {row.start} | {seconds} | {row.cpu_s:.2f} | {at_most} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=52_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("tests/benchmarks/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), options.records)
        table = summarise([one_round(Path(folder)) for _ in range(options.rounds)])
    table = table.assign(records=options.records, machine=machine(), date=time.strftime("%Y-%m-%d"))
    table.to_csv(options.out / "start.csv", index=False)
    draw(table, options.out / "start.png")
    print(f"{markdown(table)}\n\n{table['machine'][0]}, {table['date'][0]}")


if __name__ == "__main__":
    main()
