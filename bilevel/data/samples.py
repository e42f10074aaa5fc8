"""Rows -> tokenised samples -> a resumable stream of global batches -> micro-batches.

1. rows of a file     -> input_ids, labels; tokenised in batches and cached on disk (`datasets`)
2. tokenised files    -> Samples: one table, sample i of source s(i)
3. (n, batch, seed)   -> BatchStream: batches of sample numbers, every sample once per epoch
4. a batch            -> micro-batches (B, T) of similar length under a budget of padded tokens
"""

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch

from bilevel.data.notes import Notes, kept
from bilevel.data.records import read_rows, row_notes
from bilevel.data.tokenise import IGNORE, Tokeniser
from bilevel.errors import DataError
from bilevel.files import content_hash
from bilevel.processes import ALONE, World

TOKENS_VERSION = 2  # part of the cache key; raise it when tokens change for the same rows


@dataclasses.dataclass
class MicroBatch:
    """Rows of similar length, right-padded; position t of a row predicts targets[t].

    input_ids (B, T) int64; targets (B, T) int64, IGNORE where no loss is taken; sample_ids (B,) int64; places (B,)
    int64, where the row stands in its global batch, or -1 for a row that only fills up this rank's share.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    sample_ids: torch.Tensor
    places: torch.Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """Move what the model reads; the rest stays on the CPU, where x is."""
        return dataclasses.replace(self, input_ids=self.input_ids.to(device), targets=self.targets.to(device))


@dataclasses.dataclass
class Batch:
    """A global batch: the numbers (n,) of all its samples, and this rank's share of them in micro-batches.

    counts (n,) float64: how many drawn samples each stands for, of which there were `drawn` (bilevel.weights.sampling);
    where nothing is left out, 1 and n.
    """

    sample_ids: torch.Tensor
    micro_batches: list[MicroBatch]
    counts: torch.Tensor | None = None
    drawn: int | None = None

    def __post_init__(self):
        if self.counts is None:
            self.counts = torch.ones(len(self.sample_ids), dtype=torch.float64)
            self.drawn = len(self.sample_ids)

    def mean(self, values: torch.Tensor) -> float:
        """Of values (n,), each as often as it counts; nan where nothing is computed."""
        return float((self.counts * values).sum() / self.counts.sum())

    def counts_of(self, micro: MicroBatch) -> torch.Tensor:
        """Of the rows of one of its micro-batches, (B,) float64; 0 of a row that only fills up."""
        real = micro.places >= 0
        counts = torch.zeros(len(micro.places), dtype=torch.float64)
        counts[real] = self.counts[micro.places[real]]
        return counts

    def collect(self, losses: list[torch.Tensor], world: World) -> torch.Tensor:
        """(n,) on the CPU and equal on all ranks: the losses (B,) of every rank's micro-batches in place."""
        whole = torch.zeros(len(self.sample_ids), dtype=losses[0].dtype)
        for batch, loss in zip(self.micro_batches, losses, strict=True):
            real = batch.places >= 0
            whole[batch.places[real]] = loss.detach().cpu()[real]
        return world.sum(whole)


