"""Write a cleaned dataset from a finished run: training records selected by weight, or all of them with weights.

    python -m bilevel.export RUN [--keep SHARE | --threshold T | --sample N [--replacement] |
                                  --all [--weight_field NAME]] [--marks FILE] [--seed N] [--out FILE]

Without --keep, --threshold, --sample or --all the run decides: per source, those whose verdict is "worse" and whose
weight is nearly gone are left out; per record, those below the threshold that the weights suggest.
Records keep the order of the files and their order within a file. JSON and JSON Lines files get the original text of
each record (as a line, an array's record loses its line breaks); Parquet files get the parsed values. The page
docs/export-and-retraining.md has the details.
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
from bilevel.export.suggestion import suggested
from bilevel.files import whole_file
from bilevel.run.finished import FinishedRun, read_finished

Records = Iterator[tuple[dict[str, Any], str]]  # each record with its original text

_LINE_BREAK = re.compile(r"[\r\n]+")
ROWS = 1000  # records per table when writing Parquet


# ----------------------------------------------------------------------------------------------------------------------
# the command line


def main(argv: list[str]) -> int:
    """Run the command. Exit code: 0 done, 2 a mistake of the user, with nothing written."""
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
    choice.add_argument(
        "--keep",
        metavar="SHARE",
        type=_number(0, 1),
        help="this fraction of the records, those with the largest weights, such as 0.5",
    )
    choice.add_argument(
        "--threshold", metavar="T", type=_number(0, math.inf), help="records with weight c >= T (the mean of c is 1)"
    )
    choice.add_argument(
        "--sample", metavar="N", type=_whole(1), help="N records drawn with probability proportional to c"
    )
    choice.add_argument("--all", action="store_true", help="all records, each with its weight in an extra field")
    parser.add_argument("--replacement", action="store_true", help="with --sample: draw with replacement")
    parser.add_argument("--weight_field", metavar="NAME", help="with --all: name of the extra field [weight]")
    parser.add_argument(
        "--marks",
        metavar="FILE",
        help="marks saved in report.html: always include records marked keep, never those marked drop",
    )
    parser.add_argument("--seed", metavar="N", type=_whole(0), default=0, help="seed of random choices [0]")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="output file, .jsonl, .json or .parquet; never overwritten [a .jsonl beside the run folder]",
    )
    options = parser.parse_args(argv)
    if options.replacement and options.sample is None:
        parser.error("--replacement can only be used with --sample")
    if options.weight_field is not None and not options.all:
        parser.error("--weight_field can only be used with --all")
    return options


def _number(above: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not above < value <= most or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"{text}: must be above {above:g}" + f" and at most {most:g}" * (most == 1)
            )
        return value

    return number


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    return whole


# ----------------------------------------------------------------------------------------------------------------------
# the export


def export(options: argparse.Namespace) -> None:
    """Select records, write them, and print what was selected. Raises UserError, with nothing written."""
    from bilevel.export.quality import look

    out = _target(options)
    run = read_finished(options.run)
    marks = read_marks(options.marks, run)
    counts, words = choose(run, marks, options)
    if not counts.any():
        raise UserError(f"no record is selected: {words}")
    field = (options.weight_field or "weight") if options.all else None
    write(chosen(run, counts, field), out, int(counts.sum()))
    print(words)
    print(table(run, counts))
    quality = look(run, counts > 0)
    print(f"of these, {quality.repeated:,} repeat an earlier one (apart from white space and case); responses without "
          f"letters and digits: {quality.empty:,}, with only one or two: {quality.near_empty:,}")  # fmt: skip
    print(f"wrote {out}: {counts.sum():,} records")


def _target(options: argparse.Namespace) -> Path:
    """The output file. Raises UserError."""
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
        raise UserError(f"--out {plain(str(out), 300)}: the name must end in {', '.join(WRITERS)}")
    name = f"--out {plain(str(out), 300)}"
    try:
        os.lstat(out)
    except FileNotFoundError:
        if out.parent.is_dir():
            return out
        raise UserError(f"{name}: the folder {plain(str(out.parent), 300)} does not exist") from None
    except (OSError, ValueError) as error:  # the name is too long or contains NUL
        raise UserError(f"{name}: {getattr(error, 'strerror', error)}") from None
    raise UserError(f"{name}: the file exists and is never overwritten; give another name, or move the file away")


def choose(run: FinishedRun, marks: np.ndarray, options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """How often each record is written, (N,) int64, and a description of the selection. Raises UserError."""
    c = np.concatenate(run.weights)
    if options.all:
        known = np.concatenate([run.was_read(number) for number in range(len(run.train))])
        return (known & (marks != DROP)).astype(np.int64), "all records, each with its weight"
    if options.keep is not None:
        return heaviest(
            c, marks, options.keep, options.seed
        ), f"the fraction {options.keep:g} of records with the largest weights"
    if options.threshold is not None:
        return at_least(c, marks, options.threshold), f"records with weight c >= {options.threshold:g}"
    if options.sample is not None:
        counts = draw(c, marks, options.sample, options.replacement, options.seed)
        how = "with" if options.replacement else "without"
        return counts, f"{options.sample:,} records drawn with probability proportional to c, {how} replacement"
    return suggested(run, marks)


def table(run: FinishedRun, counts: np.ndarray) -> str:
    """A row per source: number of records, of those kept, and the mean weights of kept and other records."""
    import pandas as pd

    rows, ends = [], np.cumsum([file.records for file in run.train])[:-1]
    for file, c, n in zip(run.train, run.weights, np.split(counts, ends), strict=True):
        kept, known = n > 0, ~np.isnan(c)
        means = [float(c[part & known].mean()) if (part & known).any() else math.nan for part in (kept, ~kept)]
        rows.append([file.stem, file.records, kept.sum(), n.sum(), kept.mean(), *means])
    names = ["source", "records", "kept", "rows", "share", "mean c kept", "mean c other"]
    found = pd.DataFrame(rows, columns=names)
    if (found["kept"] == found["rows"]).all():
        found = found.drop(columns="rows")
    dropped = sum(int(np.isnan(c).sum()) for c in run.weights)
    note = (
        f"\n{dropped:,} records have no weight, because no part of their response is within max_length"
        if dropped
        else ""
    )
    return found.to_string(index=False, float_format="{:.4f}".format, na_rep="") + note


# ----------------------------------------------------------------------------------------------------------------------
# reading and writing


def chosen(run: FinishedRun, counts: np.ndarray, field: str | None) -> Records:
    """Yield each record as often as counts (N,) says; `field`: add its weight under this name. Raises UserError."""
    start = 0
    for number, file in enumerate(run.train):
        here = counts[start : start + file.records]
        for index, (record, text) in enumerate(run.records(number)):
            if here[index] and field is not None:
                if field in record:
                    raise UserError(
                        f"{file.path}, record {index}: it already has a field {plain(field)}; choose another name with "
                        "--weight_field"
                    )
                weight = run.weights[number][index]
                record, text = _with_weight(record, text, field, None if math.isnan(weight) else float(weight))
            for _ in range(here[index]):
                yield record, text
        start += file.records


def _with_weight(record: dict[str, Any], text: str, field: str, weight: float | None) -> tuple[dict[str, Any], str]:
    """The record and its text with one more field at the end."""
    before = text.rstrip()[:-1].rstrip()
    return record | {field: weight}, f"{before}, {json.dumps(field)}: {json.dumps(weight)}}}"


def write(records: Records, out: Path, total: int) -> None:
    """Write the records to a new file, which is either complete or absent. Raises UserError."""
    from tqdm import tqdm

    bar = tqdm(records, total=total, unit="record", desc=f"writing {out.name}", disable=None, leave=False)
    try:
        with bar, whole_file(out, replace=False) as new, new.open("wb") as file:
            WRITERS[out.suffix](iter(bar), file)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None


def _json_lines(records: Records, file: IO[bytes]) -> None:
    """Write one line per record. Line breaks of a record from a JSON array are replaced by spaces."""
    for _, text in records:
        parts = _LINE_BREAK.split(text)  # these are never inside strings, where JSON escapes line breaks
        line = text if len(parts) == 1 else " ".join(part.strip(" \t") for part in parts)
        file.write(line.encode() + b"\n")


def _json_array(records: Records, file: IO[bytes]) -> None:
    for number, (_, text) in enumerate(records):
        file.write((b",\n" if number else b"[\n") + text.encode())
    file.write(b"\n]\n")


def _parquet(records: Records, file: IO[bytes]) -> None:
    """Write columns in the order in which fields appear; missing fields are null. Raises UserError."""
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
            f"Parquet needs one type per field, but the types of these records differ ({short(str(error), 200)}); "
            "write a .jsonl file instead"
        ) from None


WRITERS = {".jsonl": _json_lines, ".json": _json_array, ".parquet": _parquet}
