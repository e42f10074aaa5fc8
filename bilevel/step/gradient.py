"""The gradients of weighted means of losses, added up micro-batch by micro-batch."""

import dataclasses
from collections.abc import Callable

import torch

from bilevel.data.batches import Batch, joined
from bilevel.model.adapter_copy import AdapterCopy
from bilevel.model.base_copy import ModelCopy
from bilevel.processes import moved

Factors = Callable[[torch.Tensor], torch.Tensor]  # sample numbers (B,) -> factors (B,) float64


@dataclasses.dataclass
class Part:
    """A part of a step: factor_i l_i of a copy on the samples of a batch. seed: of the dropout masks."""

    copy: ModelCopy
    batch: Batch
    factors: Factors
    seed: int


def add_gradients(parts: list[Part]) -> tuple[list[torch.Tensor], int]:
    """Add the gradient of each part's 1/|B| sum_B factor_i l_i to that of its copy, as all of this step's gradients.

    Returns each part's losses l_i in its batch's order, (n,) on the copies' device, and the number of padded tokens
    that this process has read. Adapters on one frozen model take all rows through it together, unless dropout must have
    the same masks for every copy; other copies compute one part after another.
    """
    if all(isinstance(part.copy, AdapterCopy) and part.copy.one_pass for part in parts):
        return _together(parts)
    losses = []
    for number, part in enumerate(parts):
        last = not any(part.copy is later.copy for later in parts[number + 1 :])
        losses.append(add_gradient(part.copy, part.batch, part.factors, part.seed, last))
    return losses, tokens_read(*[part.batch for part in parts])


def _together(parts: list[Part]) -> tuple[list[torch.Tensor], int]:
    """The same in one forward and backward pass per micro-batch, whose rows are those of all parts."""
    copies = list({part.copy.name: part.copy for part in parts}.values())
    names = [copy.name for copy in copies]
    first = copies[0]
    groups = [names.index(part.copy.name) for part in parts]
    table = joined([part.batch for part in parts], groups, first.token_budget, first.world, first.packed)
    factors = torch.cat([part.factors(part.batch.sample_ids) * part.batch.counts / part.batch.drawn for part in parts])
    group = torch.tensor(groups).repeat_interleave(torch.tensor([len(part.batch.sample_ids) for part in parts]))
    losses = []
    for micro in table.micro_batches:
        real, at = micro.places >= 0, micro.places.clamp_min(0)
        owners = torch.where(real, group[at], len(names) - 1)
        tokens = owners.bincount(micro.row_lengths, len(names)).long()
        shares = dict(zip(names, tokens.tolist(), strict=True))
        (factor,) = moved([factors[at] * real], first.world.device)
        loss = first.shared_losses(micro, shares, parts[0].seed, factor)
        (factor.to(loss.dtype) * loss).sum().backward()
        losses.append(loss.detach())
    for copy in copies:
        copy.sum_gradients()
    found = list(table.collect(losses, first.world).split([len(part.batch.sample_ids) for part in parts]))
    return _equal_where_copies_are(parts, found), tokens_read(table)


def _equal_where_copies_are(parts: list[Part], losses: list[torch.Tensor]) -> list[torch.Tensor]:
    """The losses, with those of equal copies on one batch made equal bit for bit.

    Equal rows at different places of a matrix product can differ in the last bit, and x must not move by that.
    """
    if parts[0].copy.adapters.equal():
        for number, part in enumerate(parts):
            same = next(k for k, earlier in enumerate(parts) if earlier.batch is part.batch)
            losses[number] = losses[same]
    return losses


def add_gradient(copy: ModelCopy, batch: Batch, factors: Factors, seed: int, last: bool) -> torch.Tensor:
    """Add the gradient of 1/|B| sum_B factor_i l_i to the copy's; return all l_i in the batch's order, (n,).

    The losses stay on the copy's device, so that the host need not wait for them here.
    If only n of the |B| drawn samples are computed, each l_i counts for as many samples as it stands for. seed: the
    dropout masks of micro-batch k start from seed + k. last: this is the step's last gradient.
    """
    losses = []
    for number, micro in enumerate(batch.micro_batches):
        (factor,) = moved([factors(micro.sample_ids) * micro.counts / batch.drawn], copy.world.device)
        loss = copy.losses(micro, seed + number, factor)
        copy.backward((factor.to(loss.dtype) * loss).sum(), last and number + 1 == len(batch.micro_batches))
        losses.append(loss.detach())
    return batch.collect(losses, copy.world)


def constant(scale: float) -> Factors:
    """The same factor for every sample."""
    return lambda ids: torch.full((len(ids),), scale, dtype=torch.float64)


def tokens_read(*batches: Batch) -> int:
    """Padded tokens of this process's micro-batches."""
    return sum(micro.input_ids.numel() for batch in batches for micro in batch.micro_batches)
