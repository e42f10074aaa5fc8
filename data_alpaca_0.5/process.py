"""Split an Alpaca-format dataset into train, validation and test, and corrupt a part of the training records.

    python process.py                                   the shipped dataset, with the constants below
    python process.py --corruption_rate 0.3 --corruption shuffle
    python process.py --source tatsu-lab/alpaca --out ~/alpaca        a dataset from the hub, into another folder

It writes into its own folder, or into the folder --out:

    train_clean.json        unchanged training records                   "is_noisy": false
    train_noisy.json        training records with a corrupted response   "is_noisy": true
    val.json, test.json     never corrupted
    mixed/train_mixed.json  both kinds of training records, shuffled
    process.json            how the files were made, and their checksums

The split depends only on the seed and the fractions, not on the rate or kind of corruption. Records that are corrupted
at a low rate are also corrupted at every higher rate. A file without records is not written.
"""

CORRUPTION_RATE = 0.5  # fraction of the training records to corrupt, 0 to 1
CORRUPTION = "empty"  # how: empty, dot, shuffle, truncate or words
VAL_FRACTION = 0.1  # fraction of all records
TEST_FRACTION = 0.1  # fraction of all records
SEED = 0

# ruff: noqa: E402  (the constants come before the imports, because users edit them)
import argparse
import json
import random
import sys
from pathlib import Path

from generator.dataset_files import (
    FILES,
    HERE,
    MADE_BY,
    MANIFEST,
    SHIPPED,
    Record,
    UserError,
    as_lines,
    check_out,
    load,
    read_manifest,
    sha256,
    write,
)

# Corruptions: each function returns the response that replaces record["output"].


def empty(record: Record, rng: random.Random, records: list[Record]) -> str:
    """An empty response."""
    return ""


def dot(record: Record, rng: random.Random, records: list[Record]) -> str:
    """A single full stop."""
    return "."


def shuffle(record: Record, rng: random.Random, records: list[Record]) -> str:
    """The response of another training record, one with a different text if possible."""
    start = rng.randrange(len(records))
    rotated = (records[(start + i) % len(records)]["output"] for i in range(len(records)))
    return next((text for text in rotated if text != record["output"]), record["output"])


def truncate(record: Record, rng: random.Random, records: list[Record]) -> str:
    """The beginning of the response, cut at a random point; at least one character if it has two or more."""
    length = len(record["output"])
    return record["output"][: rng.randrange(1, length) if length > 1 else 0]


def words(record: Record, rng: random.Random, records: list[Record]) -> str:
    """The words of the response in another order."""
    before = record["output"].split()
    if len(set(before)) < 2:
        return record["output"]
    after = before[:]
    while after == before:
        rng.shuffle(after)
    return " ".join(after)


CORRUPTIONS = {f.__name__: f for f in (empty, dot, shuffle, truncate, words)}


# Settings: the constants above, overridden by flags.


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", help="a .json or .jsonl file, or a dataset id of the hub (default: the shipped dataset)"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="output folder (default: the folder of this file)")
    parser.add_argument(
        "--corruption_rate",
        type=float,
        help=f"fraction of the training records to corrupt, 0 to 1 (default: {CORRUPTION_RATE})",
    )
    parser.add_argument("--corruption", help=f"how: {', '.join(CORRUPTIONS)} (default: {CORRUPTION})")
    parser.add_argument("--val_fraction", type=float, help=f"fraction of all records (default: {VAL_FRACTION})")
    parser.add_argument("--test_fraction", type=float, help=f"fraction of all records (default: {TEST_FRACTION})")
    parser.add_argument("--seed", type=int, help=f"seed of all random choices (default: {SEED})")
    parser.add_argument("--if-needed", action="store_true", help="do nothing if the files are up to date")
    parser.add_argument("--force", action="store_true", help="also replace files that this program did not write")
    return parser.parse_args(argv)


def read_settings(args: argparse.Namespace) -> tuple[dict[str, object], list[str]]:
    """All settings, and the names of those that were given as flags."""
    settings = {
        "corruption_rate": CORRUPTION_RATE,
        "corruption": CORRUPTION,
        "val_fraction": VAL_FRACTION,
        "test_fraction": TEST_FRACTION,
        "seed": SEED,
        "source": SHIPPED,
    }
    flags = {name: value for name, value in vars(args).items() if name in settings and value is not None}
    if "source" in flags and Path(flags["source"]).exists():
        flags["source"] = str(Path(flags["source"]).resolve())
    return settings | flags, sorted(flags)


