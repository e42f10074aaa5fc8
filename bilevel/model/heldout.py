"""Held-out loss of a model copy."""

from collections.abc import Callable

import torch

from bilevel.data.samples import Samples
from bilevel.model.base_copy import ModelCopy
from bilevel.model.losses import token_losses


@torch.no_grad()
def heldout_loss(
    copy: ModelCopy,
    samples: Samples,
    token_budget: int,
    pause: Callable[[], None] = lambda: None,
    by_sample: torch.Tensor | None = None,
) -> float:
    """Cross-entropy in nats per supervised token: summed over all tokens of all samples on all ranks, then divided.

    by_sample (N, 2) float64, optional: each sample's sum of losses and number of tokens are added to it, on the rank
    that computes the sample. Nothing else changes: evaluation mode draws no random numbers, and the model's mode is
    restored.
    """
    was_training, device = copy.model.training, copy.world.device
    copy.model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of tokens
    for batch in samples.in_order(token_budget, copy.world):
        with copy.computing():
            losses, _ = token_losses(copy.model, batch.to(device))
        pause()
        sums[0] += losses.double().sum()
        sums[1] += len(losses)
        if by_sample is not None:
            pairs = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)], 1)
            by_sample.index_add_(0, batch.sample_ids[batch.supervised.rows], pairs.cpu())
    copy.model.train(was_training)
    total, count = copy.world.sum(sums).tolist()
    return total / count
