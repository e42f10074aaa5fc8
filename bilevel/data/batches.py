"""A global batch of samples, cut into micro-batches of similar length for the processes of a run."""

import dataclasses
import functools
from typing import TypeAlias

import numpy as np
import torch

from bilevel.data.packing import deal
from bilevel.data.tokenise import IGNORE
from bilevel.processes import World, moved


@dataclasses.dataclass
class Supervised:
    """The tokens (M,) of a micro-batch that have a loss, row by row.

    positions: their places in the flattened (B * T,) inputs; targets: the token that each predicts; rows: the row of
    each; sizes (B,): the number of each row. All are int64.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    sizes: torch.Tensor


@dataclasses.dataclass
class Bounds:
    """Where the rows of a packed micro-batch begin and end.

    position_ids (1, T) int64: the place of each token in its row; cu_seq_lens (B + 1,) int64: the row bounds, from 0 to
    T; longest: tokens of the longest row.
    """

    position_ids: torch.Tensor
    cu_seq_lens: torch.Tensor
    longest: int


@dataclasses.dataclass
class MicroBatch:
    """Rows that share a pass, either padded on the right or packed; position t of a row predicts targets[t].

    Padded, the default: B rows of similar length, T tokens each with their padding; input_ids (B, T) int64, targets
    (B, T) int64, IGNORE where no loss is taken. Packed: the B rows stand one after another in one sequence of T tokens
    without padding; input_ids and targets are (1, T), and lengths (B,) int64 has the tokens of each row.

    sample_ids (B,) int64; places (B,) int64, where the row stands in its global batch, or -1 for a row that only fills
    up this rank's share; counts (B,) float64, how many drawn samples the row stands for (bilevel.weights.sampling), 0
    for a row that only fills up.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    sample_ids: torch.Tensor
    places: torch.Tensor
    counts: torch.Tensor
    lengths: torch.Tensor | None = None

    @functools.cached_property
    def supervised(self) -> Supervised:
        """The tokens that have a loss, found on the CPU: a GPU would make the host wait for their number."""
        positions = (self.targets != IGNORE).flatten().nonzero()[:, 0]
        number = len(self.sample_ids)
        rows = torch.arange(number).repeat_interleave(self.row_lengths)[positions]
        return Supervised(positions, self.targets.flatten()[positions], rows, rows.bincount(minlength=number))

    @property
    def row_lengths(self) -> torch.Tensor:
        """Tokens that each row takes in a pass, its padding included, (B,) int64 on the CPU."""
        if self.lengths is not None:
            return self.lengths
        rows, length = self.targets.shape
        return torch.full((rows,), length)

    @functools.cached_property
    def bounds(self) -> Bounds | None:
        """Where the rows are, if they are packed."""
        if self.lengths is None:
            return None
        ends = self.lengths.cumsum(0)
        positions = torch.arange(int(ends[-1])) - (ends - self.lengths).repeat_interleave(self.lengths)
        return Bounds(positions[None], torch.nn.functional.pad(ends, (1, 0)), int(self.lengths.max()))

    def to(self, device: torch.device) -> "MicroBatch":
        """Move what a pass reads, input_ids, supervised and bounds, in one copy; the rest stays on the CPU, as x is."""
        parts = [getattr(self.supervised, field.name) for field in dataclasses.fields(Supervised)]
        marks = [self.bounds.position_ids, self.bounds.cu_seq_lens] if self.bounds else []
        input_ids, *both = moved([self.input_ids, *parts, *marks], device)
        there = dataclasses.replace(self, input_ids=input_ids)
        there.supervised = Supervised(*both[: len(parts)])
        there.bounds = Bounds(*both[len(parts) :], self.bounds.longest) if self.bounds else None
        return there


@dataclasses.dataclass
class Batch:
    """A global batch: the numbers (n,) of all its samples, and this rank's share of them in micro-batches.

    counts (n,) float64: how many drawn samples each stands for (bilevel.weights.sampling); drawn: how many were drawn,
    |B|. Unless samples are left out, counts are 1 and drawn is n. rows: the samples' tokens, before they are padded.
    fresh: of a validation batch, those of its samples that training samples are compared with
    (bilevel.data.stream.TrustedStream); None at a step that compares nothing.
    """

    sample_ids: torch.Tensor
    micro_batches: list[MicroBatch]
    counts: torch.Tensor
    drawn: int
    rows: "Rows | None" = None
    fresh: "Batch | None" = None

    def mean(self, values: torch.Tensor) -> float:
        """Mean of values (n,), each weighted by its count; NaN if no sample is computed."""
        return float((self.counts * values).sum() / self.counts.sum())

    def collect(self, losses: list[torch.Tensor], world: World) -> torch.Tensor:
        """The losses (B,) of every rank's micro-batches in the batch's order: (n,) on their device, equal on all ranks.

        A sample that another rank computes is a zero here until the sum over the ranks.
        """
        places = torch.cat([micro.places for micro in self.micro_batches])
        taken = torch.full((len(self.sample_ids),), len(places))
        taken[places[places >= 0]] = (places >= 0).nonzero()[:, 0]
        known = torch.cat([*(loss.detach() for loss in losses), losses[0].new_zeros(1)])
        return world.sum(known.index_select(0, *moved([taken], known.device)))


Rows: TypeAlias = dict[str, list[list[int]]]  # input_ids and labels of each row
NO_ROWS: Rows = {"input_ids": [], "labels": []}


