"""Which records of a finished run to keep, and how often: a count for each. Marks made by eye overrule weights.

Weights c are (N,) float64. A record that was dropped in training has NaN, and only a mark can select it. Marks (N,) are
KEEP, DROP or 0. Random choices come from numpy's default generator and a seed.
"""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from bilevel.errors import UserError, plain
from bilevel.files import open_regular
from bilevel.run.finished import FinishedRun

KEEP, DROP = 1, -1
MOST_DRAWS = 1000  # with replacement, for each record of the run: more is a slip of the keyboard
CHUNK = 1 << 20  # draws at a time


@dataclass(config=ConfigDict(strict=True), frozen=True)
class Mark:
    """The mark of one record: always in, or never. index: its place in the file, from 0."""

    file: str
    index: Annotated[int, Field(ge=0)]
    mark: Literal["keep", "drop"]


@dataclass(config=ConfigDict(strict=True), frozen=True)
class Marks:
    """The file of marks that report.html saves."""

    run: str
    marks: list[Mark]


def read_marks(path: str | None, run: FinishedRun) -> np.ndarray:
    """The marks of all records, (N,) int8; none if path is None. Raises UserError if they do not fit this run."""
    marked = [np.zeros(file.records, dtype=np.int8) for file in run.train]
    if path is None:
        return np.concatenate(marked)
    try:
        with open_regular(Path(path)) as file:
            marks = TypeAdapter(Marks).validate_json(file.read())
    except OSError as error:
        raise UserError(f"--marks {plain(path, 300)}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"--marks {path}: not what report.html saves: {' '.join(str(error).split())}") from None
    if marks.run != run.name:
        raise UserError(f"--marks {path} are of the run {plain(marks.run)}, not of {run.name}")
    places = {file.file: part for file, part in zip(run.train, marked, strict=True)}
    known = {file.file: run.was_read(number) for number, file in enumerate(run.train)}
    for mark in marks.marks:
        if mark.file not in places or mark.index >= len(places[mark.file]):
            raise UserError(f"--marks {path}: the run has no record {mark.index} of {plain(mark.file, 300)}")
        if not known[mark.file][mark.index]:
            raise UserError(f"--marks {path}: the run has not read record {mark.index} of {plain(mark.file, 300)}")
        value = KEEP if mark.mark == "keep" else DROP
        if places[mark.file][mark.index] == -value:
            raise UserError(f"--marks {path}: record {mark.index} of {mark.file} is marked keep and drop")
        places[mark.file][mark.index] = value
    return np.concatenate(marked)


def heaviest(c: np.ndarray, marks: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Counts 0 and 1: this share of the records that have a weight, the largest weights first.

    Among records of equal weight at the cut (whole sources, for instance) those to keep are drawn with equal chances.
    """
    rank = np.where(marks == KEEP, np.inf, np.where(np.isnan(c) | (marks == DROP), -np.inf, c))
    chance = np.random.default_rng(seed).permutation(len(c))
    counts = np.zeros(len(c), dtype=np.int64)
    counts[np.lexsort((chance, -rank))[: round(share * np.count_nonzero(~np.isnan(c)))]] = 1
    return np.where(np.isinf(rank), rank > 0, counts).astype(np.int64)


def at_least(c: np.ndarray, marks: np.ndarray, threshold: float) -> np.ndarray:
    """Counts 0 and 1: 1 where c >= threshold."""
    return ((marks == KEEP) | (c >= threshold) & (marks != DROP)).astype(np.int64)


def draw(
    c: np.ndarray,
    marks: np.ndarray,
    n: int,
    replacement: bool,
    seed: int,
    sizes: list[int] | None = None,
    repeats: int = 1,
) -> np.ndarray:
    """Counts with sum n, drawn in proportion to c; records marked KEEP are in once before the draw. Raises UserError.

    sizes: the records of each source, in order; each gets its expected number of draws, rounded by `quotas`. Within a
    source, draws with replacement are independent and each is record i with probability c_i / sum c. Without, a record
    is drawn at most `repeats` times, and its expected count is that of `inclusion`.
    """
    generator, kept = np.random.default_rng(seed), (marks == KEEP).astype(np.int64)
    pool, left = np.where(np.isnan(c) | (marks == DROP), 0.0, c), n - int(kept.sum())
    limits = repeats - kept
    if left < 0:
        raise UserError(f"--sample {n}: {int(kept.sum())} records are marked keep; draw at least as many")
    if replacement:
        if left and not pool.any():
            raise UserError(f"--sample {n}: no record has a weight above 0")
        if n > MOST_DRAWS * len(c):
            raise UserError(f"--sample {n}: at most {MOST_DRAWS:,} draws for each of the run's {len(c):,} records")
    elif (most := int(limits[pool > 0].sum())) < left:
        raise UserError(_too_many(n, most + n - left, repeats))
    expected = pool if replacement else inclusion(pool, left, limits)
    ends = np.cumsum([len(c)] if sizes is None else sizes)[:-1]
    wanted = quotas(np.array([part.sum() for part in np.split(expected, ends)]), left)
    drawn = [
        _with_replacement(part, count, generator)
        if replacement
        else _without_replacement(part, count, generator, limit)
        for part, limit, count in zip(np.split(pool, ends), np.split(limits, ends), wanted.tolist(), strict=True)
    ]
    return kept + np.concatenate(drawn)


def _too_many(n: int, most: int, repeats: int) -> str:
    if repeats == 1:
        return (
            f"--sample {n}: {most} records have a weight above 0; draw at most as many, or add --replacement, or "
            "--max_repeats K, which draws a record at most K times"
        )
    return (
        f"--sample {n}: the records that have a weight above 0, {repeats} times each, are {most}; draw at most as "
        "many, or give a larger --max_repeats"
    )


def quotas(shares: np.ndarray, n: int) -> np.ndarray:
    """n in proportion to shares (S,), as whole numbers with sum n: rounded down, then the largest remainders up."""
    if not n:
        return np.zeros(len(shares), dtype=np.int64)
    exact = n * shares / shares.sum()
    found = np.floor(exact + 1e-9).astype(np.int64)
    found[np.argsort(found - exact, kind="stable")[: n - found.sum()]] += 1
    return found


def _with_replacement(pool: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """Counts with sum n of independent draws in proportion to pool."""
    counts, ends = np.zeros(len(pool), dtype=np.int64), pool.cumsum()
    for start in range(0, n, CHUNK):
        places = ends.searchsorted(generator.random(min(CHUNK, n - start)) * ends[-1], side="right")
        counts += np.bincount(np.minimum(places, ends.argmax()), minlength=len(pool))
    return counts


def _without_replacement(pool: np.ndarray, n: int, generator: np.random.Generator, limits: np.ndarray) -> np.ndarray:
    """Counts with sum n, at most limits (N,): systematic sampling in random order (Madow 1949, Hartley and Rao 1962).

    A count is its expectation, rounded down or up.
    """
    expected = inclusion(pool, n, limits)
    full = expected == limits
    counts = np.where(full, limits, 0)
    order = generator.permutation(np.flatnonzero((expected > 0) & ~full))
    ends = np.floor(expected[order].cumsum() + generator.random())
    ends[-1:] = n - counts.sum()  # exact, without rounding error
    counts[order] += np.diff(ends, prepend=0).astype(np.int64)
    return counts


def inclusion(c: np.ndarray, n: int, limits: np.ndarray | int = 1) -> np.ndarray:
    """Expected counts (N,) with sum n: n c_i / sum c, where those above their limit become it, and others get the rest.

    limits: (N,) or one for all, whole numbers; at 1, the expected counts are the probabilities that a record is in.
    """
    limits = np.broadcast_to(limits, c.shape)
    expected, rest = np.zeros(len(c)), (c > 0) & (limits > 0)
    while left := n - expected.sum():
        scaled = left * c / c[rest].sum()
        over = rest & (scaled >= limits * (1 - 1e-12))
        if not over.any():
            return np.where(rest, scaled, expected)
        expected[over], rest = limits[over], rest & ~over
    return expected
