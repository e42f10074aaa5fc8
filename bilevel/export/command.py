"""Write a cleaned dataset from a finished run: training records selected by weight, or all of them with weights.

    python -m bilevel.export RUN [--keep SHARE | --threshold T | --sample N [--replacement] |
                                  --all [--weight_field NAME]] [--marks FILE] [--seed N] [--out FILE]

Without --keep, --threshold, --sample or --all the run decides: per source, those whose verdict is "worse" and whose
weight is nearly gone are left out; per record, those below the threshold that the weights suggest.
Records keep the order of the files and their order within a file. JSON and JSON Lines files get the original text of
each record (as a line, an array's record loses its line breaks); other files get the parsed values. The page
docs/export-and-retraining.md has the details.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.errors import UserError, plain
from bilevel.export.selection import DROP, at_least, draw, heaviest, read_marks
from bilevel.export.suggestion import suggested
from bilevel.export.writers import PACKERS, WRITERS, Records, ending, write
from bilevel.run.finished import FinishedRun, read_finished

EXAMPLES = """examples:
  python -m bilevel.export outputs/mine                       as the run suggests: without what it has shown to be worse
  python -m bilevel.export outputs/mine --keep 0.5 --out clean.jsonl         the half with the largest weights
  python -m bilevel.export outputs/mine --all                 every record, with its weight in a field
  python -m bilevel.export outputs/mine --sample 10000        10,000 records drawn in proportion to their weights"""

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
        prog="python -m bilevel.export",
        description=__doc__.split("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        "--source_field",
        metavar="NAME",
        help="name of an extra field with the record's source [source with --sample, else no such field]",
    )
    parser.add_argument(
        "--marks",
        metavar="FILE",
        help="marks saved in report.html: always include records marked keep, never those marked drop",
    )
    parser.add_argument("--seed", metavar="N", type=_whole(0), default=0, help="seed of random choices [0]")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="output file, .jsonl, .json, .csv, .tsv, .parquet or .arrow, the texts also with .gz, .zst, .bz2 or .xz; "
        "never overwritten [a .jsonl beside the run folder]",
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
    fields = {"weight": (options.weight_field or "weight") if options.all else None, "source": options.source_field}
    if options.source_field is None and options.sample is not None:
        fields["source"] = "source"
    write(chosen(run, counts, fields), out, int(counts.sum()))
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
    if not any(ending(out)):
        known = f"{', '.join(WRITERS)}, or in one of the texts and {', '.join(PACKERS)}"
        raise UserError(f"--out {plain(str(out), 300)}: the name must end in {known}")
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
        counts = draw(c, marks, options.sample, options.replacement, options.seed, [file.records for file in run.train])
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
# the records


def chosen(run: FinishedRun, counts: np.ndarray, fields: dict[str, str | None]) -> Records:
    """Yield each record as often as counts (N,) says, with more fields at its end. Raises UserError.

    fields: the names of the fields `weight` and `source`, None for one that is not added. A record that has a field
    `source` of its own keeps it.
    """
    start = 0
    for number, file in enumerate(run.train):
        here = counts[start : start + file.records]
        for index, (record, text) in enumerate(run.records(number)):
            if not here[index]:
                continue
            weight = run.weights[number][index]
            values = {"weight": None if math.isnan(weight) else float(weight), "source": file.stem}
            for kind, name in fields.items():
                if name is None or (name in record and kind == name == "source"):
                    continue
                if name in record:
                    raise UserError(
                        f"{file.path}, record {index}: it already has a field {plain(name)}; choose another name with "
                        f"--{kind}_field"
                    )
                record, text = _with_field(record, text, name, values[kind])
            for _ in range(here[index]):
                yield record, text
        start += file.records


def _with_field(record: dict[str, Any], text: str, name: str, value: Any) -> tuple[dict[str, Any], str]:
    """The record and its text with one more field at the end."""
    before = text.rstrip()[:-1].rstrip()
    return record | {name: value}, f"{before}, {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}}}"
