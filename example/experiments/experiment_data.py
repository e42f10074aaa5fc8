"""Make the data of an experiment's runs from a recipe: how many records, of which tasks, corrupted how.

A recipe has one of two forms. The first shuffles the records by the seed and lets process.py split the first `records`:

    {records: 1200, corruption: words, corruption_rate: 0.3, val_fraction: 0.25, test_fraction: 0.1}

There are two controls: `corruption: none` marks records as noisy without changing them, and `validation: corrupted`
also corrupts the validation records. The second form names every source:

    {train: {train_clean: {records: 400}, train_noisy: {records: 400, bad: 1}}, val: {records: 256, tasks: [plural]}}

The parts take their records one after the other from the shuffled order, so no two parts share a record. `tasks` limits
a part to these kinds of task. The fraction `bad` (default 0) of its records is corrupted by `corruption` (default
empty). Both forms write train_<source>.json, val.json, test.json and mixed/train_mixed.json, as process.py does. The
records are the shipped ones, those of a --source file, or, with `language_pairs: N`, N questions of two_languages.py in
English and in German.
"""

import json
import random
import sys
from pathlib import Path

SHIPPED = Path(__file__).resolve().parents[2] / "data_alpaca_0.5"
sys.path.insert(0, str(SHIPPED))

import process  # noqa: E402  (data_alpaca_0.5/ is a folder of scripts, not a package)
from generator import dataset_files, two_languages  # noqa: E402
from generator.dataset_files import FILES, Record, as_lines, load, sha256  # noqa: E402

PART_KEYS = {"records", "tasks", "bad", "corruption"}
SPLIT_KEYS = {"records", "corruption", "corruption_rate", "val_fraction", "test_fraction", "validation"}

process.CORRUPTIONS["none"] = lambda record, rng, records: record["output"]


def check_recipe(recipe: dict) -> list[str]:
    """Messages about everything that is wrong with a recipe. Reads no data."""
    recipe = {key: value for key, value in recipe.items() if key != "language_pairs"}
    if "train" not in recipe:
        missing = {"records", "corruption", "corruption_rate"} - recipe.keys()
        found = [f"data: no such key {key!r}" for key in recipe.keys() - SPLIT_KEYS]
        return found + [f"data: {key} is missing" for key in sorted(missing)]
    found = [f"data: no such key {key!r}" for key in recipe.keys() - {"train", "val", "test"}]
    if found:
        return found
    parts = recipe["train"] | {key: value for key, value in recipe.items() if key != "train"}
    found += [f"data: {part} is missing" for part in ("val", "test") if part not in recipe]
    for name, part in parts.items():
        found += [f"data, {name}: no such key {key!r}" for key in part.keys() - PART_KEYS]
        if part.get("corruption", "empty") not in process.CORRUPTIONS:
            found.append(f"data, {name}: no such corruption {part['corruption']!r}")
    return found


def bad_shares(recipe: dict) -> dict[str, float]:
    """The fraction of corrupted records in each source."""
    if "train" not in recipe:
        return {"train_clean": 0.0, "train_noisy": 1.0}
    return {name: float(part.get("bad", 0)) for name, part in recipe["train"].items()}


def make(recipe: dict, seed: int, source: Path | None, root: Path) -> Path:
    """The folder with this recipe's data under root, written if it does not exist. Raises process.UserError."""
    records, digest = load(str(source or dataset_files.SHIPPED), root)
    key = json.dumps([recipe, seed, digest], sort_keys=True)
    folder = root / sha256(key.encode())[:12]
    if not (folder / "recipe.json").exists():
        files = build(recipe, seed, records)
        for name, records in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(as_lines(records))
        (folder / "recipe.json").write_text(json.dumps({"seed": seed, "data": recipe}, indent=1))
    return folder


def build(recipe: dict, seed: int, records: list[Record]) -> dict[str, list[Record]]:
    """The records of each file, by file name."""
    records = two_languages.pairs(recipe["language_pairs"], seed) if "language_pairs" in recipe else records[:]
    random.Random(f"{seed} experiment").shuffle(records)
    if "train" in recipe:
        return sources(recipe, seed, records)
    settings = {"seed": seed, "val_fraction": process.VAL_FRACTION, "test_fraction": process.TEST_FRACTION} | recipe
    process.check_settings(settings)
    files = process.build(enough(records, recipe["records"], "data"), settings)[0]
    if recipe.get("validation") == "corrupted":
        files["val.json"] = corrupted(files["val.json"], recipe["corruption"], random.Random(f"{seed} validation"))
    return files


def sources(recipe: dict, seed: int, records: list[Record]) -> dict[str, list[Record]]:
    """The files of a recipe that names its sources. Test and validation records are taken first."""
    parts = {name: recipe[name] for name in ("test", "val")} | recipe["train"]
    files: dict[str, list[Record]] = {}
    taken: set[int] = set()
    for name, part in parts.items():
        tasks = part.get("tasks")
        fitting = [i for i, r in enumerate(records) if i not in taken and (tasks is None or r.get("task") in tasks)]
        chosen = enough(fitting, part["records"], name)
        taken.update(chosen)
        own = [records[i] for i in chosen]
        n_bad = round(part.get("bad", 0) * len(own))
        rng = random.Random(f"{seed} {name}")
        bad = corrupted(own[:n_bad], part.get("corruption", "empty"), rng)
        own = bad + [record | {"is_noisy": False} for record in own[n_bad:]]
        rng.shuffle(own)
        files[f"{name}.json"] = own
    mixed = [record for name in recipe["train"] for record in files[f"{name}.json"]]
    random.Random(f"{seed} mixed").shuffle(mixed)
    return files | {FILES[-1]: mixed}


def corrupted(records: list[Record], kind: str, rng: random.Random) -> list[Record]:
    """The records with corrupted outputs, marked is_noisy."""
    return [r | {"output": process.CORRUPTIONS[kind](r, rng, records), "is_noisy": True} for r in records]


def enough(records: list, n: int, name: str) -> list:
    """The first n records. Raises process.UserError if there are fewer."""
    if len(records) < n:
        raise process.UserError(f"{name}: the recipe wants {n} records, but only {len(records)} are left")
    return records[:n]
