"""Statistics over the weights of all samples: source shares, quantiles, histogram, and how well they point at noise.

Samples are visited a chunk at a time, so that time grows with N and memory does not. c rises with x, so statistics that
depend on the order of the weights alone are read off x, which is in memory anyway.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from bilevel.weights.chunks import chunks
from bilevel.weights.fixed import FixedSampleWeights, Weights
from bilevel.weights.two_groups import two_means

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def source_shares(weights: Weights, sizes: torch.Tensor) -> torch.Tensor:
    """Share of each source in the weight, (S,): p_s, or the sum of c_i over the source divided by N; sizes (S,)."""
    if not weights.per_sample:
        return weights.p
    ends = sizes.cumsum(0).tolist()
    sums = [
        sum(float(weights.coefficients(part).sum()) for part in chunks(end, start))
        for start, end in itertools.pairwise([0, *ends])
    ]
    return torch.tensor(sums, dtype=torch.float64) / weights.n


def quantiles(weights: FixedSampleWeights, shares: Sequence[float]) -> list[float]:
    """Quantiles of the weights c_i, with linear interpolation as in numpy."""
    places = np.array(shares) * (weights.n - 1)
    below = np.floor(places).astype(int)
    found = in_order(weights.x.numpy(), np.concatenate([below, np.ceil(places).astype(int)]))
    low, high = weights.mapped(torch.from_numpy(found)).reshape(2, -1).numpy()
    return (low + (high - low) * (places - below)).tolist()


def in_order(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The entries at these places (K,) of the values (N,) float32 in sorted order: exact, found by counting.

    First the upper 16 bits of all values are counted, and then the lower 16 bits of those that share the upper bits of
    an entry in question. The bits of positive numbers have the order of the numbers; those of negative ones are
    reversed.
    """
    values = values.astype("<f4", copy=False)
    counts = np.zeros(1 << 16, dtype=np.int64)
    for part in chunks(len(values)):
        counts += np.bincount(values[part].view("<u2")[1::2], minlength=1 << 16)
    order = np.concatenate([np.arange(0xFFFF, 0x7FFF, -1), np.arange(0x8000)])  # upper bits, smallest number first
    upto = counts[order].cumsum()
    rank = upto.searchsorted(places, side="right")
    uppers, left = order[rank], places - (upto - counts[order])[rank]

    beside = {upper: np.zeros(1 << 16, dtype=np.int64) for upper in uppers.tolist()}
    for part in chunks(len(values)):
        lower, upper = values[part].view("<u2").reshape(-1, 2).T
        for each, counted in beside.items():
            counted += np.bincount(lower[upper == each], minlength=1 << 16)
    found = np.empty((len(places), 2), dtype="<u2")
    for row, upper, place in zip(found, uppers.tolist(), left, strict=True):
        step = -1 if upper >> 15 else 1
        lower = int(beside[upper][::step].cumsum().searchsorted(place, side="right"))
        row[:] = lower if step == 1 else 0xFFFF - lower, upper
    return found.view("<f4")[:, 0]


def histogram(weights: Weights, n: int, bins: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Histogram of the n samples' weights: counts (bins,) and edges (bins + 1,).

    among (n,) bool: the samples to count; None is all. The edges span the weights of all samples in either case.
    """
    low, high = bounds(weights, n)
    counts = np.zeros(bins, dtype=np.int64)
    for part in chunks(n):
        c = weights.coefficients(part).numpy()
        here, edges = np.histogram(c if among is None else c[among[part]], bins, (low, high))
        counts += here
    return counts, edges


def bounds(weights: Weights, n: int) -> tuple[float, float]:
    """The smallest and the largest weight of the n samples; equal if they differ by rounding alone."""
    ends = [(float(c.min()), float(c.max())) for c in map(weights.coefficients, chunks(n))]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return (low, high) if high - low > 1e-9 * high else (low, low)


def noise_detection(weights: Weights, is_noisy: np.ndarray) -> dict[str, float]:
    """How well low weights point at the corrupted records is_noisy (N,); empty if all or none are.

    roc_auc: area under the ROC curve of 1 - weight. precision, recall: for records below `threshold` called noisy. The
    threshold comes from two-means on the weights alone, without the labels.
    """
    n, noisy = len(is_noisy), int(is_noisy.sum())
    if noisy in (0, n):
        return {}
    threshold = split_point(weights, n)
    called = found = 0
    for part in chunks(n):
        low = weights.coefficients(part).numpy() < threshold
        called, found = called + int(low.sum()), found + int((low & is_noisy[part]).sum())
    return {
        "roc_auc": roc_area(lambda part: weights.coefficients(part).numpy(), is_noisy),
        "threshold": threshold,
        "precision": found / called if called else 0.0,
        "recall": found / noisy,
    }


def roc_area(values: Callable[[slice], np.ndarray], is_noisy: np.ndarray) -> float:
    """Share of the pairs of a noisy and a clean record in which the noisy one has the lower value; ties count half.

    values: from a slice of the N records to their weights or scores; is_noisy (N,).
    """
    clean = np.concatenate([values(part)[~is_noisy[part]] for part in chunks(len(is_noisy))])
    clean.sort()
    at_most = 0  # twice the clean records with a value below, and once those with the same, summed over the noisy ones
    for part in chunks(len(is_noisy)):
        noisy = np.sort(values(part)[is_noisy[part]])
        at_most += int(sum(clean.searchsorted(noisy, side).sum() for side in ("left", "right")))
    return 1 - at_most / 2 / (len(clean) * int(is_noisy.sum()))


def split_point(weights: Weights, n: int) -> float:
    """Halfway between the two centres that two-means finds in the weights; their common value if all are equal."""
    return two_means((weights.coefficients(part).numpy() for part in chunks(n)), *bounds(weights, n))
