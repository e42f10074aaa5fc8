"""Evidence that records harm, from their gaps beside those of trusted records, for any x_optimizer.

gap_i = l_i(w) - l_i(u). w has read validation records, and u has not. So a gap below 0 says that what validation
teaches helps on the record as well. A gap above 0 alone proves little: where few validation records have been read, w
is worse than u on nearly all records. How gaps of sound records scatter is seen from trusted records that w has not
read yet (bilevel.data.stream keeps some back). At its first reading a sound training record is to both copies what
such a trusted record is: neither copy has learned it. So first gaps of training records are compared with gaps of
trusted ones at the same steps, all in standard deviations of the step's gaps, trusted ones included:

    A(t) = share of the n training records with a first gap above t                     t >= 0
    C(t) = share of the m trusted records with a gap above t
    z    = largest root of the likelihood-ratio statistic (G) of A(t) > C(t), over all t with n A >= 8

Harmful records are shown to exist once z exceeds CALL: with nothing harmful it did so in at most 1.3 % of simulated
runs. How likely a record with the first gap t is harmful is then read off the densities a and c of both:

    P(t) = 1 - s c(t) / a(t)                             s: share of sound records

c / a is taken to fall with t: isotonic regression of who is a training record, among all at t. Its steps alone would
tie many records, so a TENTH of it is linear between the centres of the steps, which is the centred isotonic regression
of Oron and Flournoy (2017). One trusted record more is added to c beyond the largest one, spread as the training
records are there. s is estimated by twice the share of training records up to the median of the trusted ones, which is
rather too much (as Storey 2002 does for p-values).
Later gaps cannot be compared with those of trusted records, because both copies have learned the record by then. They
enter the mean gap of a record, and P is 0 where that is not above 0, as validation gains by the record:

    m_i = sum_v gap_i / (s v^2) / sum_v 1 / v^2       v: number of the visit, s: standard deviation of its step's gaps

which has no scale of alpha, lr_y or the model left in it. Early visits count most. Records with P above HARMFUL are
called harmful.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from bilevel.weights.chunks import chunks
from bilevel.weights.evidence import SAME
from bilevel.weights.removable import HARMFUL

REACH, BINS = 8.0, 4096  # histograms of gaps: from -REACH to REACH; an even number of bins, so that 0 is an edge
WIDTH = 2 * REACH / BINS
LEAST = 8  # records beyond t; fewer prove nothing
CALL, KEPT = 3.7, 2.7  # z from which harmful records are shown, and down to which that verdict is kept
SURE = 0.99  # the largest P
TENTH = 0.1  # of the regression that is linear between its steps: enough to order records, and P hardly changes


@dataclasses.dataclass(frozen=True)
class Harm:
    """What is known about all records together.

    seen: records compared so far. trusted: trusted records that they are compared with. z: see above; -inf if nothing
    can be compared yet. curve (BINS,): P at the bins of first gaps. shown: whether harmful records are shown to exist.
    number: how many are called harmful, 0 while that is not shown.
    """

    seen: int
    trusted: int
    z: float
    curve: np.ndarray
    shown: bool
    number: int = 0


class RecordEvidence:
    """The evidence on n records, 12 bytes each, and on some hundred trusted ones."""

    STATE = ("sums", "visits", "first", "trusted", "shown")

    def __init__(self, n: int):
        self.n, self.shown = n, False  # shown: the verdict that `note` was given last
        self.sums, self.visits = torch.zeros(n), torch.zeros(n, dtype=torch.int32)
        self.first = torch.full((n,), math.nan)
        self.trusted = torch.zeros(0)
        self.known: Harm | None = None  # the verdict, until something changes

    def observe(
        self, ids: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor, trusted: torch.Tensor | None = None
    ) -> None:
        """Add a model step: gaps (B,) float64 of the records ids (B,), each standing for counts (B,) drawn samples.

        trusted (k,) float64: gaps of trusted records that w had not read; None if this step compares none with them.
        """
        if trusted is not None:  # they are scaled as the others are, by a deviation that they are a part of
            trusted = trusted[trusted.isfinite()]
            counts, gaps = torch.cat([counts, torch.ones_like(trusted)]), torch.cat([gaps, trusted])
        centred = gaps - (counts * gaps).sum() / counts.sum()
        sd = ((counts * centred**2).sum() / counts.sum()).sqrt()
        gaps = gaps[: len(ids)]
        if not sd > SAME:  # w and u are still the same
            return
        self.known = None
        index, place, times = ids.unique(return_inverse=True, return_counts=True)
        total = torch.zeros(len(index), dtype=torch.float64).index_add_(0, place, gaps / sd)
        if trusted is not None:
            self.trusted = torch.cat([self.trusted, (trusted / sd).float()])
            new = self.visits[index] == 0
            self.first[index[new]] = (total / times)[new].float()
        visit = self.visits[index] + 1
        self.visits[index] = visit
        self.sums[index] += (total / times / visit.double() ** 2).float()

    def means(self, part: slice | torch.Tensor) -> np.ndarray:
        """m of these records, float64; NaN for those that have not been visited."""
        visits = self.visits[part].numpy()
        divisors = np.cumsum(1.0 / np.arange(1, visits.max(initial=1) + 1, dtype=float) ** 2)
        return np.where(visits > 0, self.sums[part].numpy() / divisors[visits.clip(1) - 1], np.nan)

    def harm(self) -> Harm:
        """The verdict on all records now; O(N) after a step."""
        if self.known is None:
            self.known = self._harm()
        return self.known

    def _harm(self) -> Harm:
        counts = sum((histogram(self.first[part].numpy()) for part in chunks(self.n)), np.zeros(BINS))
        seen, trusted, of_trusted = int(counts.sum()), len(self.trusted), histogram(self.trusted.numpy())
        z = -math.inf
        if trusted:
            beyond, above = (each[::-1].cumsum()[::-1][BINS // 2 :] for each in (counts, of_trusted))
            z = float(root(beyond, seen, above, trusted)[beyond >= LEAST].max(initial=z))
        shown = z > (KEPT if self.shown else CALL)
        curve = harmful_curve(counts, of_trusted) if shown else np.zeros(BINS)
        found = Harm(seen, trusted, z, curve, shown)
        number = sum(int((self.harmful_share(found, part) > HARMFUL).sum()) for part in chunks(self.n)) if shown else 0
        return dataclasses.replace(found, number=number)

    def note(self, harm: Harm) -> None:
        """Remember the verdict: it is kept until z has fallen to KEPT."""
        if self.shown != harm.shown:
            self.shown, self.known = harm.shown, None

    def harmful_share(self, harm: Harm, part: slice | torch.Tensor) -> np.ndarray:
        """P of these records, float64; NaN for those that have not been compared.

        It is 0 for records with a mean gap up to 0, and for all while harmful records are not shown to exist.
        """
        first = self.first[part].numpy()
        p = np.where(self.means(part) > 0, harm.curve[bins(np.nan_to_num(first))], 0.0)
        return np.where(np.isnan(first), np.nan, p)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if missing := [name for name in self.STATE if name not in state]:
            raise ValueError(f"another version wrote it, without {missing[0]}: finish the run with that version")
        for name in self.STATE:
            setattr(self, name, state[name])
        self.known = None


def bins(values: np.ndarray) -> np.ndarray:
    """The bin of each value; a value exactly 0 counts as below 0, and values beyond REACH are in the last bins."""
    return (np.ceil(values.astype(float) / WIDTH) + BINS // 2 - 1).clip(0, BINS - 1).astype(np.int64)


def histogram(values: np.ndarray) -> np.ndarray:
    """How many values, NaN left out, lie in each bin, (BINS,)."""
    return np.bincount(bins(values[~np.isnan(values)]), minlength=BINS).astype(float)


def harmful_curve(counts: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """P at each bin, (BINS,), from histograms (BINS,) of training and of trusted records."""
    from sklearn.isotonic import IsotonicRegression

    n, m = counts.sum(), trusted.sum()
    beyond = counts * (np.arange(BINS) > trusted.nonzero()[0].max())
    one = beyond / beyond.sum() if beyond.any() else np.eye(BINS)[-1]
    pooled = counts + trusted + one
    known, places = np.flatnonzero(pooled), np.arange(BINS)
    fit = IsotonicRegression(increasing=True, out_of_bounds="clip")
    steps = fit.fit_transform(known, counts[known] / pooled[known], sample_weight=pooled[known])
    starts = np.flatnonzero(np.diff(steps, prepend=-1) > 1e-12)
    centres = np.add.reduceat(pooled[known] * known, starts) / np.add.reduceat(pooled[known], starts)
    between = np.interp(places, centres, steps[starts])
    share = (1 - TENTH) * fit.predict(places) + TENTH * between  # of training records among all
    ratio = (1 - share) / share.clip(1e-9) * n / (m + 1)
    median = slice(0, int(trusted.cumsum().searchsorted(m / 2)) + 1)
    sound = min(1.0, counts[median].sum() / n * m / trusted[median].sum())
    return (1 - sound * ratio).clip(0, SURE)


def root(a: np.ndarray, n: int, c: np.ndarray, m: int) -> np.ndarray:
    """Signed root of G for a of n beside c of m: about a standard normal deviate if both have the same share."""

    def term(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
        return observed * np.log(np.where(observed > 0, observed, 1) / np.where(observed > 0, expected, 1))

    share = (a + c) / max(1, n + m)
    g = term(a, n * share) + term(n - a, n * (1 - share)) + term(c, m * share) + term(m - c, m * (1 - share))
    return np.sign(a * m - c * n) * np.sqrt(2 * g.clip(0))
