"""Tokenised samples: files of records become one table on the disk, from which batches are taken.

1. rows of a file     -> input_ids, labels; tokenised in batches and cached on the disk (`datasets`)
2. tokenised files    -> Samples: one table, sample i of source s(i)
3. sample numbers     -> a global batch (bilevel.data.stream draws them, bilevel.data.batches cuts it)
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence

import datasets
import numpy as np
import pyarrow
import torch

from bilevel.data.bad_records import BadRecords
from bilevel.data.batches import NO_ROWS, Batch, MicroBatch, make_micro_batches
from bilevel.data.cache import cached_file, mapped_dataset
from bilevel.data.noise import known_noise
from bilevel.data.notes import counted
from bilevel.data.records import Part, parts, read_as, records_of, row_notes, shifted
from bilevel.data.sources import Source
from bilevel.data.tokenise import Tokeniser
from bilevel.errors import DataError
from bilevel.processes import ALONE, World

ROWS = 1000  # tokenised at a time, as `datasets` does
TOKENS_VERSION = 2  # part of the cache key; raise it when tokens change for the same rows


class Samples:
    """Tokenised samples of one or more sources, numbered 0..N-1, sources in order of name.

    dropped: for each file, the number of records without a supervised token; read: SHA-256 and number of records of
    each file; unread: for each file, the number of records that are left out or not drawn; notes: for each file, lines
    to show at the start of a run; read_as: for each file, its layout in words.
    """

    def __init__(
        self,
        files: list[Source],
        tables: list[datasets.Dataset],
        dropped: list[int],
        read: Sequence[tuple[str, int]] = (),
        notes: Sequence[list[str]] = (),
        read_as: Sequence[str] = (),
        unread: Sequence[int] = (),
    ):
        self.files, self.dropped, self.read = files, dropped, read
        self.notes, self.read_as = notes or [[] for _ in files], read_as
        self.unread = unread or [0] * len(files)
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
        return Batch(sample_ids, make_micro_batches(rows, sample_ids, counts, token_budget, world), counts, drawn, rows)


def load_samples(sources: list[Source], tokeniser: Tokeniser) -> Samples:
    """Read, check and tokenise sources, from the cache where they have been seen. Raises DataError."""
    tables, dropped, unread, read, notes = [], [], [], [], []
    for source in sources:
        found = parts(source)
        table = _joined([_tokenised(part, tokeniser) for part in found], found)
        if not len(table):
            raise DataError(
                f"{source}: no record has a supervised token within max_length {tokeniser.max_length}; "
                "raise max_length or check the responses"
            )
        lines = counted(table.data.column("index"), table.data.column("notes"))
        tables.append(table.remove_columns("notes"))
        read.append((source.content, records_of(source)))
        notes.append([*row_notes(source), *lines])
        index = table.data.column("index").to_numpy()  # in rising order
        rows = sum(part.table.num_rows for part in found)
        unread.append(records_of(source) - rows)
        dropped.append(rows - 1 - np.count_nonzero(np.diff(index)))
    return Samples(sources, tables, dropped, read, notes, [read_as(source) for source in sources], unread)


def _joined(tables: list[datasets.Dataset], found: list[Part]) -> datasets.Dataset:
    """The samples of all places of a source, with the index of their records in the source."""
    if len(tables) == 1 and not found[0].before:
        return tables[0]
    whole = pyarrow.concat_tables(
        [shifted(table.data.table, part.before) for table, part in zip(tables, found, strict=True)]
    )
    key = hashlib.sha256(" ".join(table._fingerprint for table in tables).encode()).hexdigest()[:32]
    return datasets.Dataset(datasets.table.InMemoryTable(whole), fingerprint=key)


def _tokenised(part: Part, tokeniser: Tokeniser) -> datasets.Dataset:
    """The samples of a part's rows, from the cache. Raises DataError."""
    key = hashlib.sha256(f"{part.key} {tokeniser.fingerprint} {TOKENS_VERSION}".encode()).hexdigest()[:32]
    rows = datasets.Dataset(datasets.table.InMemoryTable(part.table), fingerprint=part.key)
    tokenise = functools.partial(
        rows.map,
        tokeniser,
        batched=True,
        remove_columns=rows.column_names,
        features=datasets.Features({**TOKEN_FEATURES, "notes": datasets.Value("string")}),
        load_from_cache_file=False,
        new_fingerprint=key,
    )
    try:
        file = cached_file("tokens", key, lambda new: tokenise(cache_file_name=str(new)))
        return tokenise(keep_in_memory=True) if file is None else mapped_dataset(file, key)
    except BadRecords:
        raise BadRecords(*_refused(part, rows, tokeniser)) from None
    except DataError as error:
        raise DataError(f"{part.place}, {error}") from None


def _refused(part: Part, rows: datasets.Dataset, tokeniser: Tokeniser) -> tuple[list[str], int]:
    """The first records of a part that the chat template refuses, in words, and the number of all of them."""
    lines: list[str] = []
    count = 0
    for start in range(0, len(rows), ROWS):
        try:
            tokeniser(rows[start : start + ROWS])
        except BadRecords as error:
            lines += [f"{part.place}, {line}" for line in error.lines]
            count += error.count
    return lines, count


TOKEN_FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),
        "is_noisy": datasets.Value("bool"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
    }
)
