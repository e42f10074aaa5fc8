"""Cleaned data from a finished run: its training records chosen by their weights, or all with their weight.

    python -m bilevel.export RUN [--keep SHARE | --threshold T | --sample N [--replacement] | --all] [--out FILE]

Records stand in the order of the files and of their places in them, and are not touched: to JSON and JSON Lines goes a
record's own text. README.md says which records each option takes.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from bilevel.errors import UserError, plain, short
from bilevel.export.selection import DROP, at_least, draw, heaviest, read_marks
from bilevel.files import whole_file
from bilevel.run.finished import FinishedRun, read_finished
from bilevel.weights.two_groups import split

Records = Iterator[tuple[dict[str, Any], str]]  # each with its text

_LINE_BREAK = re.compile(r"[\r\n]+")
ROWS = 1000  # of a table that Parquet's types are found in


# ----------------------------------------------------------------------------------------------------------------------
# the command line


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 the user's mistake, with nothing written."""
    options = _options(argv)
    try:
        export(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bilevel.export", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--keep", metavar="SHARE", type=_number(0, 1), help="the share of largest weights, such as 0.5")
    choice.add_argument("--threshold", metavar="T", type=_number(0, math.inf), help="weights c (mean 1) of T and more")
    choice.add_argument("--sample", metavar="N", type=_whole(1), help="N records drawn in proportion to the weights")
    choice.add_argument("--all", action="store_true", help="every record, with its weight in a field of its own")
    parser.add_argument("--replacement", action="store_true", help="with --sample: a record can be drawn again")
    parser.add_argument("--weight_field", metavar="NAME", help="with --all: name of that field [weight]")
    parser.add_argument("--marks", metavar="FILE", help="marks saved from report.html: keep is always in, drop never")
    parser.add_argument("--seed", metavar="N", type=_whole(0), default=0, help="of what chance decides [0]")
    parser.add_argument(
        "--out", metavar="FILE", help=".jsonl, .json or .parquet; never overwritten [.jsonl beside the run's folder]"
    )
    options = parser.parse_args(argv)
    if options.replacement and options.sample is None:
        parser.error("--replacement is for --sample")
    if options.weight_field is not None and not options.all:
        parser.error("--weight_field is for --all")
    return options


