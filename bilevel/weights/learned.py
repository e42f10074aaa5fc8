"""Weights that learn: the closed-form x-gradient, and the steps of x.

    dx = factor (d/dx g(x, w) - d/dx g(x, u)) = factor/N sum_i (dc_i/dx) gap_i,   gap_i = l_i(w) - l_i(u)

factor is 1/nu, or 1/(2 nu) with order 2 (Settings.x_factor). This is the penalty method of F2BA/F2SA (Kwon et al. 2023;
Chen, Ma and Zhang 2025), per source as in ScaleBiO (Pan et al. 2024). It needs only losses that the step has computed,
so x is a small tensor outside every engine and autograd graph, equal on all ranks. For any x_optimizer, the gaps are
also added up as evidence (bilevel.weights.evidence, bilevel.weights.record_evidence). The rules that move x are in
bilevel.weights.optimizers, and those without a learning rate in bilevel.weights.auto and auto_records.

dc_i/dx vanishes with c_i, so under Adam and SGD a small weight moves slowly, up as well as down. Mirror descent leaves
this slope out (bilevel.weights.optimizers).
"""

import math
from typing import Any

import torch

from bilevel.errors import TrainingStopped
from bilevel.settings.optimizers import OPTIMIZERS
from bilevel.weights.chunks import chunks
from bilevel.weights.evidence import Evidence
from bilevel.weights.fixed import FixedSampleWeights, FixedSourceWeights
from bilevel.weights.record_evidence import RecordEvidence

TOO_FAR = "{}: steps of x with lr_x {:g} carry it too far. Start again with a smaller lr_x"


