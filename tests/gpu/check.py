#!/usr/bin/env python
"""Check the project on one GPU in about five minutes; on a CPU the parts that need no GPU run as well.

    python tests/gpu/check.py [--device cuda] [--parts exactness,steps,...] [--out FOLDER] [--minutes 5]
    python tests/gpu/check.py --wheels        which packages to carry to a machine without a network

Each part runs in a process of its own, so that one that crashes or runs out of memory leaves the others alone. A part
says which packages it needs, and is left out, in words, where one of them is missing. FOLDER gets check.json, with all
figures, and check.md, a page to read. Exit code: 0 if no check failed, 1 otherwise.

The machine may lack a network, datasets, deepspeed, bitsandbytes, wandb and flash-attn. pydantic must be there.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CORE = ("torch", "transformers", "pydantic", "yaml", "numpy")


class Part(NamedTuple):
    """One part. packages: what it needs beside CORE; seconds: how long it may take on a GPU."""

    module: str
    seconds: int
    packages: tuple[str, ...] = ()
    gpu: bool = False


RUN = ("datasets", "pandas", "sklearn", "tqdm")  # what a whole run needs
PARTS = {  # the most telling first, if time runs out
    "exactness": Part("gpu.exactness", 60),
    "steps": Part("gpu.steps", 90),
    "packing": Part("gpu.packing", 60),
    "waits": Part("gpu.waits", 60, gpu=True),
    "size": Part("gpu.size", 240, gpu=True),
    "trainer": Part("gpu.trainer", 120, ("accelerate",)),
    "runs": Part("gpu.runs", 180, RUN),
    "zero": Part("gpu.zero", 240, (*RUN, "deepspeed")),
}
SLOWER = 10  # times as long a part may take on a CPU
# What a bare machine with torch, transformers, peft, pandas and scikit-learn may lack, and what it weighs.
WHEELS = {
    "pydantic": "0.5 MB",
    "pydantic-core": "2 MB",
    "annotated-types": "0.02 MB",
    "typing-inspection": "0.02 MB",
    "tqdm": "0.1 MB",
    "pyyaml": "0.8 MB",
}


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.wheels:
        print(wheels())
        return 0
    if options.one is not None:
        return run_one(options.one, options.device, options.result)
    out = options.out or Path(tempfile.mkdtemp(prefix="bilevel-check-"))
    out.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(options.device), "parts": {}}
    end = time.monotonic() + 60 * options.minutes
    for name in options.parts:
        found["parts"][name] = run_part(name, options.device, out, end - time.monotonic())
        (out / "check.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        (out / "check.md").write_text(page(found), encoding="utf-8")
        print(section(name, found["parts"][name]), flush=True)
    print(f"wrote {out / 'check.json'} and check.md")
    return int(any(part["state"] in ("failed", "crashed") for part in found["parts"].values()))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="cuda or cpu; default: cuda if there is a GPU")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder for check.json and check.md; default: a new temporary folder")
    parser.add_argument("--minutes", type=float, default=5.0, help="no part starts after this time; default: 5")
    parser.add_argument("--wheels", action="store_true", help="list the packages to carry along, and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if options.device is None and not options.wheels:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


# ----------------------------------------------------------------------------------------------------------------------
# one part


def missing(name: str, device: str) -> str | None:
    """Why the part cannot run here, in words; None if it can."""
    part = PARTS[name]
    if part.gpu and device == "cpu":
        return "it needs a GPU"
    absent = [package for package in (*CORE, *part.packages) if importlib.util.find_spec(package) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def run_part(name: str, device: str, out: Path, left: float) -> dict[str, Any]:
    """Run a part in a process of its own; returns its state, seconds and rows."""
    if reason := missing(name, device):
        return {"state": "left out", "why": reason}
    if left <= 0:
        return {"state": "left out", "why": "no time was left"}
    result, log = out / f"{name}.json", out / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", name, "--device", device, "--result", str(result)]
    limit = PARTS[name].seconds * (1 if device == "cuda" else SLOWER)
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = f"ended after {limit} s"
    part: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    part["rows"] = json.loads(result.read_text()) if result.exists() else []
    if code != 0:
        return part | {"state": "crashed", "why": f"exit {code}: {log.read_text(errors='replace')[-1500:]}"}
    return part | {"state": "passed" if all(row["ok"] is not False for row in part["rows"]) else "failed"}


def run_one(name: str, device: str, result: Path) -> int:
    """The child: import the part, run it, and write its rows."""
    from gpu.rows import Rows

    rows = Rows(lambda found: result.write_text(json.dumps(found)))
    try:
        importlib.import_module(PARTS[name].module).check(device, rows)
    except Exception:
        traceback.print_exc()
        rows.add("ended with an error", traceback.format_exc(limit=-3), ok=False)
        return 1
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# the machine and the page


def machine(device: str) -> dict[str, str]:
    import torch
    import transformers

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor()}, {os.cpu_count()} cores",
    }
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        found["commit"] = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return found


def section(name: str, part: dict[str, Any]) -> str:
    """A part as Markdown."""
    lines = [f"## {name}: {part['state']}" + (f" ({part['seconds']} s)" if "seconds" in part else ""), ""]
    if "why" in part:
        lines += [part["why"], ""]
    if part.get("rows"):
        lines += ["| what | found | wanted | |", "|---|---|---|---|"]
        words = {True: "ok", False: "**FAILED**", None: ""}
        for row in part["rows"]:
            cells = (row["what"], row["found"], row["wanted"], words[row["ok"]])
            lines.append("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def page(found: dict[str, Any]) -> str:
    head = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return f"# Check on a device\n\n{head}\n\n" + "\n".join(section(*item) for item in found["parts"].items())


def wheels() -> str:
    lines = [f"{name:20}{size:>8}" for name, size in WHEELS.items()]
    command = f"pip download --no-deps --python-version 3.12 --only-binary=:all: -d wheels {' '.join(WHEELS)}"
    return "\n".join([*lines, f"make them here:  {command}", "install there:   pip install --no-index wheels/*.whl"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
