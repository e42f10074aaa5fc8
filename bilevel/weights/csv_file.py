"""weights.csv: the one writer and the one reader of learned weights.

    source,weight,samples[,score][,difference,low,high,p_worse,evidence,verdict,called_at]
                                              per source: weight p_s and number of samples; if weights were learned,
                                              also the evidence on the source (bilevel.weights.evidence)
    file,index,weight[,is_noisy][,score][,mean_gap,harmful_share]
                                              per sample: weight c_i (mean 1); index: its record's place in the file;
                                              if weights were learned, its mean gap in standard deviations, empty if
                                              it has not been visited, and the probability that it is harmful
                                              (bilevel.weights.record_evidence), empty if it has not been compared

Rows have the order of the training samples. A record that became several samples (pieces of a text, or chat turns with
a context of their own) has a row for each. pandas is imported late, because commands that answer a mistake at once
import this module.
"""

import csv
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bilevel.errors import UserError, plain, short
from bilevel.files import open_regular, whole_file
from bilevel.weights import chunks

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from bilevel.data.samples import Samples
    from bilevel.weights.fixed import Weights

KEYS = {False: ["source"], True: ["file", "index"]}  # by per_sample: the columns that say what a row is about
EVIDENCE = ("difference", "low", "high", "p_worse", "evidence", "verdict", "called_at")  # per source
LARGEST = math.log(1e12)  # ln of the largest e-value that is written


@dataclasses.dataclass(frozen=True)
class TrainingFiles:
    """The training files that a weights.csv must belong to.

    names: file names, in the order of the sources. sources: the names of the sources. samples (S,): number of samples
    of each file. same_run: whether weights.csv is of the run that made these samples, so that its numbers of samples
    per source must be the same; a run may also start from weights per source of a run that cut the files differently.
    index: from a slice of the samples to the places of their records in their files, int64. If it is None, every place
    among the records (S,) will do.
    """

    names: list[str]
    sources: list[str]
    samples: np.ndarray
    same_run: bool
    index: Callable[[slice], np.ndarray] | None = None
    records: np.ndarray | None = None


# ----------------------------------------------------------------------------------------------------------------------
# writing


