"""A global batch of samples, cut into micro-batches of similar length for the processes of a run."""

import dataclasses
import functools
from typing import TypeAlias

import numpy as np
import torch

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
class MicroBatch:
    """Rows of similar length, right-padded; position t of a row predicts targets[t].

    input_ids (B, T) int64; targets (B, T) int64, IGNORE where no loss is taken; sample_ids (B,) int64; places (B,)
    int64, where the row stands in its global batch, or -1 for a row that only fills up this rank's share; counts (B,)
    float64, how many drawn samples the row stands for (bilevel.weights.sampling), 0 for a row that only fills up.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    sample_ids: torch.Tensor
    places: torch.Tensor
    counts: torch.Tensor

    @functools.cached_property
    def supervised(self) -> Supervised:
        """The tokens that have a loss, found on the CPU: a GPU would make the host wait for their number."""
        mask = self.targets != IGNORE
        positions = mask.flatten().nonzero()[:, 0]
        return Supervised(positions, self.targets.flatten()[positions], mask.nonzero()[:, 0], mask.sum(1))

    def to(self, device: torch.device) -> "MicroBatch":
        """Move what a pass reads, input_ids and supervised, in one copy; the rest stays on the CPU, where x is."""
        parts = [getattr(self.supervised, field.name) for field in dataclasses.fields(Supervised)]
        input_ids, *parts = moved([self.input_ids, *parts], device)
        there = dataclasses.replace(self, input_ids=input_ids)
        there.supervised = Supervised(*parts)
        return there


@dataclasses.dataclass
class Batch:
    """A global batch: the numbers (n,) of all its samples, and this rank's share of them in micro-batches.

    counts (n,) float64: how many drawn samples each stands for (bilevel.weights.sampling); drawn: how many were drawn,
    |B|. Unless samples are left out, counts are 1 and drawn is n. rows: the samples' tokens, before they are padded.
    """

    sample_ids: torch.Tensor
    micro_batches: list[MicroBatch]
    counts: torch.Tensor
    drawn: int
    rows: "Rows | None" = None

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


def joined(batches: list[Batch], groups: list[int], token_budget: int, world: World) -> Batch:
    """One batch of the rows of several, one batch after another; a sample can occur more than once.

    groups: a number for each batch. In a micro-batch rows of a lower group stand before those of a higher one.
    """
    rows = {name: [row for batch in batches for row in batch.rows[name]] for name in NO_ROWS}
    sample_ids, counts = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("sample_ids", "counts"))
    group = np.repeat(groups, [len(batch.sample_ids) for batch in batches])
    micro_batches = make_micro_batches(rows, sample_ids, counts, token_budget, world, group)
    return Batch(sample_ids, micro_batches, counts, sum(batch.drawn for batch in batches), rows)


def make_micro_batches(
    rows: Rows,
    sample_ids: torch.Tensor,
    counts: torch.Tensor,
    token_budget: int,
    world: World,
    group: np.ndarray | None = None,
) -> list[MicroBatch]:
    """Sort the rows of a batch by length, deal them to the ranks in turn, and cut this rank's share.

    Every rank gets as many micro-batches of as many rows, whatever the batch: the cuts are those of the longest share,
    and rows without targets fill up the others. A micro-batch holds at most token_budget padded tokens, or one row.
    Without any row there is one micro-batch, whose only row fills up. counts (n,) as in Batch. group (n,): in a
    micro-batch rows of a lower group stand first, and those that fill up last.
    """
    if not len(sample_ids):
        none = torch.zeros(1, dtype=torch.int64)
        return [_pad(rows, np.array([-1]), none, none.double())]
    # The last token predicts nothing, so a row of n tokens has n - 1 inputs.
    lengths = np.array([len(ids) - 1 for ids in rows["input_ids"]])
    order = np.argsort(-lengths, kind="stable")
    filled = np.pad(order, (0, -len(order) % world.size), constant_values=-1)
    shares = filled.reshape(-1, world.size)
    parts = [shares[start:end, world.rank] for start, end in cuts(lengths[shares[:, 0]], token_budget)]
    if group is not None:
        parts = [
            places[np.argsort(np.where(places < 0, group.max(), group[places]), kind="stable")] for places in parts
        ]
    return [_pad(rows, places, sample_ids, counts) for places in parts]


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
    at = where.clamp_min(0)
    return MicroBatch(
        torch.from_numpy(input_ids), torch.from_numpy(targets), sample_ids[at], where, counts[at] * (where >= 0)
    )