class SourceWeights(FixedSourceWeights):
    """One logit per source, which learns.

    start (S,): p at the start, at least 1e-12 each. factor: 1/nu, or 1/(2 nu) with order 2. optimizer: a name in
    OPTIMIZERS (bilevel.settings.optimizers).
    """

    def __init__(self, source_ids: torch.Tensor, start: torch.Tensor, factor: float, optimizer: str):
        super().__init__(source_ids, start.double().clamp_min(1e-12))
        self.factor, self.optimizer = factor, OPTIMIZERS[optimizer].kind(per_sample=False)(len(start))
        self.evidence = Evidence(self.x, len(source_ids))
        self.clear()

    def accumulate(
        self,
        sample_ids: torch.Tensor,
        gaps: torch.Tensor,
        counts: torch.Tensor | None = None,
        trusted: torch.Tensor | None = None,
    ) -> None:
        """Add the gaps (B,) of the samples (B,) to the sums since the last step of x.

        counts (B,) float64: how many drawn samples each stands for (bilevel.weights.sampling); None is one each.
        trusted: not used here, where sources are compared with each other.
        """
        counts, gaps = _counts(sample_ids, counts), gaps.double()
        sources = self.source_ids[sample_ids].long()
        self.evidence.observe(self.x, sources, gaps, counts)
        self.optimizer.observe(self, sources, gaps, counts)
        self.gap_sum.index_add_(0, sources, counts * gaps)
        self.seen.index_add_(0, sources, counts)

    def gradient(self, slope: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The sources seen (K,), and their gradient factor p_k (gap_k - sum_s p_s gap_s), p renormalised over them.

        slope: whether to include the factor p_k, which comes from dc/dx.
        """
        index = self.seen.nonzero().squeeze(1)
        gap = self.gap_sum[index] / self.seen[index]
        p = torch.softmax(self.x[index], 0)
        centred = gap - (p * gap).sum()
        return index, self.factor * (p * centred if slope else centred)

    def step(self, lr: float) -> None:
        """Step x with the mean of all gradients since the last step; x stays if fewer than two sources were seen."""
        index, gradient = self.gradient(self.optimizer.uses_slope)
        if len(index) >= 2:
            self.x[index] += self.optimizer.update(self, index, gradient, lr)
            if not self.x[index].isfinite().all():
                raise TrainingStopped(TOO_FAR.format("x is not finite any more", lr))
        self.clear()

    def clear(self) -> None:
        """Forget the gaps seen since the last step of x."""
        self.gap_sum, self.seen = torch.zeros_like(self.x), torch.zeros_like(self.x)

    def state_dict(self) -> dict[str, Any]:
        """x, its optimizer, the evidence, and the sums since the last step of x."""
        sums = {"gap_sum": self.gap_sum, "seen": self.seen}
        parts = {"optimizer": self.optimizer.state_dict(), "evidence": self.evidence.state_dict()}
        return super().state_dict() | sums | parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.gap_sum, self.seen = state["gap_sum"], state["seen"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.evidence.load_state_dict(state["evidence"])


class SampleWeights(FixedSampleWeights):
    """One x per sample, which learns: c_i = s(x_i) / mean_j s(x_j) (x_map=sigmoid) or N softmax(x)_i.

    The normaliser is updated from the entries that a step changes, so that a step costs O(batch) whatever N is.
    start (N,): c at the start; None is 1 for all. factor, optimizer: as per source. sigmoid_start: the mean of s at the
    start. Because s < 1, no c can rise above 1 / mean s: if s starts near 1, records that deserve equal weights keep
    them, whatever noise does to x.
    """

    def __init__(
        self,
        n: int,
        start: torch.Tensor | None,
        x_map: str,
        factor: float,
        optimizer: str,
        sigmoid_start: float = 0.5,
    ):
        self.n, self.x_map, self.factor = n, x_map, factor
        level = 0.0 if x_map == "softmax" else math.log(sigmoid_start / (1 - sigmoid_start))
        self.x = torch.full((n,), level) if start is None else _inverse(start, x_map, sigmoid_start)
        self.optimizer, self.records = OPTIMIZERS[optimizer].kind(per_sample=True)(n), RecordEvidence(n)
        self.start, self.sigmoid_start = start if self.optimizer.sets_all else None, sigmoid_start
        self.clear()
        self.refresh()

    def accumulate(
        self,
        sample_ids: torch.Tensor,
        gaps: torch.Tensor,
        counts: torch.Tensor | None = None,
        trusted: torch.Tensor | None = None,
    ) -> None:
        """Add the gaps (B,) of the samples (B,) to those since the last step of x; counts as per source.

        trusted (k,): gaps of validation samples that w had not read; None if nothing is compared with them.
        """
        counts, gaps = _counts(sample_ids, counts), gaps.double()
        self.records.observe(sample_ids, gaps, counts, trusted)
        self.optimizer.observe(self, sample_ids, gaps, counts)
        if self.optimizer.sets_all:
            return
        self.ids.append(sample_ids)
        self.gaps.append(gaps)
        self.counts.append(counts)

    def gradient(self, slope: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples seen (K,), and factor/|B| h_j (gap_j - mean gap) summed over the visits of each.

        |B| is the number of visits since the last step of x, each weighted by its count. The mean gap is their
        c-weighted mean. h_j is dc_j/dx_j at a fixed normaliser; subtracting the mean gap accounts for the normaliser's
        own derivative. slope: whether to include the factor h_j/|B|. Without it a visit counts the same for every
        batch size.
        """
        ids, gaps, counts = map(torch.cat, (self.ids, self.gaps, self.counts))
        c = counts * self.coefficients(ids)
        if not c.sum() > 0:  # all of them underflow, and 0/0 would be x for good; their ratios are still known
            c = counts * self._ratios(ids)
        centred = counts * (gaps - (c * gaps).sum() / c.sum())
        index, place = ids.unique(return_inverse=True)
        total = torch.zeros(len(index), dtype=torch.float64).index_add_(0, place, centred)
        return index, self.factor * (self._slope(index) / counts.sum() * total if slope else total)

    def step(self, lr: float) -> None:
        """Step the samples seen since the last step with the mean of their gradients; the others stay."""
        if self.optimizer.sets_all:
            self._set_all(self.optimizer.factors(self))
        elif any(map(len, self.ids)):
            index, gradient = self.gradient(self.optimizer.uses_slope)
            self.total -= float(self._raw(self.x[index]).sum())
            self.x[index] += self.optimizer.update(self, index, gradient, lr).float()
            self._raise_shift(float(self.x[index].max()))
            self.total += float(self._raw(self.x[index]).sum())
            self._check(index, lr)
        self.clear()

    def conclude(self) -> None:
        """Set the weights by all evidence, if the rule sets all at once; the run ends here."""
        if self.optimizer.sets_all:
            self._set_all(self.optimizer.factors(self, now=True))

    def _set_all(self, factors: torch.Tensor | None) -> None:
        """Set c to that of the start times the factors (N,), with mean 1; None leaves it."""
        if factors is None:
            return
        if self.start is not None:
            factors = factors * self.start
        self.x = _inverse(factors / factors.mean(), self.x_map, self.sigmoid_start)
        self.refresh()

    def _check(self, index: torch.Tensor, lr: float) -> None:
        """Raises TrainingStopped if x is not finite or every weight has become 0."""
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

    def refresh(self) -> None:
        """Recompute the normaliser exactly, O(N)."""
        self.shift = float(self.x.max()) if self.x_map == "softmax" else 0.0
        super().refresh()

    def state_dict(self) -> dict[str, Any]:
        """x, its normaliser and optimizer, and the gaps since its last step."""
        return super().state_dict() | {
            "shift": self.shift,
            "ids": torch.cat(self.ids) if self.ids else torch.zeros(0, dtype=torch.int64),
            "gaps": torch.cat(self.gaps) if self.gaps else torch.zeros(0, dtype=torch.float64),
            "counts": torch.cat(self.counts) if self.counts else torch.zeros(0, dtype=torch.float64),
            "optimizer": self.optimizer.state_dict(),
            "records": self.records.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.shift = state["shift"]
        for name in ("ids", "gaps", "counts"):
            setattr(self, name, [state[name]] if len(state["ids"]) else [])
        self.optimizer.load_state_dict(state["optimizer"])
        self.records.load_state_dict(state["records"])

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        """Coefficients before normalisation, float64: s(x), or exp(x - shift)."""
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


def _counts(sample_ids: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    return torch.ones(len(sample_ids), dtype=torch.float64) if counts is None else counts


def _inverse(c: torch.Tensor, x_map: str, sigmoid_start: float) -> torch.Tensor:
    """x (N,) float32 whose coefficients are c (N,) (mean 1); zeros become a millionth of the mean."""
    mean, x = float(c.mean()), torch.empty(len(c))
    # s = c * mean(s). The mean is low enough that no s reaches 1, nor comes nearer to it than equal weights would.
    mean_s = min(sigmoid_start, max(0.95, sigmoid_start) * mean / float(c.max()))
    for part in chunks(len(c)):
        each = (c[part].double() / mean).clamp_min(1e-6)
        x[part] = each.log() if x_map == "softmax" else torch.logit(each * mean_s)
    return x
