"""Write a cleaned dataset from a finished run: training records selected by weight, or all of them with weights.

    python -m bilevel.export RUN [--keep SHARE | --threshold T | --all [--weight_field NAME] |
                                  --sample N [--from FILES] [--max_repeats K | --replacement] [--floor SHARE]
                                             [--shares records|tokens]]
                                 [--append FILES] [--marks FILE] [--seed N] [--out FILE]

Without --keep, --threshold, --sample or --all the run decides: per source, those whose verdict is "worse" and whose
weight is nearly gone are left out; per record, those called harmful, or else the lower one if the weights form two
groups.
Records keep the order of the files and their order within a file. JSON and JSON Lines files get the original text of
each record (as a line, an array's record loses its line breaks); other files get the parsed values. The page
docs/export-and-retraining.md has the details.
"""

import argparse
import functools
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.errors import UserError, first, plain
from bilevel.export.options import parse
from bilevel.export.output import check_layouts, free, target, write_folder
from bilevel.export.pool import appended, by_file, layouts, limited, readable, to_draw_from
from bilevel.export.selection import DROP, at_least, draw, heaviest, read_marks
from bilevel.export.suggestion import doubt, suggested
from bilevel.export.writers import Records, ending, write
from bilevel.run.finished import FinishedRun, read_finished

# ----------------------------------------------------------------------------------------------------------------------
# the command line


