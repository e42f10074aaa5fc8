"""Counts of suspicious records in a selection: duplicates, and empty or nearly empty responses."""

import dataclasses
import hashlib
import itertools

import numpy as np

from bilevel.data.records import rows_table
from bilevel.run.finished import FinishedRun

LETTERS = 2  # a response with at most this many letters and digits is nearly empty


@dataclasses.dataclass(frozen=True)
class Quality:
    """Numbers of records.

    repeated: equal to an earlier record, apart from white space and case. empty: the response has no letter or digit.
    near_empty: it has one or two.
    """

    repeated: int
    empty: int
    near_empty: int


def look(run: FinishedRun, chosen: np.ndarray) -> Quality:
    """Count among the chosen records (N,) bool. Texts are compared by a 64-bit hash. Raises DataError."""
    from tqdm import tqdm

    hashes, letters = np.empty(len(chosen), dtype=np.uint64), np.zeros(len(chosen), dtype=np.int8)
    before = 0
    with tqdm(total=len(chosen), unit="record", desc="looking for duplicates", disable=None, leave=False) as bar:
        for file, source in zip(run.train, run.sources, strict=True):
            for batch in rows_table(source).to_batches():
                places = before + batch["index"].to_numpy()
                here = np.flatnonzero(chosen[places])
                for i, row in zip(places[here], batch.take(here).to_pylist(), strict=True):
                    hashes[i] = _hash(row["contents"])
                    letters[i] = _letters(row["roles"], row["contents"])
                bar.update(len(batch))
            before += file.records
    hashes, letters = hashes[chosen], letters[chosen]
    return Quality(
        repeated=len(hashes) - len(np.unique(hashes)),
        empty=int((letters == 0).sum()),
        near_empty=int(((letters > 0) & (letters <= LETTERS)).sum()),
    )


def _hash(contents: list[str]) -> int:
    text = "\0".join(" ".join(content.casefold().split()) for content in contents)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _letters(roles: list[str], contents: list[str]) -> int:
    """Number of letters and digits in the responses, counted up to LETTERS + 1."""
    responses = (c for role, c in zip(roles, contents, strict=True) if role in ("response", "assistant", "text"))
    found = filter(str.isalnum, itertools.chain.from_iterable(responses))
    return len(list(itertools.islice(found, LETTERS + 1)))