class Samples:
    """Tokenised samples of one or more sources, numbered 0..N-1, sources in order of name.

    dropped: the records of each file without a supervised token; read: SHA-256 and number of records of each file;
    notes: what is worth saying of each file at the start, in lines.
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
        self.is_noisy = _known_noise(self.table.data.column("is_noisy"))  # (N,) bool, or None where nobody says

    def __len__(self) -> int:
        return len(self.table)

    def changed(self, change: Callable[[dict[str, list[list[int]]]], dict[str, list[list[int]]]]) -> "Samples":
        """The same samples with other tokens: `change` is given some rows' input_ids and labels, and returns theirs."""
        other = copy.copy(self)
        other.tokens = self.tokens.map(change, batched=True, features=self.tokens.features)
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
        """(n,) int64, of this part of the samples: the place of each one's record in its file."""
        return self.table.data.column("index")[part].to_numpy()

    def places(self, sample_ids: torch.Tensor) -> str:
        """Where the records of these samples stand: each file with their places in it, from 0."""
        by_file: dict[str, set[int]] = {}
        records = self.table.select_columns(["index"])[sample_ids.tolist()]["index"]
        for source, record in zip(self.sources_of(sample_ids).tolist(), records, strict=True):
            by_file.setdefault(str(self.files[source]), set()).add(record)
        return "; ".join(f"{file}: {', '.join(map(str, sorted(found)))}" for file, found in sorted(by_file.items()))

    def in_order(self, token_budget: int, world: World = ALONE, chunk: int = 1024) -> Iterator[MicroBatch]:
        """This rank's micro-batches of all samples, `chunk` samples sorted by length at a time."""
        for sample_ids in self.all_ids.split(chunk):
            yield from self.batch(sample_ids, token_budget, world).micro_batches

    def batch(self, sample_ids: torch.Tensor, token_budget: int, world: World = ALONE) -> Batch:
        """Sort a batch by length, deal it to the ranks in turn, and cut each share into micro-batches.

        Every rank gets as many micro-batches of as many rows, whatever the batch: the cuts are those of the longest
        share, and rows without targets fill up the others. A micro-batch holds at most token_budget padded tokens
        (or one row). Without any sample there is one micro-batch, whose row only fills up.
        """
        if not len(sample_ids):
            return Batch(sample_ids, [_pad({}, np.array([-1]), torch.zeros(1, dtype=torch.int64))])
        rows = self.tokens[sample_ids.tolist()]
        # The last token predicts nothing, so a row of n tokens has n - 1 inputs.
        lengths = np.array([len(ids) - 1 for ids in rows["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        filled = np.pad(order, (0, -len(order) % world.size), constant_values=-1)
        shares = filled.reshape(-1, world.size)
        micro_batches = [
            _pad(rows, shares[start:end, world.rank], sample_ids)
            for start, end in cuts(lengths[shares[:, 0]], token_budget)
        ]
        return Batch(sample_ids, micro_batches)


def load_samples(files: list[Path], format: str, tokeniser: Tokeniser) -> Samples:
    """Read, check and tokenise files, from the cache where they have been seen. Raises DataError."""
    tables, dropped, read, notes = [], [], [], []
    for file in files:
        content, rows = content_hash(file), read_rows(file, format)
        key = hashlib.sha256(f"{rows._fingerprint} {tokeniser.fingerprint} {TOKENS_VERSION}".encode())
        tokeniser.notes = Notes()
        try:
            table = rows.map(
                tokeniser,
                batched=True,
                remove_columns=["roles", "contents", "more"],
                features=TOKEN_FEATURES,
                new_fingerprint=key.hexdigest()[:32],
            )
        except DataError as error:
            raise DataError(f"{file}, {error}") from None
        if not len(table):
            raise DataError(
                f"{file}: no record has a supervised token within max_length {tokeniser.max_length}; "
                "raise max_length or check the responses"
            )
        tables.append(table)
        read.append((content, len(rows)))
        said = kept(tokeniser.notes, key.hexdigest()[:32])
        notes.append([*row_notes(file, format).lines(), *said.lines()])
        index = table.data.column("index").to_numpy()  # rises
        dropped.append(len(rows) - 1 - np.count_nonzero(np.diff(index)))
    return Samples(files, tables, dropped, read, notes)


def cuts(lengths: np.ndarray, token_budget: int) -> list[tuple[int, int]]:
    """Where to cut rows of falling lengths (n,) into micro-batches: [start, end) each, the longest row first.

    The cheapest by the cost model: a micro-batch costs its padded tokens and a 32nd of the budget for its own
    overhead, and holds at most token_budget padded tokens (or one row). Dynamic programming over the last cut.
    """
    n, overhead = len(lengths), token_budget / 32
    cost, previous = np.zeros(n + 1), np.zeros(n + 1, dtype=int)
    for end in range(1, n + 1):
        starts = np.arange(end)
        tokens = (end - starts) * lengths[:end]
        total = cost[:end] + tokens + overhead
        total[(tokens > token_budget) & (starts < end - 1)] = np.inf
        previous[end] = total.argmin()
        cost[end] = total[previous[end]]
    found, end = [], n
    while end:
        found.append((int(previous[end]), end))
        end = int(previous[end])
    return found[::-1]


TOKEN_FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),
        "is_noisy": datasets.Value("bool"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
    }
)


def _pad(rows: dict[str, list[list[int]]], places: np.ndarray, sample_ids: torch.Tensor) -> MicroBatch:
    """The rows at these places of the batch; -1 is a row of one token and no target."""
    width = max((len(rows["input_ids"][i]) - 1 for i in places if i >= 0), default=1)
    input_ids = np.zeros((len(places), width), dtype=np.int64)
    targets = np.full((len(places), width), IGNORE, dtype=np.int64)
    for row, i in enumerate(places):
        if i >= 0:
            ids, labels = rows["input_ids"][i], rows["labels"][i]
            input_ids[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = labels[1:]
    where = torch.from_numpy(places)
    return MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(targets), sample_ids[where.clamp_min(0)], where)


def _known_noise(column: pa.ChunkedArray) -> np.ndarray | None:
    """is_noisy of every sample where any record says so (silence then means clean), else None."""
    return column.fill_null(False).to_numpy() if pa.compute.any(column).as_py() else None
