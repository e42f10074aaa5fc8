"""Judge a run: held-out loss, and what the weights say about sources and records (bilevel.weights.statistics)."""

from collections.abc import Callable

from bilevel.data.samples import Samples
from bilevel.model.base_copy import ModelCopy
from bilevel.model.heldout import heldout_loss
from bilevel.weights.learned import SampleWeights, SourceWeights
from bilevel.weights.statistics import QUANTILES, noise_detection, quantiles, source_shares


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
