"""The gradient of a weighted mean of losses, micro-batch by micro-batch."""

from collections.abc import Callable

import torch

from bilevel.data.samples import Batch
from bilevel.model.base_copy import ModelCopy


def _add_gradient(
    copy: ModelCopy, batch: Batch, factor: Callable[[torch.Tensor], torch.Tensor], seed: int, last: bool
) -> torch.Tensor:
    """Add the gradient of 1/|B| sum_B factor_i l_i; returns all l_i in the batch's order, (n,) on the CPU.

    factor: from the numbers (B,) of a micro-batch's samples to their factors. Where of |B| samples only n are computed,
    each l_i counts for as many as it stands for. last: the step's last gradient.
    """
    losses = []
    for number, micro in enumerate(batch.micro_batches):
        factors = (factor(micro.sample_ids) * batch.counts_of(micro) / batch.drawn).to(copy.world.device)
        loss = copy.losses(micro, seed + number, factors)
        copy.backward((factors.to(loss.dtype) * loss).sum(), last and number + 1 == len(batch.micro_batches))
        losses.append(loss.detach())
    return batch.collect(losses, copy.world)


def _add_validation(copy: ModelCopy, batch: Batch, nu: float, seed: int) -> torch.Tensor:
    """Add the gradient of nu f, the step's last; returns the validation losses, (|B|,) on the CPU."""
    return _add_gradient(copy, batch, lambda ids: torch.full((len(ids),), nu, dtype=torch.float64), seed, last=True)
