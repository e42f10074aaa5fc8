"""Evidence that a source is worse or better than the others, from its gaps, for any x_optimizer.

At each model step the mean gap m_k of source k is compared with that of the others, as they are weighted now:

    d_k = (m_k - sum_{j != k} p_j m_j / (1 - p_k)) / s            s: standard deviation of all gaps of the batch
    h_k = 1 / (1/n_k + sum_{j != k} p_j^2 / n_j / (1 - p_k)^2)    1 / variance of d_k if records were dealt at random

n_k = (sum of counts)^2 / sum of counts^2 is the effective number of records. Because d is in standard deviations of
single gaps, it does not depend on alpha, lr_y or the model. d above 0 means that validation gains less from the source
than from the others. Summed over the steps:

    S += h d,   H += h,   Q += (d - last d)^2 / (1/h + 1/last h),   T += 1
    phi = max(1, (16 + Q) / (4 + T))           dispersion from neighbouring steps; it starts at 4, to distrust the first
    D   = max(1, (1 + visits / N) / 2)         records seen again say less than new ones
    e   = S^2 / (2 phi D (H + 64)) - 1/2 ln(1 + H / 64)

e is the logarithm of an e-value against "no difference" (the normal mixture of Robbins 1970). By Ville's inequality it
exceeds ln 20 at any step by chance with a probability of at most 1/20, however often one looks. A step adds no evidence
if it sees fewer than two sources, or if w and u are still the same so that all gaps are equal.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch

PRIOR = 64.0  # visits; the prior of d is normal with variance 1 / PRIOR
DISTRUST = 4.0  # steps that the start of phi counts for, and that start itself
CALL = math.log(20)  # e from which a source is called worse or better
SAME = 1e-12  # standard deviation of gaps; up to it, they are rounding of equal losses
SLOW = 20  # steps over which "settled" looks back
SETTLED = 0.3  # change of the logit of p over them
FAR = 7.0  # logits below the largest weight; a source down there has settled


class Contrast(NamedTuple):
    """The evidence of one step: the sources seen (K,), their d and h. K = 0 if the step adds none."""

    sources: torch.Tensor
    d: torch.Tensor
    h: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Finding:
    """The evidence on one source. difference is in standard deviations of single gaps; above 0 it is worse."""

    weight: float
    start: float  # its weight at the start
    difference: float  # mean since the start; NaN without evidence
    low: float  # 95 % interval that holds at all steps at once
    high: float
    p_worse: float
    evidence: float  # ln e now
    peak: float  # the largest ln e so far
    called_at: int | None  # step of the verdict
    verdict: str  # worse, better, no difference shown
    settled: bool
    steps_least: float  # more steps for a verdict if chance has made S a standard deviation too small; 0 if called
    steps_most: float  # the same if S is what it seems; at first the dispersion is exaggerated, and so is this


class Evidence:
    """The evidence on each source, 80 bytes each.

    start (S,): x at the start. n: number of training samples. The peak has the sign of S at its step.
    """

    STATE = ("start", "S", "H", "Q", "T", "last_d", "last_h", "peak", "slow", "called_at", "steps", "visits")

    def __init__(self, start: torch.Tensor, n: int):
        self.n, self.steps, self.visits = n, 0, 0.0
        self.start, self.slow = start.clone(), start.clone()  # slow: x averaged over about SLOW steps
        for name in ("S", "H", "Q", "T", "last_d", "last_h", "peak"):
            setattr(self, name, torch.zeros(len(start), dtype=torch.float64))
        self.called_at = torch.zeros(len(start), dtype=torch.int64)  # 0: not called
        nothing = torch.zeros(0, dtype=torch.float64)
        self.nothing = Contrast(torch.zeros(0, dtype=torch.int64), nothing, nothing)
        self.latest = self.nothing

    def observe(self, x: torch.Tensor, sources: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor) -> None:
        """Add a model step: gaps (B,) float64 of samples of the sources (B,), each standing for counts (B,) samples."""
        self.steps, self.visits = self.steps + 1, self.visits + float(counts.sum())
        self.slow += (x - self.slow) / SLOW
        self.latest = self.contrast(x, sources, gaps, counts)
        k, d, h = self.latest
        last_h = torch.where(self.last_h[k] > 0, self.last_h[k], math.inf)  # a first visit has nothing to compare with
        again = last_h.isfinite()
        self.Q[k] += torch.where(again, (d - self.last_d[k]) ** 2 / (1 / h + 1 / last_h), 0.0)
        self.T[k] += again.double()
        self.last_d[k], self.last_h[k] = d, h
        self.S[k] += h * d
        self.H[k] += h
        e = self.evidence()
        self.peak = torch.where(e > self.peak.abs(), e * self.S.sign(), self.peak)
        self.called_at[(self.called_at == 0) & (e > CALL)] = self.steps

    def contrast(self, x: torch.Tensor, sources: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor) -> Contrast:
        """d and h of the sources in one batch."""

        def per_source(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), dtype=torch.float64).index_add_(0, sources, values)

        total = per_source(counts)
        k = total.nonzero().squeeze(1)
        if len(k) < 2:
            return self.nothing
        centred = gaps - (counts * gaps).sum() / counts.sum()
        sd = ((counts * centred**2).sum() / counts.sum()).sqrt()
        if not sd > SAME:
            return self.nothing
        mean, number = per_source(counts * centred)[k] / total[k], total[k] ** 2 / per_source(counts**2)[k]
        # Row i: the shares of the other sources in the comparison with source k_i.
        others = x[k].expand(len(k), len(k)).clone().fill_diagonal_(-math.inf).softmax(1)
        d = (mean - (others * mean).sum(1)) / sd
        h = 1 / (1 / number + (others**2 / number).sum(1))
        return Contrast(k, d, h)

    def phi(self) -> torch.Tensor:
        """Variation of d between neighbouring steps, as a multiple of what chance explains, (S,)."""
        return ((DISTRUST * DISTRUST + self.Q) / (DISTRUST + self.T)).clamp_min(1)

    def variance(self) -> torch.Tensor:
        """Variance of S per unit of H, (S,)."""
        return self.phi() * max(1.0, (1 + self.visits / self.n) / 2)

    def evidence(self) -> torch.Tensor:
        """e of each source now, (S,)."""
        return self._strength() - 0.5 * torch.log1p(self.H / PRIOR)

    def luck(self) -> float:
        """Upper bound of the probability that chance alone calls any source as clearly as the weakest called one."""
        called = self.peak.abs()[self.called_at > 0]
        return min(1.0, len(self.S) * math.exp(-float(called.min()))) if len(called) else 1.0

    def findings(self, x: torch.Tensor) -> list[Finding]:
        """The Finding of each source; the weights are softmax(x)."""
        p, start, variance = x.softmax(0), self.start.softmax(0), self.variance()
        difference = self.S / self.H  # 0/0 without evidence
        reach = 2 * CALL + torch.log1p(self.H / PRIOR)
        half = (variance * (self.H + PRIOR) * reach).sqrt() / self.H
        z = self.S / (variance * (self.H + PRIOR)).sqrt()
        called = self.called_at > 0
        needed = [self._needed(z.abs() + chance, reach / 2).masked_fill(called, 0) for chance in (1, 0)]
        settled = self._settled(x, p)
        worse = torch.where((p / start).log().abs() > 0.01, p < start, self.peak > 0)  # x may not have moved yet
        columns = [p, start, difference, difference - half, difference + half, torch.special.ndtr(z), self.evidence()]
        columns += [self.peak.abs(), self.called_at, worse, settled, *needed]
        return [
            Finding(
                *numbers,
                called_at=at or None,
                verdict=("worse" if lower else "better") if at else "no difference shown",
                settled=rests,
                steps_least=least,
                steps_most=most,
            )
            for *numbers, at, lower, rests, least, most in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state[name])

    def _strength(self) -> torch.Tensor:
        return self.S**2 / (2 * self.variance() * (self.H + PRIOR))

    def _needed(self, z: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """Steps until z^2 / 2, which grows in proportion to the steps, reaches the strength; inf without evidence."""
        steps = self.T.clamp_min(1) * (2 * strength / z.clamp_min(0) ** 2 - 1)
        return steps.clamp_min(1).ceil().masked_fill(self.H == 0, math.inf).nan_to_num(math.inf, math.inf)

    def _settled(self, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Whether the logit of p has hardly changed lately, or the source has all or none of the weight, (S,)."""
        change = _logit(x) - _logit(self.slow)
        return (change.abs() < SETTLED) | (x < x.max() - FAR) | (p > 0.999)


def _logit(x: torch.Tensor) -> torch.Tensor:
    """The logits of softmax(x), (S,): those of a source and of all others together are each other's negative."""
    p = x.log_softmax(0)
    return p - torch.log1p(-p.exp()).clamp_min(-FAR * 2)
