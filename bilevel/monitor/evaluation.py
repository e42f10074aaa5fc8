"""Evaluate a run: held-out loss, and statistics of the weights of sources and records (bilevel.weights.statistics)."""

import math
from collections.abc import Callable

from bilevel.data.samples import Samples
from bilevel.model.base_copy import ModelCopy
from bilevel.model.heldout import heldout_loss
from bilevel.weights.fixed import Weights
from bilevel.weights.statistics import QUANTILES, noise_detection, quantiles, source_shares


def evaluate(
    copies: dict[str, ModelCopy],
    weights: Weights,
    train: Samples,
    test: Samples | None,
    token_budget: int,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The columns of metrics.csv that a step does not produce; also recomputes the normaliser of the weights exactly.

    pause: called between two micro-batches; it may raise.
    """
    weights.refresh()
    row: dict[str, float] = {}
    if test is not None:
        row |= {f"test_loss_{name}": heldout_loss(copy, test, token_budget, pause) for name, copy in copies.items()}
    if weights.per_sample:
        shares = source_shares(weights, train.sizes).tolist()
        row |= {f"weight/{name}": share for name, share in zip(train.sources, shares, strict=True)}
        if weights.records is not None:
            harm = weights.records.harm()
            row |= {"harmful": harm.number}
            row |= {"harmful_z": harm.z} if math.isfinite(harm.z) else {}
        row |= dict(zip((f"weight_q/{q}" for q in QUANTILES), quantiles(weights, QUANTILES), strict=True))
    if train.is_noisy is not None:
        row |= noise_detection(weights, train.is_noisy)
    return row
