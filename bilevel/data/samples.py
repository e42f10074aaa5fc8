"""Tokenised samples: files of records become one table on the disk, from which batches are taken.

1. rows of a file     -> input_ids, labels; tokenised in batches and cached on the disk
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
import pyarrow.compute
import torch

from bilevel.data.bad_records import KEPT, BadRecords
from bilevel.data.batches import NO_ROWS, Batch, MicroBatch, make_micro_batches
from bilevel.data.cache import ROWS, cached_dataset, write_selected
from bilevel.data.noise import known_noise
from bilevel.data.notes import counted
from bilevel.data.progress import Progress
from bilevel.data.records import Part, parts, problems, read_as, records_of, row_notes, shifted
from bilevel.data.sources import Source
from bilevel.data.tokenise import IGNORE, Tokeniser
from bilevel.data.workers import in_order
from bilevel.errors import DataError
from bilevel.processes import ALONE, World

LONG = 1 << 19  # bytes of text that are tokenised at a time; as lists of numbers they take fifty times as much
TOKENS_VERSION = 3  # part of the cache key; raise it when tokens change for the same rows


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
        packed: bool = False,
    ) -> Batch:
        """A global batch of these samples (n,), cut for this rank by make_micro_batches, which explains packed.

        counts (n,) and drawn as in Batch; None means that every sample drawn is computed.
        """
        counts = torch.ones(len(sample_ids), dtype=torch.float64) if counts is None else counts
        drawn = len(sample_ids) if drawn is None else drawn
        rows = self.tokens[sample_ids.tolist()] if len(sample_ids) else NO_ROWS
        micro_batches = make_micro_batches(rows, sample_ids, counts, token_budget, world, packed=packed)
        return Batch(sample_ids, micro_batches, counts, drawn, rows)


def token_counts(samples: Samples, part: slice) -> tuple[int, int]:
    """Number of tokens of these samples, and of those that are learned."""
    tokens = learned = 0
    for labels in samples.table.data.column("labels").slice(part.start, part.stop - part.start).chunks:
        flat = pyarrow.compute.list_flatten(labels)
        tokens += len(flat)
        learned += pyarrow.compute.sum(pyarrow.compute.not_equal(flat, IGNORE)).as_py() or 0
    return tokens, learned


def load_samples(sources: list[Source], tokeniser: Tokeniser) -> Samples:
    """Read, check and tokenise sources, from the cache where they have been seen.

    Raises BadRecords with the records of all sources that the chat template refuses, and DataError.
    """
    loaded, lines, count = [], [], 0
    for source in sources:
        try:
            loaded.append(_loaded(source, tokeniser))
        except BadRecords as error:
            lines, count = lines + error.lines, count + error.count
    if count:
        raise BadRecords(lines, count)
    tables, dropped, read, notes, words, unread = zip(*loaded, strict=True)
    return Samples(sources, *map(list, (tables, dropped, read, notes, words, unread)))


def _loaded(source: Source, tokeniser: Tokeniser) -> tuple[datasets.Dataset, int, tuple[str, int], list[str], str, int]:
    """The samples of a source, and what Samples says of it: dropped, read, notes, read_as, unread. Raises DataError."""
    found = parts(source)
    tokenised = [_tokenised(part, tokeniser, source.reading.skip_bad_records) for part in found]
    refused = [f"{part.place}, {line}" for part, (_, lines) in zip(found, tokenised, strict=True) for line in lines]
    if refused and len(left_out := problems(source) + refused) > source.reading.skip_bad_records:
        raise BadRecords(left_out, len(left_out))
    table = _joined([table for table, _ in tokenised], found)
    if not len(table):
        raise DataError(
            f"{source}: no record has a supervised token within max_length {tokeniser.max_length}; "
            "raise max_length or check the responses"
        )
    lines = [*row_notes(source, refused), *counted(table.data.column("index"), table.data.column("notes"))]
    lines += _as_long(table, found, tokeniser.max_length)
    index = table.data.column("index").to_numpy()  # in rising order
    rows = sum(part.table.num_rows for part in found) - len(refused)
    unread, dropped = records_of(source) - rows, rows - 1 - np.count_nonzero(np.diff(index))
    return table.remove_columns("notes"), dropped, (source.content, records_of(source)), lines, read_as(source), unread


def _as_long(table: datasets.Dataset, found: list[Part], max_length: int) -> list[str]:
    """A line if samples are as long as max_length, where records end; the pieces of a text go on in the next one."""
    if any(part.table.num_rows and part.table["roles"][0].as_py() == ["text"] for part in found):
        return []
    lengths = pyarrow.compute.list_value_length(table.data.column("input_ids"))
    count = pyarrow.compute.sum(pyarrow.compute.equal(lengths, max_length)).as_py() or 0
    if not count:
        return []
    return [f"{count:,} of {len(table):,} samples fill max_length {max_length}; what is beyond it is cut off"]


def _joined(tables: list[datasets.Dataset], found: list[Part]) -> datasets.Dataset:
    """The samples of all places of a source, with the index of their records in the source."""
    if len(tables) == 1 and not found[0].before:
        return tables[0]
    whole = pyarrow.concat_tables(
        [shifted(table.data.table, part.before) for table, part in zip(tables, found, strict=True)]
    )
    key = hashlib.sha256(" ".join(table._fingerprint for table in tables).encode()).hexdigest()[:32]
    return datasets.Dataset(datasets.table.InMemoryTable(whole), fingerprint=key)


def _tokenised(part: Part, tokeniser: Tokeniser, most: int) -> tuple[datasets.Dataset, list[str]]:
    """The samples of a part's rows, from the cache, and a line for each record that the chat template refuses.

    Raises BadRecords if the template refuses more than `most`, and DataError.
    """
    key = hashlib.sha256(f"{part.key} {tokeniser.fingerprint} {TOKENS_VERSION}".encode()).hexdigest()[:32]
    try:
        table = cached_dataset("tokens", key, functools.partial(_write, part, tokeniser, most))
    except BadRecords:
        raise
    except DataError as error:
        raise DataError(f"{part.place}, {error}") from None
    problem = table.data.column("problem")
    if refused := problem.drop_null().to_pylist():
        good = pyarrow.compute.indices_nonzero(problem.is_null()).to_numpy()
        key = hashlib.sha256(f"{key} without those refused".encode()).hexdigest()[:32]
        table = cached_dataset("tokens", key, functools.partial(write_selected, table.data.table, good))
    return table.remove_columns("problem"), refused


def _write(part: Part, tokeniser: Tokeniser, most: int, sink: pyarrow.NativeFile) -> None:
    """Tokenise the rows of a part. Raises BadRecords if the chat template refuses more than `most`, and DataError."""

    def tokenised(rows: slice) -> pyarrow.RecordBatch:
        found = tokeniser(part.table.slice(rows.start, rows.stop - rows.start).to_pydict())
        return pyarrow.RecordBatch.from_pydict(found, schema=schema)

    schema = datasets.Features({**TOKEN_FEATURES, **_MESSAGES}).arrow_schema
    lines, count, slices = [], 0, list(_slices(part.table))
    progress = Progress("tokenising", part.place, part.table.num_rows, "records")
    with pyarrow.ipc.new_stream(sink, schema) as writer, progress:
        for rows, batch in zip(slices, in_order(tokenised, slices), strict=True):
            writer.write_batch(batch)
            progress.update(rows.stop - rows.start)
            refused = [f"{part.place}, {problem}" for problem in batch["problem"].drop_null().to_pylist()]
            lines, count = (lines + refused)[:KEPT], count + len(refused)
    if count > most:
        raise BadRecords(lines, count)


def _slices(table: pyarrow.Table) -> Iterator[slice]:
    """The rows of a table, ROWS at a time, or fewer if they are long."""
    end = 0
    for batch in table.to_batches():
        start, end = end, end + batch.num_rows
        step = max(1, min(ROWS, batch.num_rows * LONG // max(1, batch.nbytes)))
        yield from (slice(first, min(end, first + step)) for first in range(start, end, step))


TOKEN_FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),
        "is_noisy": datasets.Value("bool"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
    }
)
_MESSAGES = {"notes": datasets.Value("string"), "problem": datasets.Value("string")}
