"""Judge a run: held-out loss, and what the weights say about sources and records (bilevel.distribution)."""

from collections.abc import Callable

import torch

from bilevel.backend import ModelCopy
from bilevel.data import Samples
from bilevel.distribution import noise_detection, quantiles, source_shares
from bilevel.losses import token_losses
from bilevel.metrics import QUANTILES
from bilevel.weights import SampleWeights, SourceWeights


def evaluate(
    copies: dict[str, ModelCopy],
    x: SourceWeights | SampleWeights,
    train: Samples,
    test: Samples | None,
    token_budget: int,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The columns of metrics.csv that cost more than a step's by-products; recomputes x's normaliser exactly.

    pause is called between two micro-batches, and may raise.
    """
    x.refresh()
    row: dict[str, float] = {}
    if test is not None:
        row |= {f"test_loss_{name}": heldout_loss(copy, test, token_budget, pause) for name, copy in copies.items()}
    if isinstance(x, SampleWeights):
        shares = source_shares(x, train.sizes).tolist()
        row |= {f"weight/{name}": share for name, share in zip(train.sources, shares, strict=True)}
        row |= dict(zip((f"weight_q/{q}" for q in QUANTILES), quantiles(x, QUANTILES), strict=True))
    if train.is_noisy is not None:
        row |= noise_detection(x, train.is_noisy)
    return row


@torch.no_grad()
def heldout_loss(
    copy: ModelCopy,
    samples: Samples,
    token_budget: int,
    pause: Callable[[], None] = lambda: None,
    by_sample: torch.Tensor | None = None,
) -> float:
    """Cross-entropy in nats per supervised token: summed over all tokens of all samples on all ranks, then divided.

    by_sample (N, 2) float64, where it is wanted: each sample's sum of losses and number of tokens are added to it on
    the rank that has them. Changes nothing else: evaluation mode draws no random number, and the model's mode is put
    back.
    """
    was_training, device = copy.model.training, copy.world.device
    copy.model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of tokens
    for batch in samples.in_order(token_budget, copy.world):
        with copy.precision():
            losses, rows = token_losses(copy.model, batch.to(device))
        pause()
        sums += torch.stack([losses.double().sum(), torch.tensor(len(losses), device=device)])
        if by_sample is not None:
            pairs = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)], 1)
            by_sample.index_add_(0, batch.sample_ids[rows.cpu()], pairs.cpu())
    copy.model.train(was_training)
    total, count = copy.world.sum(sums).tolist()
    return total / count