def write_weights(path: Path, weights: "Weights", samples: "Samples", scores: "torch.Tensor | None" = None) -> None:
    """Write weights.csv, a chunk of rows at a time; the file is whole or absent.

    scores (N,): what a baseline has given the samples. Per source, the column `score` is their mean.
    """
    with whole_file(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        for number, table in enumerate(_tables(weights, samples, scores)):
            table.to_csv(file, index=False, header=number == 0)


def _tables(weights: "Weights", samples: "Samples", scores: "torch.Tensor | None") -> Iterator["pd.DataFrame"]:
    import pandas as pd

    if not weights.per_sample:
        table = {"source": samples.sources, "weight": weights.p.numpy(), "samples": samples.sizes.numpy()}
        if scores is not None:
            sums = np.bincount(samples.source_ids.numpy(), scores.numpy(), minlength=len(samples.sources))
            table["score"] = sums / samples.sizes.numpy()
        if weights.evidence is not None:
            table |= _evidence(weights)
        yield pd.DataFrame(table)
        return
    names = np.array([file.name for file in samples.files], dtype=object)
    harm = weights.records.harm() if weights.records is not None else None
    ends = samples.sizes.cumsum(0).numpy()
    for part in chunks.chunks(len(samples)):
        table = {"file": names[_file_numbers(ends, part)], "index": samples.records(part)}
        table["weight"] = weights.coefficients(part).numpy()
        if samples.is_noisy is not None:
            table["is_noisy"] = samples.is_noisy[part]
        if scores is not None:
            table["score"] = scores[part].numpy()
        if harm is not None:
            table["mean_gap"] = weights.records.means(part)
            table["harmful_share"] = weights.records.harmful_share(harm, part)
        yield pd.DataFrame(table)


def _evidence(weights: "Weights") -> dict[str, list]:
    """The columns of the evidence on each source; `evidence` is the largest e-value so far, at most 1e12."""
    found = weights.evidence.findings(weights.x)
    columns = {name: [getattr(each, name) for each in found] for name in EVIDENCE}
    columns["evidence"] = [math.exp(min(each.peak, LARGEST)) for each in found]
    columns["called_at"] = ["" if each.called_at is None else str(each.called_at) for each in found]
    return columns


def _file_numbers(ends: np.ndarray, part: slice) -> np.ndarray:
    """The file of each of these samples, where file k holds the samples before ends[k]."""
    return ends.searchsorted(np.arange(part.start, part.stop), side="right")


# ----------------------------------------------------------------------------------------------------------------------
# reading


def read_tables(path: Path, per_sample: bool, files: TrainingFiles, name: str) -> Iterator["pd.DataFrame"]:
    """The rows of a weights.csv with all their columns, at most CHUNK at a time; weights are float64 and checked.

    name: what messages call the file. Raises UserError if the file cannot be read, lacks a column, belongs to other
    training files, holds a weight that is negative or not a number, or nothing but zeros.
    """
    import pandas as pd

    start, positive = 0, False
    expected = int(files.samples.sum()) if per_sample else len(files.names)
    try:
        # Sources and files may be called 001 or NA.
        text = dict.fromkeys(("source", "file"), str)
        with pd.read_csv(path, dtype=text, keep_default_na=False, chunksize=chunks.CHUNK) as tables:
            for table in tables:
                _check_columns(list(table.columns), per_sample, name)
                table["weight"] = _numbers(table["weight"], start, name)
                if start + len(table) > expected:
                    raise _other(name, f"it has more than {expected} rows")
                check = _check_samples if per_sample else _check_sources
                check(table, start, files, name)
                start, positive = start + len(table), positive or bool((table["weight"] > 0).any())
                yield table
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {error}") from None
    if start < expected:
        raise _other(name, f"it has {start} rows, expected {expected}")
    if not positive:
        raise UserError(f"{name}: every weight is 0")


def check_kind(path: Path, per_sample: bool, name: str) -> None:
    """Raises UserError if the file's first line is not that of weights of this kind."""
    try:
        with open_regular(path) as file:
            head = file.readline(10_000).decode("utf-8-sig", "replace")
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from None
    _check_columns(next(csv.reader([head]), []), per_sample, name)


def _check_columns(found: list[str], per_sample: bool, name: str) -> None:
    expected = [*KEYS[per_sample], "weight"]
    if set(expected) <= set(found):
        return
    other = set(KEYS[not per_sample]) <= set(found)
    kind = "source" if per_sample else "sample"
    remedy = f"; this file is of a run with weights={kind}, so give weights={kind} here, too" if other else ""
    raise UserError(f"{name}: expected columns {', '.join(expected)}, found {plain(', '.join(found), 200)}{remedy}")


def _numbers(column: "pd.Series", start: int, name: str) -> np.ndarray:
    import pandas as pd

    known = column if column.dtype.kind in "iuf" else column.astype(str)
    weights = pd.to_numeric(known, errors="coerce").to_numpy(dtype=float)
    good = np.isfinite(weights) & (weights >= 0)
    if not good.all():
        row = int(good.argmin())
        raise UserError(
            f"{name}, line {_line(start + row)}: weight {short(column.iloc[row])}; "
            "weights must be numbers, none negative"
        )
    return weights


def _check_sources(table: "pd.DataFrame", start: int, files: TrainingFiles, name: str) -> None:
    part = slice(start, start + len(table))
    expected = files.sources[part]
    if table["source"].tolist() != expected:
        found, wanted = (plain(", ".join(sources), 200) for sources in (table["source"], expected))
        raise _other(name, f"its sources are {found}, expected {wanted}")
    if files.same_run and "samples" in table and table["samples"].tolist() != files.samples[part].tolist():
        raise _other(name, "its numbers of samples differ")


def _check_samples(table: "pd.DataFrame", start: int, files: TrainingFiles, name: str) -> None:
    ends, part = files.samples.cumsum(), slice(start, start + len(table))
    numbers, index = _file_numbers(ends, part), table["index"].to_numpy()
    if len(table) and index.dtype.kind not in "iu":
        raise UserError(f"{name}: index must be a whole number in every row")
    fits = table["file"].to_numpy(dtype=object) == np.array(files.names, dtype=object)[numbers]
    if files.index is None:
        fits &= (index >= 0) & (index < files.records[numbers])
    else:
        fits &= index == files.index(part)
    if not fits.all():
        row = int(fits.argmin())
        found = f"record {index[row]} of {plain(table['file'].iloc[row], 200)}"
        expected = (
            f"record {files.index(part)[row]}" if files.index else f"one of {files.records[numbers[row]]} records"
        )
        expected += f" of {plain(files.names[numbers[row]], 200)}"
        raise _other(name, f"line {_line(start + row)} is about {found}, expected {expected}")


def _line(row: int) -> int:
    """The line of the file that holds this row, from 1; the header is line 1."""
    return row + 2


def _other(name: str, difference: str) -> UserError:
    return UserError(f"{name} was made from other training files: {difference}")
