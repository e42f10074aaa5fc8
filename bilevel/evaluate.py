"""Judge a run: held-out loss, and how well the weights tell corrupted records from clean ones."""

import numpy as np
import torch

from bilevel.data import Samples
from bilevel.losses import token_losses


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, samples: Samples, token_budget: int) -> float:
    """Cross-entropy in nats per supervised token: summed over all tokens of all samples, then divided.

    Changes nothing: evaluation mode draws no random number, and the model's mode is put back.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in samples.in_order(token_budget):
        losses, _ = token_losses(model, batch.to(device))
        total += losses.double().sum()
        count += len(losses)
    model.train(was_training)
    return float(total) / count


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