def joined(batches: list[Batch], groups: list[int], token_budget: int, world: World, packed: bool = False) -> Batch:
    """One batch of the rows of several, one batch after another; a sample can occur more than once.

    groups: a number for each batch. In a micro-batch rows of a lower group stand before those of a higher one. packed:
    as in make_micro_batches.
    """
    rows = {name: [row for batch in batches for row in batch.rows[name]] for name in NO_ROWS}
    sample_ids, counts = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("sample_ids", "counts"))
    group = np.repeat(groups, [len(batch.sample_ids) for batch in batches])
    micro_batches = make_micro_batches(rows, sample_ids, counts, token_budget, world, group, packed)
    return Batch(sample_ids, micro_batches, counts, sum(batch.drawn for batch in batches), rows)


def make_micro_batches(
    rows: Rows,
    sample_ids: torch.Tensor,
    counts: torch.Tensor,
    token_budget: int,
    world: World,
    group: np.ndarray | None = None,
    packed: bool = False,
) -> list[MicroBatch]:
    """Deal the rows of a batch to the ranks, and cut this rank's share.

    Every rank gets as many micro-batches, whatever the batch, and nearly as many tokens; rows of one token without a
    target fill up where rows are missing. A micro-batch holds at most token_budget tokens, padding included, or one
    row. Without any row there is one micro-batch, whose only row fills up. counts (n,) as in Batch. group (n,): in a
    micro-batch rows of a lower group stand first, and those that fill up last. packed: rows stand one after another in
    one sequence, without padding; otherwise they are padded.
    """
    build = _pack if packed else _pad
    if not len(sample_ids):
        none = torch.zeros(1, dtype=torch.int64)
        return [build(rows, np.array([-1]), none, none.double())]
    # The last token predicts nothing, so a row of n tokens has n - 1 inputs.
    lengths = np.array([len(ids) - 1 for ids in rows["input_ids"]])
    if packed:
        parts = [np.array(shares[world.rank] or [-1]) for shares in deal(lengths, token_budget, world.size)]
    else:
        parts = _similar(lengths, token_budget, world)
    if group is not None:
        parts = [
            places[np.argsort(np.where(places < 0, group.max(), group[places]), kind="stable")] for places in parts
        ]
    return [build(rows, places, sample_ids, counts) for places in parts]


def _similar(lengths: np.ndarray, token_budget: int, world: World) -> list[np.ndarray]:
    """The places of this rank's rows in each micro-batch of rows of similar length; -1 for rows that fill up.

    Rows sorted by length are dealt in turn, from the first rank to the last and back. All ranks cut where the longest
    share is cut best.
    """
    order = np.argsort(-lengths, kind="stable")
    shares = np.pad(order, (0, -len(order) % world.size), constant_values=-1).reshape(-1, world.size)
    marks = cuts(lengths[shares[:, 0]], token_budget)
    shares[1::2] = shares[1::2, ::-1].copy()
    return [shares[start:end, world.rank] for start, end in marks]


def cuts(lengths: np.ndarray, token_budget: int) -> list[tuple[int, int]]:
    """Where to cut rows of falling lengths (n,) into micro-batches: [start, end) each, the longest row first.

    These are the cheapest cuts if a micro-batch costs its padded tokens and, for its own overhead, a 32nd of the
    budget, and holds at most token_budget padded tokens (or one row). Found by dynamic programming over the last cut.
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


def _pad(rows: Rows, places: np.ndarray, sample_ids: torch.Tensor, counts: torch.Tensor) -> MicroBatch:
    """The rows at these places of the batch, padded; -1 is a row of one token and no target."""
    width = max((len(rows["input_ids"][i]) - 1 for i in places if i >= 0), default=1)
    input_ids = np.zeros((len(places), width), dtype=np.int64)
    targets = np.full((len(places), width), IGNORE, dtype=np.int64)
    for row, i in enumerate(places):
        if i >= 0:
            ids, labels = rows["input_ids"][i], rows["labels"][i]
            input_ids[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = labels[1:]
    return _micro_batch(input_ids, targets, places, sample_ids, counts)


def _pack(rows: Rows, places: np.ndarray, sample_ids: torch.Tensor, counts: torch.Tensor) -> MicroBatch:
    """The rows at these places of the batch, one after another; -1 is a row of one token and no target."""
    inputs = [rows["input_ids"][i][:-1] if i >= 0 else [0] for i in places]
    targets = [rows["labels"][i][1:] if i >= 0 else [IGNORE] for i in places]
    lengths = torch.tensor([len(ids) for ids in inputs])
    input_ids, targets = (np.concatenate(parts).astype(np.int64)[None] for parts in (inputs, targets))
    return _micro_batch(input_ids, targets, places, sample_ids, counts, lengths)


def _micro_batch(
    input_ids: np.ndarray,
    targets: np.ndarray,
    places: np.ndarray,
    sample_ids: torch.Tensor,
    counts: torch.Tensor,
    lengths: torch.Tensor | None = None,
) -> MicroBatch:
    where = torch.from_numpy(places)
    at = where.clamp_min(0)
    ids, wanted = torch.from_numpy(input_ids), torch.from_numpy(targets)
    return MicroBatch(ids, wanted, sample_ids[at], where, counts[at] * (where >= 0), lengths)
