"""Tokenised samples: files of records become one table on the disk, from which batches are taken.

1. rows of a file     -> input_ids, labels; tokenised in batches and cached on the disk (`datasets`)
2. tokenised files    -> Samples: one table, sample i of source s(i)
3. sample numbers     -> a global batch (bilevel.data.stream draws them, bilevel.data.batches cuts it)
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch

from bilevel.data.batches import NO_ROWS, Batch, MicroBatch, make_micro_batches
from bilevel.data.cache import cached_file, mapped_dataset
from bilevel.data.noise import known_noise
from bilevel.data.notes import counted
from bilevel.data.records import read_rows, row_notes
from bilevel.data.tokenise import Tokeniser
from bilevel.errors import DataError
from bilevel.files import content_hash
from bilevel.processes import ALONE, World

TOKENS_VERSION = 2  # part of the cache key; raise it when tokens change for the same rows


class Samples:
    """Tokenised samples of one or more sources, numbered 0..N-1, sources in order of name.

    dropped: for each file, the number of records without a supervised token; read: SHA-256 and number of records of
    each file; notes: for each file, lines to show at the start of a run.
    """

    def __init__(
        self,
        files: list[Path],
        tables: list[datasets.Dataset],
        dropped: list[int],
        read: Sequence[tuple[str, int]] = (),
        notes: Sequence[list[str]] = (),
    ):
        self.files, self.dropped, self.read = files, dropped, read
        self.notes = notes or [[] for _ in files]
        self.sources = [file.stem for file in files]
        self.fingerprints = {file.name: table._fingerprint for file, table in zip(files, tables, strict=True)}
        self.table = datasets.concatenate_datasets(tables)  # mapped from the disk
        self.tokens = self.table.select_columns(["input_ids", "labels"])
        self.sizes = torch.tensor([len(table) for table in tables])  # (S,)
        noisy = known_noise([self.table.data.column("is_noisy")])
        self.is_noisy = noisy[0] if noisy else None  # (N,) bool, or None if no record is marked as noisy

    def __len__(self) -> int:
        return len(self.table)

    def changed(self, change: Callable[[dict[str, list[list[int]]]], dict[str, list[list[int]]]]) -> "Samples":
        """The same samples with other tokens: `change` is given some rows' input_ids and labels, and returns theirs."""
        other = copy.copy(self)
        other.tokens = self.tokens.map(change, batched=True, features=self.tokens.features, load_from_cache_file=False)
        return other

    @functools.cached_property
    def source_ids(self) -> torch.Tensor:
        """(N,) source of every sample, in two bytes each; made when per-source weights ask for it."""
        dtype = np.int16 if len(self.sizes) <= 2**15 else np.int32
        return torch.from_numpy(np.repeat(np.arange(len(self.sizes), dtype=dtype), self.sizes.numpy()))

    @property
    def all_ids(self) -> torch.Tensor:
        """(N,) int64."""
        return torch.arange(len(self))

    def sources_of(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """(B,) int64 sources of the samples (B,)."""
        return torch.bucketize(sample_ids, self.sizes.cumsum(0), right=True)

    def records(self, part: slice) -> np.ndarray:
        """(n,) int64: for each sample of this slice, the place of its record in its file, from 0."""
        return self.table.data.column("index")[part].to_numpy()

    def places(self, sample_ids: torch.Tensor) -> str:
        """The records of these samples as text: each file with their places in it, from 0."""
        by_file: dict[str, set[int]] = {}
        records = self.table.select_columns(["index"])[sample_ids.tolist()]["index"]
        for source, record in zip(self.sources_of(sample_ids).tolist(), records, strict=True):
            by_file.setdefault(str(self.files[source]), set()).add(record)
        return "; ".join(f"{file}: {', '.join(map(str, sorted(found)))}" for file, found in sorted(by_file.items()))

    def in_order(self, token_budget: int, world: World = ALONE, chunk: int = 1024) -> Iterator[MicroBatch]:
        """This rank's micro-batches of all samples, `chunk` samples sorted by length at a time."""
        for sample_ids in self.all_ids.split(chunk):
            yield from self.batch(sample_ids, token_budget, world).micro_batches

    def batch(
        self,
        sample_ids: torch.Tensor,
        token_budget: int,
        world: World = ALONE,
        counts: torch.Tensor | None = None,
        drawn: int | None = None,
    ) -> Batch:
        """A global batch of these samples (n,), cut for this rank by make_micro_batches.

        counts (n,) and drawn as in Batch; None means that every sample drawn is computed.
        """
        counts = torch.ones(len(sample_ids), dtype=torch.float64) if counts is None else counts
        drawn = len(sample_ids) if drawn is None else drawn
        rows = self.tokens[sample_ids.tolist()] if len(sample_ids) else NO_ROWS
        return Batch(sample_ids, make_micro_batches(rows, sample_ids, counts, token_budget, world), counts, drawn)


def load_samples(files: list[Path], format: str, tokeniser: Tokeniser) -> Samples:
    """Read, check and tokenise files, from the cache where they have been seen. Raises DataError."""
    tables, dropped, read, notes = [], [], [], []
    for file in files:
        content, rows = content_hash(file), read_rows(file, format)
        key = hashlib.sha256(f"{rows._fingerprint} {tokeniser.fingerprint} {TOKENS_VERSION}".encode())
        try:
            table = _tokenised(rows, tokeniser, key.hexdigest()[:32])
            lines = counted(table.data.column("index"), table.data.column("notes"))
        except DataError as error:
            raise DataError(f"{file}, {error}") from None
        if not len(table):
            raise DataError(
                f"{file}: no record has a supervised token within max_length {tokeniser.max_length}; "
                "raise max_length or check the responses"
            )
        tables.append(table.remove_columns("notes"))
        read.append((content, len(rows)))
        notes.append([*row_notes(file, format), *lines])
        index = table.data.column("index").to_numpy()  # in rising order
        dropped.append(len(rows) - 1 - np.count_nonzero(np.diff(index)))
    return Samples(files, tables, dropped, read, notes)


def _tokenised(rows: datasets.Dataset, tokeniser: Tokeniser, key: str) -> datasets.Dataset:
    """The samples of a file's rows, from the cache under this key. Raises DataError."""
    tokenise = functools.partial(
        rows.map,
        tokeniser,
        batched=True,
        remove_columns=rows.column_names,
        features=datasets.Features({**TOKEN_FEATURES, "notes": datasets.Value("string")}),
        load_from_cache_file=False,
        new_fingerprint=key,
    )
    file = cached_file("tokens", key, lambda new: tokenise(cache_file_name=str(new)))
    return tokenise(keep_in_memory=True) if file is None else mapped_dataset(file, key)


TOKEN_FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),
        "is_noisy": datasets.Value("bool"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
    }
)