def main(argv: list[str]) -> int:
    """Run the command. Exit code: 0 done, 2 a mistake of the user, with nothing written."""
    options = parse(argv, __doc__.split("\n")[0])
    try:
        export(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# the export


def export(options: argparse.Namespace) -> None:
    """Select records, write them, and print what was selected. Raises UserError, with nothing written."""
    from bilevel.export.quality import look

    out = target(options)
    learned = read_finished(options.run)
    more = appended(learned, options.append)
    run = to_draw_from(learned, options)
    counts, words = choose(run, read_marks(options.marks, run), options)
    if not counts.any():
        raise UserError(f"no record is selected: {words}")
    selections = [(run, counts)] + ([(more, readable(more))] if more else [])
    lines = write_out(selections, out, options)
    print(words)
    print(table(run, counts))
    quality = look(run, counts > 0)
    print(f"of these, {quality.repeated:,} repeat an earlier one (apart from white space and case); responses without "
          f"letters and digits: {quality.empty:,}, with only one or two: {quality.near_empty:,}")  # fmt: skip
    print(*lines, sep="\n")


Selection = tuple[FinishedRun, np.ndarray]  # a run, and how often each of its records is written


def write_out(selections: list[Selection], out: Path, options: argparse.Namespace) -> list[str]:
    """Write the selected records, and return what to print of it. Raises UserError."""
    found = layouts(selections)
    if options.out is None and len(found) > 1:
        out = free(out.with_suffix(""), "the folder")
    fields = {"weight": (options.weight_field or "weight") if options.all else None, "source": options.source_field}
    if options.source_field is None and options.sample is not None:
        fields["source"] = "source"
    counts = {file.stem: int(here.sum()) for run, counts in selections for file, here in by_file(run, counts)}
    total = sum(counts.values())
    if ending(out)[0]:
        check_layouts(found, out)
        write(itertools.chain.from_iterable(chosen(run, counts, fields) for run, counts in selections), out, total)
        lines = [f"wrote {out}: {total:,} records"]
    else:
        parts = {
            file.stem: (functools.partial(of_file, run, number, here, fields), int(here.sum()))
            for run, counts in selections
            for number, (file, here) in enumerate(by_file(run, counts))
            if here.any()
        }
        write_folder(parts, out)
        lines = [f"wrote {out}/: {total:,} records in {len(parts)} files, one for each source"]
    if options.append:
        names = [file.stem for file in selections[-1][0].train]
        lines.append(f"of these, {sum(counts[name] for name in names):,} are appended: {', '.join(first(names, 10))}")
    return lines


def choose(run: FinishedRun, marks: np.ndarray, options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """How often each record is written, (N,) int64, and a description of the selection. Raises UserError."""
    c = np.concatenate(run.weights)
    if options.all:
        known = np.concatenate([run.was_read(number) for number in range(len(run.train))])
        return (known & (marks != DROP)).astype(np.int64), "all records, each with its weight"
    if options.keep is not None:
        words = f"the fraction {options.keep:g} of records with the largest weights"
        return heaviest(c, marks, options.keep, options.seed), words + doubt(run)
    if options.threshold is not None:
        return at_least(c, marks, options.threshold), f"records with weight c >= {options.threshold:g}" + doubt(run)
    if options.sample is not None:
        return _drawn(run, c, marks, options)
    return suggested(run, marks)


def _drawn(run: FinishedRun, c: np.ndarray, marks: np.ndarray, options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Counts with sum options.sample, and a description of the draw. Raises UserError."""
    n, repeats = options.sample, options.max_repeats or 1
    sizes = [file.records for file in run.train]
    counts = draw(c, marks, n, options.replacement, options.seed, sizes, repeats)
    how = "with replacement" if options.replacement else "without replacement"
    how = f"each at most {repeats} times" if repeats > 1 else how
    words = [f"{n:,} records drawn with probability proportional to c, {how}"]
    if options.floor:
        words[0] += f", no source with a share below {options.floor:g}"
    if options.shares == "tokens":
        words[0] += "; the shares of the sources are shares of the learned tokens"
    return counts, "\n".join(words + ([] if options.replacement else limited(run, counts, n, repeats)))


def table(run: FinishedRun, counts: np.ndarray) -> str:
    """A row per source: number of records, of those kept, and the mean weights of kept and other records."""
    import pandas as pd

    rows = []
    for (file, n), c in zip(by_file(run, counts), run.weights, strict=True):
        kept, known = n > 0, ~np.isnan(c)
        means = [float(c[part & known].mean()) if (part & known).any() else math.nan for part in (kept, ~kept)]
        rows.append([file.stem, file.records, kept.sum(), n.sum(), kept.mean(), *means])
    names = ["source", "records", "kept", "rows", "share", "mean c kept", "mean c other"]
    found = pd.DataFrame(rows, columns=names)
    if (found["kept"] == found["rows"]).all():
        found = found.drop(columns="rows")
    return "\n".join([found.to_string(index=False, float_format="{:.4f}".format, na_rep=""), *_without_weight(run)])


def _without_weight(run: FinishedRun) -> list[str]:
    """How many records have no weight, and why; nothing if all have one."""
    (unread, cut), lines = run.without_weight(), []
    if unread:
        lines.append(f"{unread:,} records have no weight, because the run did not read them (FILE#N, filters or "
                     "skip_bad_records)")  # fmt: skip
    if cut:
        lines.append(f"{cut:,} records have no weight, because no part of their response is within max_length")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# the records


def chosen(run: FinishedRun, counts: np.ndarray, fields: dict[str, str | None]) -> Records:
    """Yield each record as often as counts (N,) says, with more fields at its end. Raises UserError.

    fields: the names of the fields `weight` and `source`, None for one that is not added. A record that has a field
    `source` of its own keeps it.
    """
    for number, (_, here) in enumerate(by_file(run, counts)):
        yield from of_file(run, number, here, fields)


def of_file(run: FinishedRun, number: int, counts: np.ndarray, fields: dict[str, str | None]) -> Records:
    """The same for the records of training file `number`, with counts (records,)."""
    file = run.train[number]
    for index, (record, text) in enumerate(run.records(number)):
        if not counts[index]:
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
        for _ in range(counts[index]):
            yield record, text


def _with_field(record: dict[str, Any], text: str, name: str, value: Any) -> tuple[dict[str, Any], str]:
    """The record and its text with one more field at the end."""
    before = text.rstrip()[:-1].rstrip()
    return record | {name: value}, f"{before}, {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}}}"
