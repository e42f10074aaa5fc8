"""Two groups among the weights: the threshold between them, and whether they are two at all.

Two-means parts anything in two: a normal distribution as well. Whether there is a valley where it cuts is read off a
smoothed histogram.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

BINS = 1 << 16  # within one of which two-means does not look
GRID = 1024  # bins of the smoothed histogram
VALLEY, ERRORS = 0.8, 4  # a valley is at most so high beside the lower hump, and so many standard errors below it
EQUALS = 0.05  # sources that are equally good ended at weights as far apart as 1 to 13 (example/RESULTS.md)


@dataclasses.dataclass(frozen=True)
class Split:
    """c below the threshold and c at or above it: numbers of records, mean weights, and the reasons in words."""

    threshold: float
    sizes: tuple[int, int]
    means: tuple[float, float]
    convincing: bool
    reason: str


def two_means(parts: Iterable[np.ndarray], low: float, high: float) -> float:
    """Halfway between the two centres that two-means finds in values between low and high; low when those are equal."""
    from sklearn.cluster import KMeans

    if low == high:
        return low
    counts, sums = np.zeros(BINS), np.zeros(BINS)
    for values in parts:
        place = ((values - low) * (BINS / (high - low))).astype(int).clip(0, BINS - 1)
        counts += np.bincount(place, minlength=BINS)
        sums += np.bincount(place, values, minlength=BINS)
    filled = counts > 0
    means = (sums[filled] / counts[filled]).reshape(-1, 1)
    fit = KMeans(2, init=means[[0, -1]], n_init=1, tol=0).fit(means, sample_weight=counts[filled])
    return float(fit.cluster_centers_.mean())


def split(c: np.ndarray, logarithm: bool, few: bool) -> Split | None:
    """The two groups of the weights c (N,), or None where all are equal.

    logarithm: part log c and not c. That is right where c is a softmax, whose logarithm is x up to a constant, so that
    steps of x are alike everywhere on it; a sigmoid's c is bounded, and the distances that matter are those of c.
    few: the records share a few weights, those of sources, so that a histogram says nothing.
    """
    # log 0 is that of the least weight above 0, and of a millionth of the mean at most: so 0 is no weight's equal.
    values = np.log(np.maximum(c, min(c[c > 0].min(), 1e-6 * c.mean()))) if logarithm else c
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return None
    cut = two_means([values], low, high)
    above = values >= cut
    sizes, means = (len(c) - int(above.sum()), int(above.sum())), (float(c[~above].mean()), float(c[above].mean()))
    if few:
        ratio = means[0] / means[1]
        convincing = ratio <= EQUALS
        reason = f"the lower sources' records weigh {ratio:.2g} of the upper ones'"
        reason += "" if convincing else f"; equally good ones can end as far apart, down to {EQUALS:g} is no difference"
    else:
        height, significant = valley(values, cut)
        convincing = height <= VALLEY and significant
        reason = f"between the humps the smoothed histogram falls to {height:.0%} of the lower one"
        reason += f", of which at most {VALLEY:.0%} and {ERRORS} standard errors count as two" if not convincing else ""
    return Split(math.exp(cut) if logarithm else cut, sizes, means, convincing, reason)


def valley(values: np.ndarray, cut: float) -> tuple[float, bool]:
    """How high the density of the values (N,) is at its lowest between its peaks on the two sides of the cut.

    As a share of the lower peak; and whether the two differ by ERRORS standard errors. Gaussian kernel, of Silverman's
    width 1.06 sd N^(-1/5).
    """
    width = 1.06 * float(values.std()) * len(values) ** -0.2
    low, high = float(values.min()) - 3 * width, float(values.max()) + 3 * width
    counts, edges = np.histogram(values, GRID, (low, high))
    sigma = width / (edges[1] - edges[0])
    reach = np.arange(-math.ceil(4 * sigma), math.ceil(4 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / max(sigma, 1e-9)) ** 2)
    density = np.convolve(counts, kernel / kernel.sum())[len(reach) // 2 :][:GRID]
    middle = int(edges.searchsorted(cut).clip(1, GRID - 1))
    left, right = int(density[:middle].argmax()), middle + int(density[middle:].argmax())
    floor, peak = float(density[left : right + 1].min()), float(min(density[left], density[right]))
    # A kernel of this width averages over 2 sqrt(pi) sigma bins, as far as its variance goes.
    seen = 2 * math.sqrt(math.pi) * max(sigma, 1)
    return floor / peak, (peak - floor) * seen > ERRORS * math.sqrt((peak + floor) * seen)
