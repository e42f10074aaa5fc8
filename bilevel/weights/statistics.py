"""What the weights of all samples say: shares of the sources, quantiles, histogram, how well they point at noise.

Samples are visited a part at a time, so that time grows with N and memory does not. c rises with x, so what only needs
their order is read off x itself, which is there.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from bilevel.weights.learned import SampleWeights, SourceWeights, parts
from bilevel.weights.two_groups import two_means


def source_shares(x: SourceWeights | SampleWeights, sizes: torch.Tensor) -> torch.Tensor:
    """(S,) share of each source in the weights: p_s, or the sum of c_i over the source divided by N; sizes (S,)."""
    if isinstance(x, SourceWeights):
        return x.p
    ends = sizes.cumsum(0).tolist()
    sums = [
        sum(float(x.coefficients(part).sum()) for part in parts(end, start))
        for start, end in itertools.pairwise([0, *ends])
    ]
    return torch.tensor(sums, dtype=torch.float64) / x.n


def quantiles(x: SampleWeights, shares: Sequence[float]) -> list[float]:
    """Quantiles of the weights c_i, linear between two of them, as numpy's are."""
    places = np.array(shares) * (x.n - 1)
    below = np.floor(places).astype(int)
    found = in_order(x.x.numpy(), np.concatenate([below, np.ceil(places).astype(int)]))
    low, high = x.mapped(torch.from_numpy(found)).reshape(2, -1).numpy()
    return (low + (high - low) * (places - below)).tolist()


def in_order(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What would stand at these places (K,) of the values (N,) float32 if they were sorted: exact, found by counting.

    The upper halves of the bits are counted, and then the lower halves beside each upper half in question. Halves of
    positive numbers have the order of the numbers, those of negative ones the reverse.
    """
    values = values.astype("<f4", copy=False)
    counts = np.zeros(1 << 16, dtype=np.int64)
    for part in parts(len(values)):
        counts += np.bincount(values[part].view("<u2")[1::2], minlength=1 << 16)
    order = np.concatenate([np.arange(0xFFFF, 0x7FFF, -1), np.arange(0x8000)])  # upper halves from the least number up
    upto = counts[order].cumsum()
    rank = upto.searchsorted(places, side="right")
    uppers, left = order[rank], places - (upto - counts[order])[rank]

    beside = {upper: np.zeros(1 << 16, dtype=np.int64) for upper in uppers.tolist()}
    for part in parts(len(values)):
        lower, upper = values[part].view("<u2").reshape(-1, 2).T
        for each, counted in beside.items():
            counted += np.bincount(lower[upper == each], minlength=1 << 16)
    found = np.empty((len(places), 2), dtype="<u2")
    for row, upper, place in zip(found, uppers.tolist(), left, strict=True):
        step = -1 if upper >> 15 else 1
        lower = int(beside[upper][::step].cumsum().searchsorted(place, side="right"))
        row[:] = lower if step == 1 else 0xFFFF - lower, upper
    return found.view("<f4")[:, 0]


def histogram(
    x: SourceWeights | SampleWeights, n: int, bins: int, among: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the n samples, or of those `among` them (N,) bool: counts (bins,) between edges (bins + 1,).

    The edges are those of all samples in either case.
    """
    low, high = bounds(x, n)
    counts = np.zeros(bins, dtype=np.int64)
    for part in parts(n):
        c = x.coefficients(part).numpy()
        here, edges = np.histogram(c if among is None else c[among[part]], bins, (low, high))
        counts += here
    return counts, edges


def bounds(x: SourceWeights | SampleWeights, n: int) -> tuple[float, float]:
    """The least and the largest weight of the n samples; equal where they differ by rounding alone."""
    ends = [(float(c.min()), float(c.max())) for c in map(x.coefficients, parts(n))]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return (low, high) if high - low > 1e-9 * high else (low, low)


def noise_detection(x: SourceWeights | SampleWeights, is_noisy: np.ndarray) -> dict[str, float]:
    """How well low weights point at corrupted records is_noisy (N,).

    roc_auc: area under the ROC of 1 - weight. precision, recall: of calling noisy what lies below `threshold`, which
    two-means finds on the weights alone; no label takes part in choosing it.
    """
    n, noisy = len(is_noisy), int(is_noisy.sum())
    if noisy in (0, n):
        return {}
    threshold = split_point(x, n)
    called = found = 0
    for part in parts(n):
        low = x.coefficients(part).numpy() < threshold
        called, found = called + int(low.sum()), found + int((low & is_noisy[part]).sum())
    return {
        "roc_auc": roc_area(x, is_noisy),
        "threshold": threshold,
        "precision": found / called if called else 0.0,
        "recall": found / noisy,
    }


def roc_area(x: SourceWeights | SampleWeights, is_noisy: np.ndarray) -> float:
    """Share of the pairs of a noisy and a clean record in which the noisy one weighs less; equal weights count half."""
    clean = np.concatenate([x.coefficients(part).numpy()[~is_noisy[part]] for part in parts(len(is_noisy))])
    clean.sort()
    at_most = 0  # clean records, counted half when equal and twice in all, summed over the noisy ones
    for part in parts(len(is_noisy)):
        noisy = np.sort(x.coefficients(part).numpy()[is_noisy[part]])
        at_most += int(sum(clean.searchsorted(noisy, side).sum() for side in ("left", "right")))
    return 1 - at_most / 2 / (len(clean) * int(is_noisy.sum()))


def split_point(x: SourceWeights | SampleWeights, n: int) -> float:
    """Halfway between the two centres that two-means finds in the weights; the common value when all are equal."""
    return two_means((x.coefficients(part).numpy() for part in parts(n)), *bounds(x, n))


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
