"""The upper-level variable x: coefficients c(x), the closed-form x-gradient and the optimizer of x.

    g(x, y) = (1/N) sum_i c_i(x) l_i(y)
    dx      = alpha (d/dx g(x, w) - d/dx g(x, u)) = alpha/N sum_i (dc_i/dx) gap_i,   gap_i = l_i(w) - l_i(u)

(the penalty method of F2BA/F2SA: Kwon et al. 2023, Chen, Ma and Zhang 2025; per source as in ScaleBiO, Pan et
al. 2024). c_i depends on x and on constants of the data set alone, never on the batch, and has mean 1 over the
data, so a batch B estimates g by 1/|B| sum_B c_i l_i whatever way it is cut up. x is a small tensor outside every
engine and autograd graph.

Adam and SGD follow this gradient. dc_i/dx vanishes with c_i, so small weights move slowly, down and up. Mirror descent
(Nemirovski and Yudin 1983) goes by the gradient with respect to c and leaves dc_i/dx out,

    x_i -= lr_x alpha (gap_i - mean gap)

at every visit of a sample, or for every source seen: for softmax the exponentiated gradient (Kivinen and Warmuth 1997),
c_i times exp(-lr_x alpha gap_i); for sigmoid the same of the odds of each sample. It is a descent direction as well:
dx_i has the sign of the gradient.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from bilevel.errors import TrainingStopped
from bilevel.weights.optimizers import XOptimizer

TOO_FAR = "{}: steps of x with lr_x {:g} carry it too far. Start again with a smaller lr_x"
CHUNK = 1 << 20  # entries of which float64 is made at a time


def parts(end: int, start: int = 0) -> Iterator[slice]:
    """The entries start..end-1 in order: who visits all of them needs no memory for all of them."""
    return (slice(first, min(first + CHUNK, end)) for first in range(start, end, CHUNK))


class SourceWeights:
    """One logit per source: p = softmax(x), c_i = N p_s(i) / n_s(i).

    source_ids (N,), integers: the source of every sample. start (S,): p at the start.
    """

    def __init__(self, source_ids: torch.Tensor, start: torch.Tensor, alpha: float, optimizer: str):
        self.source_ids, self.alpha = source_ids, alpha
        self.sizes = torch.bincount(source_ids, minlength=len(start)).double()
        self.x = start.double().clamp_min(1e-12).log()
        self.optimizer = XOptimizer(len(start), optimizer)
        self.clear()

    @property
    def p(self) -> torch.Tensor:
        """(S,) float64, sums to 1."""
        return torch.softmax(self.x, 0)

    def coefficients(self, sample_ids: torch.Tensor | slice) -> torch.Tensor:
        """c of the samples, (B,) float64."""
        return (len(self.source_ids) * self.p / self.sizes)[self.source_ids[sample_ids].long()]

    def accumulate(self, sample_ids: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Add the gaps (B,) of the samples (B,) to the sums since the last step of x.

        counts (B,) float64: how many samples each stands for (bilevel.weights.sampling); None is one.
        """
        counts = torch.ones(len(sample_ids), dtype=torch.float64) if counts is None else counts
        sources = self.source_ids[sample_ids].long()
        self.gap_sum.index_add_(0, sources, counts * gaps.double())
        self.seen.index_add_(0, sources, counts)

    def gradient(self, mirror: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The sources seen (K,) and their gradient alpha p_k (gap_k - sum_s p_s gap_s), p renormalised over them.

        mirror: without the factor p_k.
        """
        index = self.seen.nonzero().squeeze(1)
        gap = self.gap_sum[index] / self.seen[index]
        p = torch.softmax(self.x[index], 0)
        centred = gap - (p * gap).sum()
        return index, self.alpha * (centred if mirror else p * centred)

    def step(self, lr: float) -> None:
        """Step x with the mean of all gradients since the last step; no move where fewer than two sources were seen."""
        index, grad = self.gradient(self.optimizer.kind == "mirror")
        if len(index) >= 2:
            self.x[index] += self.optimizer.update(index, grad, lr)
            if not self.x[index].isfinite().all():
                raise TrainingStopped(TOO_FAR.format("x is not finite any more", lr))
        self.clear()

    def clear(self) -> None:
        """Forget the gaps seen since the last step of x."""
        self.gap_sum, self.seen = torch.zeros_like(self.x), torch.zeros_like(self.x)

    def refresh(self) -> None:
        """Nothing to recompute: p is exact at every step."""

    def state_dict(self) -> dict[str, Any]:
        """x, its optimizer and the sums since its last step."""
        return {
            "x": self.x,
            "gap_sum": self.gap_sum,
            "seen": self.seen,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.x, self.gap_sum, self.seen = state["x"], state["gap_sum"], state["seen"]
        self.optimizer.load_state_dict(state["optimizer"])


class SampleWeights:
    """One x per sample: c_i = s(x_i) / mean_j s(x_j) (sigmoid) or N softmax(x)_i.

    The normaliser is kept in float64 from the entries a step changes, so a step costs O(batch) whatever N is.
    start (N,): c at the start, or None for all ones. sigmoid_start: mean of s there. As s < 1, no c can rise above
    1 / mean s: from near 1, records that deserve no less than others stay beside them, whatever chance does to x.
    """

    def __init__(
        self,
        n: int,
        start: torch.Tensor | None,
        x_map: str,
        alpha: float,
        optimizer: str,
        sigmoid_start: float = 0.5,
    ):
        self.n, self.x_map, self.alpha = n, x_map, alpha
        level = 0.0 if x_map == "softmax" else math.log(sigmoid_start / (1 - sigmoid_start))
        self.x = torch.full((n,), level) if start is None else _inverse(start, x_map, sigmoid_start)
        self.optimizer = XOptimizer(n, optimizer)
        self.clear()
        self.refresh()

    def coefficients(self, sample_ids: torch.Tensor | slice) -> torch.Tensor:
        """c of the samples, (B,) float64."""
        return self.mapped(self.x[sample_ids])

    def mapped(self, x: torch.Tensor) -> torch.Tensor:
        """c of samples with this x, float64."""
        return self._raw(x) * (self.n / self.total)

    def accumulate(self, sample_ids: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Add the gaps (B,) of the samples (B,) to those since the last step of x; counts as per source."""
        self.ids.append(sample_ids)
        self.gaps.append(gaps.double())
        self.counts.append(torch.ones(len(sample_ids), dtype=torch.float64) if counts is None else counts)

    def gradient(self, mirror: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples seen (K,) and alpha/|B| h_j (gap_j - mean gap), summed over a sample's visits.

        |B| counts the visits since the last step of x, each as often as it stands for; the mean gap is c-weighted over
        them; h_j is dc_j/dx_j at a fixed normaliser (the normaliser's own derivative is what the mean gap is
        subtracted for). mirror: without the factor h_j/|B|, so that a visit counts alike for every batch size.
        """
        ids, gaps, counts = (torch.cat(parts) for parts in (self.ids, self.gaps, self.counts))
        c = counts * self.coefficients(ids)
        if not c.sum() > 0:  # all of them underflow, and 0/0 would be x for good; their ratios are still known
            c = counts * self._ratios(ids)
        centred = counts * (gaps - (c * gaps).sum() / c.sum())
        index, place = ids.unique(return_inverse=True)
        total = torch.zeros(len(index), dtype=torch.float64).index_add_(0, place, centred)
        return index, self.alpha * (total if mirror else self._slope(index) / counts.sum() * total)

    def step(self, lr: float) -> None:
        """Step the samples seen since the last step with the mean of their gradients; only they move."""
        if any(map(len, self.ids)):
            index, grad = self.gradient(self.optimizer.kind == "mirror")
            self.total -= float(self._raw(self.x[index]).sum())
            self.x[index] += self.optimizer.update(index, grad, lr).float()
            self._raise_shift(float(self.x[index].max()))
            self.total += float(self._raw(self.x[index]).sum())
            self._check(index, lr)
        self.clear()

    def _check(self, index: torch.Tensor, lr: float) -> None:
        """Raises TrainingStopped where x has left the range in which there are weights."""
        least = self.n * 1e-300  # below it, N / total is infinite
        if self.x[index].isfinite().all() and not self.total > least:  # it can be rounding, too
            self.refresh()
        if not self.x[index].isfinite().all():
            raise TrainingStopped(TOO_FAR.format("x is not finite any more", lr))
        if not self.total > least:
            raise TrainingStopped(TOO_FAR.format("every weight has become 0", lr))

    def clear(self) -> None:
        """Forget the gaps seen since the last step of x."""
        self.ids: list[torch.Tensor] = []
        self.gaps: list[torch.Tensor] = []
        self.counts: list[torch.Tensor] = []

    def effective_share(self) -> float:
        """Effective number of samples (Kish: (sum c)^2 / sum c^2) as a share of N; 1 when all count alike. O(N)."""
        squares = sum(float(self._raw(self.x[part]).square().sum()) for part in parts(self.n))
        return self.total**2 / squares / self.n

    def refresh(self) -> None:
        """Recompute the normaliser exactly, O(N)."""
        self.shift = float(self.x.max()) if self.x_map == "softmax" else 0.0
        self.total = sum(float(self._raw(self.x[part]).sum()) for part in parts(self.n))

    def state_dict(self) -> dict[str, Any]:
        """x, its normaliser and optimizer, and the gaps since its last step."""
        return {
            "x": self.x,
            "shift": self.shift,
            "total": self.total,
            "ids": torch.cat(self.ids) if self.ids else torch.zeros(0, dtype=torch.int64),
            "gaps": torch.cat(self.gaps) if self.gaps else torch.zeros(0, dtype=torch.float64),
            "counts": torch.cat(self.counts) if self.counts else torch.zeros(0, dtype=torch.float64),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.x, self.shift, self.total = state["x"], state["shift"], state["total"]
        for name in ("ids", "gaps", "counts"):
            setattr(self, name, [state[name]] if len(state["ids"]) else [])
        self.optimizer.load_state_dict(state["optimizer"])

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        """Unnormalised coefficients, float64."""
        return torch.sigmoid(x.double()) if self.x_map == "sigmoid" else torch.exp(x.double() - self.shift)

    def _ratios(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """Coefficients of the samples relative to the largest of them, (B,) float64; never all 0."""
        x = self.x[sample_ids].double()
        logarithms = torch.nn.functional.logsigmoid(x) if self.x_map == "sigmoid" else x
        return torch.exp(logarithms - logarithms.max())

    def _raise_shift(self, top: float) -> None:
        """Keep the shift of softmax at the running maximum of x, so that no exponential overflows."""
        if self.x_map == "softmax" and top > self.shift:
            self.total *= math.exp(self.shift - top)
            self.shift = top

    def _slope(self, index: torch.Tensor) -> torch.Tensor:
        """h_j = s'(x_j) / mean s for sigmoid, c_j for softmax."""
        c = self.coefficients(index)
        return c * torch.sigmoid(-self.x[index].double()) if self.x_map == "sigmoid" else c


def _inverse(c: torch.Tensor, x_map: str, sigmoid_start: float) -> torch.Tensor:
    """x (N,) float32 whose coefficients are c (N,) (mean 1); zeros become a millionth of the mean."""
    mean, x = float(c.mean()), torch.empty(len(c))
    # s = c * mean(s), with a mean low enough that no s reaches 1, or comes nearer to it than c of 1 alike would.
    mean_s = min(sigmoid_start, max(0.95, sigmoid_start) * mean / float(c.max()))
    for part in parts(len(c)):
        each = (c[part].double() / mean).clamp_min(1e-6)
        x[part] = each.log() if x_map == "softmax" else torch.logit(each * mean_s)
    return x
