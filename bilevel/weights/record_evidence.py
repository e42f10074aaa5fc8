"""Evidence that records harm, from the sign of their gaps, for any x_optimizer and any number of records.

gap_i = l_i(w) - l_i(u). w has read the validation set, and u has not. So a gap below 0 says that what validation
teaches helps on the record as well, and a gap above 0 that validation and the record pull in opposite directions. Each
record keeps the mean of its gaps, in standard deviations of the batch's gaps:

    m_i = sum_v gap_i / (s v^2) / sum_v 1 / v^2       v: number of the visit, s: of its batch

so that no scale of alpha, lr_y or the model is left in it. Early visits count most: later, both copies know the record
by heart. A mean above 0 alone proves little, because sound records scatter. How many sound records lie above 0 is read
off the other side, where none is harmful: about their centre mu, sound records are as often far above as far below.

    A(t) = number of records with m_i >= t,   B(t) = number with m_i <= 2 mu - t        t > 0
    z    = largest (A - B) / sqrt(A + B) over all t with A >= 8, at the upper end of mu's error
    P(t) = 1 - (B(t) + 1) / A(t), made to rise with t           share of harmful records among those with m_i >= t

Estimating false discoveries by mirrored counts, with the + 1, is the idea of Barber and Candes (2015). mu comes from
the records below 0, by maximum likelihood of a normal distribution that is cut off at 0 and at their 5 % quantile:
harmful records do not enter, and neither do heavy tails. The upper end of its error is where the log-likelihood has
fallen by 1/2. Harmful records are shown to exist once z exceeds CALL. Those are then called harmful whose P(m_i) is
above HARMFUL.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from bilevel.weights.chunks import chunks
from bilevel.weights.evidence import SAME
from bilevel.weights.removable import HARMFUL

REACH, BINS = 8.0, 4096  # the histogram of m: from -REACH to REACH; an even number of bins, so that 0 is an edge
WIDTH = 2 * REACH / BINS
LEAST = 8  # records beyond t; fewer prove nothing
CALL, KEPT = 3.5, 2.5  # z from which harmful records are shown, and down to which that verdict is kept
TAIL = 0.05  # part of the records below 0 that is cut off


@dataclasses.dataclass(frozen=True)
class Harm:
    """What is known about all records together.

    seen: records visited so far. z: see above; -inf if too few lie above 0. centre: mu. curve (BINS / 2,): P at the
    lower edges of the bins above 0. shown: whether harmful records are shown to exist. number: how many are called
    harmful, 0 while that is not shown.
    """

    seen: int
    z: float
    centre: float
    curve: np.ndarray
    shown: bool
    number: int


class RecordEvidence:
    """The evidence on n records, 8 bytes each."""

    STATE = ("sums", "visits", "shown")

    def __init__(self, n: int):
        self.n, self.shown = n, False  # shown: the verdict that `note` was given last
        self.sums, self.visits = torch.zeros(n), torch.zeros(n, dtype=torch.int32)

    def observe(self, ids: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor) -> None:
        """Add a model step: gaps (B,) float64 of the records ids (B,), each standing for counts (B,) drawn samples."""
        centred = gaps - (counts * gaps).sum() / counts.sum()
        sd = ((counts * centred**2).sum() / counts.sum()).sqrt()
        if not sd > SAME:  # w and u are still the same
            return
        index, place, times = ids.unique(return_inverse=True, return_counts=True)
        total = torch.zeros(len(index), dtype=torch.float64).index_add_(0, place, gaps / sd)
        visit = self.visits[index] + 1
        self.visits[index] = visit
        self.sums[index] += (total / times / visit.double() ** 2).float()

    def means(self, part: slice | torch.Tensor) -> np.ndarray:
        """m of these records, float64; NaN for those that have not been visited."""
        visits = self.visits[part].numpy()
        divisors = np.cumsum(1.0 / np.arange(1, visits.max(initial=1) + 1, dtype=float) ** 2)
        return np.where(visits > 0, self.sums[part].numpy() / divisors[visits.clip(1) - 1], np.nan)

    def harm(self) -> Harm:
        """The verdict on all records now; O(N)."""
        counts = np.zeros(BINS, dtype=np.int64)
        for part in chunks(self.n):
            m = self.means(part)
            counts += np.bincount(bins(m[~np.isnan(m)]), minlength=BINS)
        mu, upper = centre(counts)
        above, beyond = counts[BINS // 2 :][::-1].cumsum()[::-1].astype(float), mirrored(counts, upper)
        z = float(((above - beyond) / np.sqrt((above + beyond).clip(1)))[above >= LEAST].max(initial=-math.inf))
        share = 1 - (mirrored(counts, mu) + 1) / above.clip(1)
        curve = np.maximum.accumulate(np.where(above > 0, share, 0).clip(0))
        shown = z > (KEPT if self.shown else CALL)
        number = int(counts[BINS // 2 :][curve > HARMFUL].sum()) if shown else 0
        return Harm(int(counts.sum()), z, mu, curve, shown, number)

    def note(self, harm: Harm) -> None:
        """Remember the verdict: it is kept until z has fallen to KEPT."""
        self.shown = harm.shown

    def harmful_share(self, harm: Harm, part: slice | torch.Tensor) -> np.ndarray:
        """P(m_i) of these records, float64; NaN for those that have not been visited.

        It is 0 for records with m_i <= 0, and for all while harmful records are not shown to exist.
        """
        m = self.means(part)
        place = bins(np.nan_to_num(m)) - BINS // 2
        p = np.where((place >= 0) & harm.shown, harm.curve[place.clip(0)], 0.0)
        return np.where(np.isnan(m), np.nan, p)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state[name])


def bins(m: np.ndarray) -> np.ndarray:
    """The bins of values m; a value exactly 0 counts as below 0, and values beyond REACH are in the last bins."""
    return (np.ceil(m / WIDTH) + BINS // 2 - 1).clip(0, BINS - 1).astype(np.int64)


def mirrored(counts: np.ndarray, mu: float) -> np.ndarray:
    """B (BINS / 2,) for t at the lower edge of each bin above 0, from a histogram (BINS,)."""
    t = np.arange(BINS // 2) * WIDTH
    whole = (np.floor((2 * mu - t) / WIDTH + 1e-9) + BINS // 2).clip(0, BINS).astype(np.int64)  # bins up to 2 mu - t
    return np.r_[0, counts.cumsum()][whole].astype(float)


def centre(counts: np.ndarray) -> tuple[float, float]:
    """mu and the upper end of its error, at most 0, from a histogram (BINS,).

    The most likely normal distribution of the records below 0, cut off.
    """
    below = counts[: BINS // 2].astype(float)
    if below.sum() < LEAST:
        return 0.0, 0.0
    first = int(below.cumsum().searchsorted(TAIL * below.sum()))
    kept, x = below[first:], (np.arange(first, BINS // 2) + 0.5 - BINS // 2) * WIDTH
    mean, square = (kept * x).sum() / kept.sum(), (kept * x**2).sum() / kept.sum()
    low, scale = -(BINS // 2 - first) * WIDTH, math.sqrt(square)
    mu = torch.linspace(-2.5 * scale, 0.5 * scale, 151, dtype=torch.float64)[:, None]
    sd = torch.linspace(0.2 * scale, 2 * scale, 91, dtype=torch.float64)[None]
    inside = torch.special.ndtr(-mu / sd) - torch.special.ndtr((low - mu) / sd)
    likelihood = -(square - 2 * mu * mean + mu**2) / (2 * sd**2) - sd.log() - inside.clamp_min(1e-300).log()
    best = kept.sum() * likelihood.amax(1)
    near = mu[best >= best.max() - 0.5, 0]
    return min(float(mu[int(best.argmax()), 0]), 0.0), min(float(near[-1]), 0.0)
