"""Where an export is written: one file, or a new folder with a file for each source. Nothing is ever overwritten."""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from bilevel.errors import UserError, first, plain
from bilevel.export.writers import PACKERS, WRITERS, Records, ending, write


def target(options: argparse.Namespace) -> Path:
    """The place that --out names, or a .jsonl beside the run's folder, if it can be written. Raises UserError."""
    if options.out is None:
        return free(_default(options), "the file")
    if is_folder(options.out):
        return free(Path(options.out), "the folder")
    out = Path(options.out)
    if not any(ending(out)):
        known = f"{', '.join(WRITERS)}, or in one of the texts and {', '.join(PACKERS)}"
        raise UserError(f"--out {plain(str(out), 300)}: the name must end in {known}, or in / for a folder")
    return free(out, "the file")


def is_folder(out: str) -> bool:
    return out.endswith("/")


def _default(options: argparse.Namespace) -> Path:
    """The place beside the run's folder that is named by what was asked for."""
    parts = [("keep", options.keep), ("threshold", options.threshold), ("sample", options.sample)]
    named = [f"{name}{value:g}" if name != "sample" else f"{name}{value}" for name, value in parts if value]
    drawing = (("repeats", options.max_repeats), ("floor", options.floor))
    named += [f"{name}{value:g}" for name, value in drawing if value]
    named += ["from"] * bool(options.pool) + ["tokens"] * (options.shares == "tokens")
    named += ["replacement"] * options.replacement + ["all"] * options.all
    named = (named or ["split"]) + ["marked"] * bool(options.marks) + ["appended"] * bool(options.append)
    named += [f"seed{options.seed}"] * bool(options.seed)
    run = Path(os.path.abspath(options.run))
    return run.parent / ("-".join([run.name, *named]) + ".jsonl")


def free(out: Path, what: str) -> Path:
    """The place, if nothing is there and its folder exists. Raises UserError."""
    name = f"--out {plain(str(out), 300)}"
    try:
        os.lstat(out)
    except FileNotFoundError:
        if out.parent.is_dir():
            return out
        raise UserError(f"{name}: the folder {plain(str(out.parent), 300)} does not exist") from None
    except (OSError, ValueError) as error:  # the name is too long or contains NUL
        raise UserError(f"{name}: {getattr(error, 'strerror', error)}") from None
    raise UserError(f"{name}: {what} exists and is never overwritten; give another name, or move it away")


def check_layouts(found: dict[str, list[str]], out: Path) -> None:
    """Raise UserError if a file would hold records of several layouts, of which training reads only one in a file."""
    if len(found) > 1:
        words = "; ".join(f"{words}: {', '.join(first(names, 3))}" for words, names in found.items())
        folder = plain(str(out.with_suffix("")), 300)
        raise UserError(
            f"--out {plain(str(out), 300)} would hold records of {len(found)} layouts ({words}), but training reads "
            f"one layout in a file; give --out a name that ends in /, such as {folder}/, for a file of each "
            "source"
        )


def write_folder(parts: dict[str, tuple[Callable[[], Records], int]], out: Path) -> None:
    """Write a new folder with a file for each part, by its name; it is complete or absent. Raises UserError.

    parts: for each source, a function that gives its records, and their number.
    """
    try:
        beside = Path(tempfile.mkdtemp(prefix=".", suffix=".new", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    try:
        for name, (records, total) in parts.items():
            write(records(), beside / f"{name.replace('/', '_')}.jsonl", total)
        beside.chmod(0o777 & ~_umask())
        beside.rename(out)  # fails if something but an empty folder has come there
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