def _number(above: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not above < value <= most or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not above {above:g}" + f" and at most {most:g}" * (most == 1))
        return value

    return number


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    return whole


# ----------------------------------------------------------------------------------------------------------------------
# the way through


def export(options: argparse.Namespace) -> None:
    """Choose, write, and say what was chosen. Raises UserError, with nothing written."""
    from bilevel.export.quality import look

    out = _target(options)
    run = read_finished(options.run)
    marks = read_marks(options.marks, run)
    counts, words = choose(run, marks, options)
    if not counts.any():
        raise UserError(f"nothing is selected: {words}")
    field = (options.weight_field or "weight") if options.all else None
    write(chosen(run, counts, field), out, int(counts.sum()))
    print(words)
    print(table(run, counts))
    quality = look(run, counts > 0)
    print(f"among them: {quality.repeated:,} equal to an earlier one but for white space and case; responses without a "
          f"letter or digit: {quality.empty:,}, with one or two: {quality.near_empty:,}")  # fmt: skip
    print(f"wrote {out}: {counts.sum():,} records")


def _target(options: argparse.Namespace) -> Path:
    """Where to write. Raises UserError."""
    if options.out is None:
        parts = [("keep", options.keep), ("threshold", options.threshold), ("sample", options.sample)]
        named = [f"{name}{value:g}" if name != "sample" else f"{name}{value}" for name, value in parts if value]
        named += ["replacement"] * options.replacement + ["all"] * options.all
        named = (named or ["split"]) + ["marked"] * bool(options.marks) + [f"seed{options.seed}"] * bool(options.seed)
        run = Path(os.path.abspath(options.run))
        out = run.parent / ("-".join([run.name, *named]) + ".jsonl")
    else:
        out = Path(options.out)
    if out.suffix not in WRITERS:
        raise UserError(f"--out {plain(str(out), 300)}: it must end in {', '.join(WRITERS)}")
    name = f"--out {plain(str(out), 300)}"
    try:
        os.lstat(out)
    except FileNotFoundError:
        if out.parent.is_dir():
            return out
        raise UserError(f"{name}: there is no folder {plain(str(out.parent), 300)}") from None
    except (OSError, ValueError) as error:  # a name that is too long, a NUL in it
        raise UserError(f"{name}: {getattr(error, 'strerror', error)}") from None
    raise UserError(f"{name}: it is there already and is never overwritten; give another, or move it away")


def choose(run: FinishedRun, marks: np.ndarray, options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """How often each record (N,) is written, and why in words. Raises UserError."""
    c = np.concatenate(run.weights)
    if options.all:
        return (marks != DROP).astype(np.int64), "every record, with its weight"
    if options.keep is not None:
        return heaviest(c, marks, options.keep, options.seed), f"the share {options.keep:g} of largest weights"
    if options.threshold is not None:
        return at_least(c, marks, options.threshold), f"weights c of {options.threshold:g} and more"
    if options.sample is not None:
        counts = draw(c, marks, options.sample, options.replacement, options.seed)
        how = "with" if options.replacement else "without"
        return counts, f"{options.sample:,} records drawn in proportion to the weights, {how} replacement"
    logarithm = run.settings.x_map == "softmax" or not run.per_sample
    found = split(c[~np.isnan(c)], logarithm, few=not run.per_sample)
    if found is None:
        raise UserError(f"all weights of {run.folder} are equal, which suggests no threshold; give --keep or --sample")
    groups = zip(("below", "from there on"), found.sizes, found.means, strict=True)
    words = f"two-means on {'log c' if logarithm else 'c'} suggests the threshold {found.threshold:.4g}: " + ", ".join(
        f"{size:,} records {where} (mean weight {mean:.4g})" for where, size, mean in groups
    )
    doubt = "" if found.convincing else "WARNING, not two separate groups, look at the records before you trust it: "
    return at_least(c, marks, found.threshold), f"{words}\n{doubt}{found.reason}"


def table(run: FinishedRun, counts: np.ndarray) -> str:
    """Of each source: its records, those that were kept, and the mean weights of these and of the others."""
    import pandas as pd

    rows, ends = [], np.cumsum([file.records for file in run.train])[:-1]
    for file, c, n in zip(run.train, run.weights, np.split(counts, ends), strict=True):
        kept, known = n > 0, ~np.isnan(c)
        means = [float(c[part & known].mean()) if (part & known).any() else math.nan for part in (kept, ~kept)]
        rows.append([Path(file.file).stem, file.records, kept.sum(), n.sum(), kept.mean(), *means])
    names = ["source", "records", "kept", "rows", "share", "mean c kept", "mean c left"]
    found = pd.DataFrame(rows, columns=names)
    if (found["kept"] == found["rows"]).all():
        found = found.drop(columns="rows")
    dropped = sum(int(np.isnan(c).sum()) for c in run.weights)
    note = f"\n{dropped:,} records have no weight, as they had no response within max_length" if dropped else ""
    return found.to_string(index=False, float_format="{:.4f}".format, na_rep="") + note


# ----------------------------------------------------------------------------------------------------------------------
# reading and writing


def chosen(run: FinishedRun, counts: np.ndarray, field: str | None) -> Records:
    """Every record as often as it counts; with its weight under this name, where one is given. Raises UserError."""
    start = 0
    for number, file in enumerate(run.train):
        here = counts[start : start + file.records]
        for index, (record, text) in enumerate(run.records(number)):
            if here[index] and field is not None:
                if field in record:
                    raise UserError(
                        f"{file.path}, record {index}: it has a field {plain(field)} already; name another with "
                        "--weight_field"
                    )
                weight = run.weights[number][index]
                record, text = _with_weight(record, text, field, None if math.isnan(weight) else float(weight))
            for _ in range(here[index]):
                yield record, text
        start += file.records


def _with_weight(record: dict[str, Any], text: str, field: str, weight: float | None) -> tuple[dict[str, Any], str]:
    """The record with one field more, at its end."""
    before = text.rstrip()[:-1].rstrip()
    return record | {field: weight}, f"{before}, {json.dumps(field)}: {json.dumps(weight)}}}"


def write(records: Records, out: Path, total: int) -> None:
    """A new file, whole or absent. Raises UserError."""
    from tqdm import tqdm

    bar = tqdm(records, total=total, unit="record", desc=f"writing {out.name}", disable=None, leave=False)
    try:
        with bar, whole_file(out, replace=False) as new, new.open("wb") as file:
            WRITERS[out.suffix](iter(bar), file)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None


def _json_lines(records: Records, file: IO[bytes]) -> None:
    """A line per record: that of a JSON Lines file, or the lines that it has in an array put on one."""
    for _, text in records:
        parts = _LINE_BREAK.split(text)  # outside of strings, which hold no line breaks
        line = text if len(parts) == 1 else " ".join(part.strip(" \t") for part in parts)
        file.write(line.encode() + b"\n")


def _json_array(records: Records, file: IO[bytes]) -> None:
    for number, (_, text) in enumerate(records):
        file.write((b",\n" if number else b"[\n") + text.encode())
    file.write(b"\n]\n")


def _parquet(records: Records, file: IO[bytes]) -> None:
    """Columns in the order in which fields turn up; a field that a record lacks is null. Raises UserError."""
    import itertools

    import pyarrow as pa
    import pyarrow.parquet

    tables = []
    try:
        while batch := [record for record, _ in itertools.islice(records, ROWS)]:
            names = dict.fromkeys(name for record in batch for name in record)
            tables.append(pa.table({name: [record.get(name) for record in batch] for name in names}))
        whole = pa.concat_tables(tables, promote_options="permissive")
        pyarrow.parquet.write_table(whole, file)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise UserError(
            f"Parquet wants one type for each field, which these records do not have ({short(str(error), 200)}); "
            "write .jsonl"
        ) from None


WRITERS = {".jsonl": _json_lines, ".json": _json_array, ".parquet": _parquet}
