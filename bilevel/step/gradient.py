"""The gradient of a weighted mean of losses, added up micro-batch by micro-batch."""

from collections.abc import Callable

import torch

from bilevel.data.batches import Batch
from bilevel.model.base_copy import ModelCopy
from bilevel.processes import moved

Factors = Callable[[torch.Tensor], torch.Tensor]  # sample numbers (B,) -> factors (B,) float64


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


def add_mean_gradient(copy: ModelCopy, batch: Batch, scale: float, seed: int) -> torch.Tensor:
    """Add scale times the gradient of the mean loss, as the step's last; return the losses, (|B|,), on its device."""
    return add_gradient(copy, batch, lambda ids: torch.full((len(ids),), scale, dtype=torch.float64), seed, last=True)


def tokens_read(*batches: Batch) -> int:
    """Padded tokens of this process's micro-batches."""
    return sum(micro.input_ids.numel() for batch in batches for micro in batch.micro_batches)
