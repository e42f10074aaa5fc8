"""Judge a run: held-out loss, and what the weights say about sources and records."""

from collections.abc import Callable

import numpy as np
import torch

from bilevel.backend import ModelCopy
from bilevel.data import Samples
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
    c = x.coefficients(train.all_ids)
    if isinstance(x, SampleWeights):
        shares = source_shares(x, train).tolist()
        row |= {f"weight/{name}": share for name, share in zip(train.sources, shares, strict=True)}
        row |= dict(zip((f"weight_q/{q}" for q in QUANTILES), np.quantile(c.numpy(), QUANTILES).tolist(), strict=True))
    if train.is_noisy is not None:
        row |= noise_detection(c, train.is_noisy)
    return row


def source_shares(x: SourceWeights | SampleWeights, samples: Samples) -> torch.Tensor:
    """(S,) share of each source in the weights: p_s, or the sum of c_i over the source divided by N."""
    if isinstance(x, SourceWeights):
        return x.p
    c = x.coefficients(samples.all_ids)
    return torch.zeros(len(samples.sources), dtype=torch.float64).index_add_(0, samples.source_ids, c) / len(samples)


@torch.no_grad()
def heldout_loss(
    copy: ModelCopy, samples: Samples, token_budget: int, pause: Callable[[], None] = lambda: None
) -> float:
    """Cross-entropy in nats per supervised token: summed over all tokens of all samples on all ranks, then divided.

    Changes nothing: evaluation mode draws no random number, and the model's mode is put back.
    """
    was_training, device = copy.model.training, copy.world.device
    copy.model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of tokens
    for batch in samples.in_order(token_budget, copy.world):
        with copy.precision():
            losses, _ = token_losses(copy.model, batch.to(device))
        pause()
        sums += torch.stack([losses.double().sum(), torch.tensor(len(losses), device=device)])
    copy.model.train(was_training)
    total, count = copy.world.sum(sums).tolist()
    return total / count


def noise_detection(c: torch.Tensor, is_noisy: np.ndarray) -> dict[str, float]:
    """How well low weights c (N,) point at corrupted records is_noisy (N,).

    roc_auc: area under the ROC of 1 - weight. precision, recall: of calling noisy what lies below `threshold`, which
    two-means finds on the weights alone; no label takes part in choosing it.
    """
    from sklearn.metrics import precision_score, recall_score, roc_auc_score

    weights = c.numpy()
    if is_noisy.all() or not is_noisy.any():
        return {}
    threshold = split_point(weights)
    called = weights < threshold
    return {
        "roc_auc": float(roc_auc_score(is_noisy, -weights)),
        "threshold": threshold,
        "precision": float(precision_score(is_noisy, called, zero_division=0)),
        "recall": float(recall_score(is_noisy, called)),
    }


def split_point(weights: np.ndarray) -> float:
    """Halfway between the two centres that two-means finds in weights (N,); the common value when all are equal."""
    from sklearn.cluster import KMeans

    low, high = float(weights.min()), float(weights.max())
    if low == high:
        return low
    fit = KMeans(2, init=np.array([[low], [high]]), n_init=1).fit(weights.reshape(-1, 1))
    return float(fit.cluster_centers_.mean())
