"""What the tests of data_alpaca_0.5 share."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

FOLDER = Path(__file__).resolve().parent.parent / "data_alpaca_0.5"
SHIPPED = FOLDER / "alpaca_synthetic.json"
FILES = ("train_clean.json", "train_noisy.json", "val.json", "test.json", "mixed/train_mixed.json")
CORRUPTIONS = ("empty", "dot", "shuffle", "truncate", "words")
RESPONSES = ["", "Yes", "Paris", "ha ha ha", "one two", "three words\nhere", "a longer answer of six words", "é!"]


def load_program(folder: Path = FOLDER) -> ModuleType:
    """A folder's process.py as it stands, as a module: most tests need no new interpreter."""
    spec = importlib.util.spec_from_file_location("process_under_test", folder / "process.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(folder), *sys.path]), mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "generator"]:
            del sys.modules[name]  # it knows its folder; each folder has its own
        with mock.patch.object(sys, "dont_write_bytecode", True):  # the text may change within a second
            spec.loader.exec_module(module)
    return module


def sample(n: int = 103) -> list[dict]:
    return [
        {"instruction": f"Question {i}", "input": f"text {i}" if i % 2 else "", "output": text, "task": f"t{i % 3}"}
        for i in range(n)
        for text in [RESPONSES[i % len(RESPONSES)] + (f" {i}" if i % 16 > 10 else "")]
    ]


def write_source(folder: Path) -> Path:
    path = folder / "source.json"
    path.write_text(json.dumps(sample()), encoding="utf-8")
    return path


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def keys(rows: list[dict]) -> set[str]:
    return {row["instruction"] for row in rows}


def make(program: ModuleType, source: Path, out: Path, *flags: object) -> dict[str, list[dict]]:
    """Run the program; the records of every file that it left in `out`."""
    assert program.main(["--source", str(source), "--out", str(out), *map(str, flags)]) == 0
    return {name: records(out / name) for name in FILES if (out / name).exists()}


def questions(task: str) -> list[tuple[str, str]]:
    """(instruction and input, output) of all records of a task."""
    found = [(f"{r['instruction']}\n{r['input']}", r["output"]) for r in records(SHIPPED) if r["task"] == task]
    assert len(found) >= 50
    return found


def integers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", text)]
