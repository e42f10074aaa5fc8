"""Wall time and memory of reading large JSON Lines files: one process and one per processor, and a file of gigabytes.

    python -m tests.benchmarks.large [--records 1000000] [--rounds 3] [--gigabytes 20]

The records are those of tests.benchmarks.start. Each reading is bilevel.data.samples.load_samples in a process of its
own with an empty cache: digest, JSON, checks, tokens and tables. One process has all processors for its tokenizer's
threads; it takes turns with one process per processor. The file of so many gigabytes has records of 20 KB, of which
1,000 are drawn (FILE#1000), so that all is read and little is tokenised; 0 leaves it out. It is removed at the end.

Memory is what the processes together hold for themselves (Pss_Anon of /proc), in addition to what the first one held
before it read. It is looked up every two seconds; more often, it would slow the reading. Prints a line for each
reading, then the medians and ranges.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.start import make_records

ROOT = Path(__file__).parents[2]
READ = """
import sys, time
from transformers import AutoTokenizer
import train_bilevel
from bilevel.data import workers
from bilevel.data.samples import load_samples
from bilevel.data.sources import find_sources
from bilevel.data.tokenise import Tokeniser

train_bilevel.quiet_libraries()
if sys.argv[2] == "1":
    workers.MOST = 1
tokeniser = Tokeniser(AutoTokenizer.from_pretrained(sys.argv[1]), 512, "response")
(source,) = find_sources([sys.argv[3]])
print("ready", flush=True)
input()
start = time.perf_counter()
samples = load_samples([source], tokeniser)
print(time.perf_counter() - start, len(samples), flush=True)
"""
INTERVAL = 2  # seconds
UNIT = 50_000  # different records; a larger file repeats them, each with its number


def write(path: Path, records: int, characters: int = 0) -> None:
    """A file of so many records; characters: fill each response up to so many."""
    unit = make_records(min(records, UNIT), 0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(records):
            record = dict(unit[number % len(unit)], number=number)
            record["output"] += " more" * ((characters - len(record["output"])) // 5)
            file.write(json.dumps(record) + "\n")


def tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 8,192 tokens, trained on records of this kind."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = (record["instruction"] + record["output"] for record in make_records(20_000, 1))
    bpe.train_from_iterator(texts, vocab_size=8192, special_tokens=["<|endoftext|>"], show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    made.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def own_bytes(process: int) -> int:
    """Bytes that a process and those it has started hold for themselves."""
    total = 0
    for child in Path(f"/proc/{process}/task").glob("*/children"):
        total += sum(own_bytes(int(number)) for number in child.read_text().split())
    found = [line for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines() if "Pss_Anon" in line]
    return total + 1024 * int(found[0].split()[1])


def read(made: Path, processes: str, name: str) -> tuple[float, float, int]:
    """Seconds, peak bytes in addition to those before, and records, of one reading."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "TMPDIR": cache}
        child = subprocess.Popen(
            [sys.executable, "-c", READ, str(made), processes, name],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout.readline() == "ready\n"
        before = peak = own_bytes(child.pid)
        print(file=child.stdin, flush=True)
        while child.poll() is None:
            with contextlib.suppress(OSError, IndexError):  # a process has just ended
                peak = max(peak, own_bytes(child.pid))
            time.sleep(INTERVAL)
        assert child.returncode == 0
        seconds, records = child.stdout.read().split()[-2:]
    return float(seconds), peak - before, int(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made, path = tokenizer(Path(folder)), Path(folder, "records.jsonl")
        write(path, options.records)
        print(f"{options.records:,} records, {path.stat().st_size / 1e6:.0f} MB", flush=True)
        found: dict[str, list[tuple[float, float, int]]] = {"one process": [], "one per processor": []}
        for _ in range(options.rounds):
            for name, processes in (("one process", "1"), ("one per processor", "all")):
                found[name].append(read(made, processes, str(path)))
                seconds, peak, records = found[name][-1]
                print(f"{name}: {seconds:.1f} s, {peak / 1e6:.0f} MB, {records:,} records", flush=True)
        for name, rows in found.items():
            seconds, peaks, _ = zip(*rows, strict=True)
            print(f"{name}: {spread(seconds)} s, {spread([peak / 1e6 for peak in peaks])} MB")
        print("ratio:", spread([b[0] / a[0] for a, b in zip(*found.values(), strict=True)]))
        if options.gigabytes:
            path.unlink()
            count = int(options.gigabytes * 1e9 / 20_000)
            write(path, count, 19_500)
            seconds, peak, records = read(made, "all", f"{path}#{min(1000, count)}")
            size = path.stat().st_size / 1e9
            print(f"{size:.1f} GB, {records:,} records drawn: {seconds:.0f} s, {peak / 1e6:.0f} MB")


def spread(values: "list[float] | tuple[float, ...]") -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
