"""The records that report.html shows: which, their texts, and what is known of each."""

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bilevel.report.marks import Mark
from bilevel.run.finished import FinishedRun

if TYPE_CHECKING:
    import datasets

RESPONSES = {"response", "assistant", "text"}  # roles of what is answered
CHARACTERS = 40_000_000  # of all shown records together; a browser loads them in a second or two
LONGEST = 2_000_000  # characters of one text
_ALPACA = re.compile(r"### Instruction:\n(.*)\n\n### Response:\n", re.DOTALL)


def choose(run: FinishedRun, most: int) -> tuple[list[np.ndarray], str]:
    """Indices (k,), ascending, of the records to show from each training file, and a description of the choice.

    With per-sample weights: the records with the lowest and the highest weights, half of `most` each; if all weights
    are equal, those with the largest and the smallest mean gaps. With per-source weights, which are equal within a
    source: a random draw of equal size from each source.
    """
    known = [np.flatnonzero(np.isfinite(c)) for c in run.weights]
    total = sum(map(len, known))
    if total <= most:
        return known, f"All {total:,} records."
    if not run.per_sample:
        each, rng = max(1, most // len(known)), np.random.default_rng(0)
        drawn = [np.sort(rng.choice(places, min(len(places), each), replace=False)) for places in known]
        return (
            drawn,
            f"Up to {each:,} records of each source, drawn at random. All records of a source have its weight.",
        )
    starts = np.cumsum([0, *map(len, run.weights)])
    everywhere, half = np.concatenate([start + places for start, places in zip(starts, known, strict=False)]), most // 2
    order = np.argpartition(np.concatenate(from_harm(run))[everywhere], [half, total - half])
    ends = np.sort(everywhere[np.concatenate([order[:half], order[-half:]])])
    parts = [ends[(start <= ends) & (ends < end)] - start for start, end in itertools.pairwise(starts)]
    low, high, what = ("largest", "smallest", "mean gaps") if by_gap(run) else ("lowest", "highest", "weights")
    return parts, f"The {half:,} records with the {low} and the {half:,} with the {high} {what}, out of {total:,}."


def equal_weights(run: FinishedRun) -> bool:
    c = np.concatenate(run.weights)
    return not np.nanmax(c, initial=0) - np.nanmin(c, initial=np.inf) > 1e-9


def by_gap(run: FinishedRun) -> bool:
    """Whether records are told apart by their mean gaps, because all weights of single records are equal."""
    return run.per_sample and run.mean_gap is not None and equal_weights(run)


def from_harm(run: FinishedRun) -> list[np.ndarray]:
    """Per file, what orders the records, the likeliest to harm first: weights, or else mean gaps from the largest."""
    if not by_gap(run):
        return run.weights
    gaps = np.concatenate(run.mean_gap)
    middle = float(np.median(gaps[np.isfinite(gaps)])) if np.isfinite(gaps).any() else 0.0
    return [-np.nan_to_num(gap, nan=middle) for gap in run.mean_gap]  # what is not known is in the middle


def order(run: FinishedRun, chosen: list[np.ndarray]) -> list[int]:
    """The places of the chosen records in the order in which the page shows them first."""
    if run.per_sample:
        values = [each[places] for each, places in zip(from_harm(run), chosen, strict=True)]
    else:
        values = [np.arange(len(places)) for places in chosen]  # some of each source
    return np.argsort(np.concatenate(values), kind="stable").tolist()


def turns_of(rows: "list[datasets.Dataset]", chosen: list[np.ndarray]) -> list[list[tuple[str, str, int]]]:
    """The turns of each record: (role, text, length of the text before it was cut).

    Long texts are cut to a common length, chosen so that all texts together have at most CHARACTERS.
    """
    lengths = [len(text) for _, texts in texts_of(rows, chosen) for text in texts]
    most = cut_length(np.array(lengths), CHARACTERS)
    return [
        [(role, text[:most], len(text)) for role, text in zip(roles, texts, strict=True)]
        for roles, texts in texts_of(rows, chosen)
    ]


def records(
    run: FinishedRun,
    marks: dict[str, Mark],
    chosen: list[np.ndarray],
    turns: list[list[tuple[str, str, int]]],
) -> dict[str, list | None]:
    """One list per field, ordered by file and index. Lengths are in characters, of all turns and of the responses.

    marks: by the name of their field.
    """

    def of(values: list[np.ndarray]) -> list:
        return np.concatenate([each[places] for each, places in zip(values, chosen, strict=True)]).tolist()

    return {
        "file": np.repeat(np.arange(len(chosen)), [len(places) for places in chosen]).tolist(),
        "index": np.concatenate(chosen).tolist(),
        "weight": of(run.weights),
        "gap": None if run.mean_gap is None else [_or_none(gap) for gap in of(run.mean_gap)],
        "harmful": None if run.harmful_share is None else [_or_none(share) for share in of(run.harmful_share)],
        **{name: of([each.astype(int) for each in found]) if found else None for name, found in marks.items()},
        "length": [sum(length for _, _, length in each) for each in turns],
        "response": [sum(length for role, _, length in each if role in RESPONSES) for each in turns],
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.4g}")


def texts_of(rows: "list[datasets.Dataset]", chosen: list[np.ndarray]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield roles and texts of each record, reading few at a time. Alpaca prompts lose their outer headings."""
    for table, places in zip(rows, chosen, strict=True):
        numbers = np.searchsorted(table.data.column("index").to_numpy(), places)  # rows of the records
        for start in range(0, len(places), 100):
            part = table[numbers[start : start + 100]]
            for roles, texts in zip(part["roles"], part["contents"], strict=True):
                if roles[0] == "prompt" and (prompt := _ALPACA.fullmatch(texts[0])):
                    texts = [prompt[1], *texts[1:]]
                yield roles, texts


def cut_length(lengths: np.ndarray, most: int) -> int:
    """The length to which texts of lengths (K,) must be cut so that together they have at most `most` characters."""
    lengths = np.sort(lengths)
    left = most - (np.cumsum(lengths) - lengths)  # budget left for this and longer texts if shorter ones are not cut
    shares = left // np.arange(len(lengths), 0, -1)
    longer = lengths > shares
    return min(LONGEST, int(shares[longer.argmax()]) if longer.any() else most)