def check_settings(settings: dict[str, object]) -> None:
    """Raise UserError with everything that is wrong."""
    problems = []
    for name in ("corruption_rate", "val_fraction", "test_fraction"):
        value = settings[name]
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            problems.append(f"{name} must be a number between 0 and 1, not {value!r}")
    if not problems and settings["val_fraction"] + settings["test_fraction"] >= 1:
        problems.append("val_fraction + test_fraction must be below 1, to leave training records")
    if not isinstance(settings["seed"], int):
        problems.append(f"seed must be a whole number, not {settings['seed']!r}")
    if settings["corruption"] not in CORRUPTIONS:
        problems.append(f"unknown corruption {settings['corruption']!r}; known: {', '.join(CORRUPTIONS)}")
    if problems:
        raise UserError("; ".join(problems))


# Splitting


def build(records: list[Record], settings: dict[str, object]) -> tuple[dict[str, list[Record]], int]:
    """The records of each file, and the number of responses that the corruption could not change.

    Each random choice has its own generator, so it does not depend on the others.
    """
    seed, kind = settings["seed"], settings["corruption"]
    records = records[:]
    random.Random(f"{seed} split").shuffle(records)
    n_val = round(len(records) * settings["val_fraction"])
    n_test = round(len(records) * settings["test_fraction"])
    train = records[n_val + n_test :]
    if not train:
        raise UserError(f"val_fraction and test_fraction leave none of the {len(records)} records for training")
    n_noisy = round(len(train) * settings["corruption_rate"])
    rng = random.Random(f"{seed} {kind}")
    noisy = [record | {"output": CORRUPTIONS[kind](record, rng, train), "is_noisy": True} for record in train[:n_noisy]]
    clean = [record | {"is_noisy": False} for record in train[n_noisy:]]
    mixed = noisy + clean
    random.Random(f"{seed} mixed").shuffle(mixed)
    parts = (clean, noisy, records[:n_val], records[n_val : n_val + n_test], mixed)
    unchanged = sum(new["output"] == old["output"] for new, old in zip(noisy, train, strict=False))
    return {name: part for name, part in zip(FILES, parts, strict=True) if part}, unchanged


def process(args: argparse.Namespace) -> None:
    out, manifest = args.out, read_manifest(args.out)
    settings, flags = read_settings(args)
    complete = bool(manifest) and all((out / name).is_file() for name in manifest["files"])
    if args.if_needed and not manifest and (any(out.glob("train_*.json")) or (out / FILES[-1]).exists()):
        return  # these are files of the user
    if args.if_needed and not flags and manifest and manifest["from_flags"]:
        if complete:
            return
        settings, flags = manifest["settings"], manifest["from_flags"]
    check_settings(settings)
    records, digest = load(settings["source"], out)
    source = {"name": settings["source"], "sha256": digest, "records": len(records)}
    if args.if_needed and complete and manifest["settings"] == settings and manifest["source"] == source:
        return
    parts, unchanged = build(records, settings)
    contents = {name: as_lines(part) for name, part in parts.items()}
    check_out(out, manifest, contents, args.force)
    manifest = {
        "made_by": MADE_BY,
        "settings": settings,
        "from_flags": flags,
        "source": source,
        "unchanged_by_corruption": unchanged,
        "counts": {name: len(part) for name, part in parts.items()},
        "files": {name: sha256(content) for name, content in contents.items()},
    }
    write(out, contents | {MANIFEST: json.dumps(manifest, indent=1).encode() + b"\n"})
    print(f"{out}: {len(records)} records from {settings['source']}")
    for name, part in parts.items():
        print(f"  {name:23}{len(part):8}")
    if unchanged:
        print(
            f"  {unchanged} responses in {FILES[1]} are unchanged, because {settings['corruption']} cannot change them"
        )


def main(argv: list[str] | None = None) -> int:
    try:
        process(parse_arguments(argv))
    except (UserError, OSError) as error:
        print(f"process.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
