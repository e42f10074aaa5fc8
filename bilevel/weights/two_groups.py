"""Two groups among the weights: the threshold between them, and whether there are two groups at all.

Two-means divides anything in two, even a normal distribution. A smoothed histogram tells whether there is a valley at
the cut.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

BINS = 1 << 16  # resolution of two-means: it takes the values in a bin as equal
GRID = 1024  # bins of the smoothed histogram
VALLEY, ERRORS = 0.8, 4  # a valley has at most this share of the lower peak, and is so many standard errors below it


@dataclasses.dataclass(frozen=True)
class Split:
    """Two groups, with c below the threshold and c at or above it: number of records, mean weight, reason in words."""

    threshold: float
    sizes: tuple[int, int]
    means: tuple[float, float]
    convincing: bool
    reason: str


def two_means(parts: Iterable[np.ndarray], low: float, high: float) -> float:
    """Halfway between the two centres that two-means finds in values between low and high; low if these are equal."""
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


def split(c: np.ndarray, logarithm: bool) -> Split | None:
    """The two groups of the weights c (N,), or None if all are equal.

    logarithm: divide log c instead of c. This suits softmax weights, whose logarithm is x up to a constant, so that a
    step of x means the same everywhere. Sigmoid weights are bounded, and differences in c itself matter.
    """
    # log 0 is that of the least weight above 0, and of a millionth of the mean at most: so 0 is no weight's equal.
    values = np.log(np.maximum(c, min(c[c > 0].min(), 1e-6 * c.mean()))) if logarithm else c
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return None
    cut = two_means([values], low, high)
    above = values >= cut
    sizes, means = (len(c) - int(above.sum()), int(above.sum())), (float(c[~above].mean()), float(c[above].mean()))
    height, significant = valley(values, cut)
    convincing = height <= VALLEY and significant
    reason = f"between its two peaks the smoothed histogram falls to {height:.0%} of the lower one"
    if height > VALLEY:
        reason += f"; two groups need at most {VALLEY:.0%}"
    elif not significant:
        reason += f", but by less than {ERRORS} standard errors, so that chance may have done it"
    return Split(math.exp(cut) if logarithm else cut, sizes, means, convincing, reason)


def are_two(c: np.ndarray, logarithm: bool) -> bool:
    """Whether the weights c (N,) form two groups."""
    found = split(c, logarithm)
    return found is not None and found.convincing


def verdict(c: np.ndarray, logarithm: bool) -> str:
    """The closing sentence on the weights of records: whether they form two groups, and what that means."""
    found = split(c, logarithm)
    if found is None:
        return f"all {len(c):,} records have the same weight: nothing is known about them"
    low, high = (f"{mean:.3g}" for mean in found.means)
    if found.convincing:
        return f"the weights form two groups, of mean weight {low} and {high}: look at the lower one before you drop it"
    return "the weights form no two separate groups: no record is shown to be worse than the others"


def valley(values: np.ndarray, cut: float) -> tuple[float, bool]:
    """The lowest density of the values (N,) between its peaks on both sides of the cut, as a share of the lower peak.

    Also whether the two densities differ by ERRORS standard errors. Gaussian kernel with Silverman's width
    1.06 sd N^(-1/5).
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
    # The variance of a density smoothed by this kernel is that of a mean over 2 sqrt(pi) sigma bins.
    seen = 2 * math.sqrt(math.pi) * max(sigma, 1)
    return floor / peak, (peak - floor) * seen > ERRORS * math.sqrt((peak + floor) * seen)
