"""Constant weights: coefficients c(x) per source and per sample, and values computed from them.

    g(x, y) = (1/N) sum_i c_i(x) l_i(y)

c_i depends on x and on constants of the dataset alone, never on the batch, and has mean 1 over the data. A batch B
therefore estimates g by 1/|B| sum_B c_i l_i, without bias and however it is cut into micro-batches.

method=fixed and the baselines use these classes. bilevel.weights.learned extends them with steps of x.
"""

from typing import Any

import torch

from bilevel.weights.chunks import chunks
from bilevel.weights.evidence import Evidence
from bilevel.weights.record_evidence import RecordEvidence
from bilevel.weights.shares import record_weights


class FixedSourceWeights:
    """One share p of the weight per source: p = softmax(x), c_i = N p_s(i) / n_s(i).

    source_ids (N,), integers: the source of every sample. p (S,): the shares, which may be 0. x (S,) is float64.
    """

    per_sample = False
    evidence: Evidence | None = None  # on each source, where the weights learn

    def __init__(self, source_ids: torch.Tensor, p: torch.Tensor):
        self.source_ids = source_ids
        self.sizes = torch.bincount(source_ids, minlength=len(p)).double()
        self.x = p.double().log()

    @property
    def p(self) -> torch.Tensor:
        """Shares of the sources (S,), float64; they sum to 1."""
        return torch.softmax(self.x, 0)

    def coefficients(self, sample_ids: torch.Tensor | slice) -> torch.Tensor:
        """c of the samples, (B,) float64."""
        return record_weights(self.p, self.sizes)[self.source_ids[sample_ids].long()]

    def refresh(self) -> None:
        """Do nothing: p is computed exactly from x each time."""

    def conclude(self) -> None:
        """Do nothing at the end of a run: p is what it is."""

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.x = state["x"]


class FixedSampleWeights:
    """One weight per sample: c_i = raw(x_i) / mean_j raw(x_j), where raw is the identity here.

    c (N,): the weights, which may be 0; None is 1 for all. x (N,) is float32. The normaliser (the sum of raw over all
    samples) is kept in float64.
    """

    per_sample = True
    evidence: Evidence | None = None  # that is for sources
    records: RecordEvidence | None = None  # on each record, where the weights learn

    def __init__(self, n: int, c: torch.Tensor | None):
        self.n = n
        self.x = torch.ones(n) if c is None else c.float()
        self.refresh()

    def conclude(self) -> None:
        """Do nothing at the end of a run: the weights are what they are."""

    def coefficients(self, sample_ids: torch.Tensor | slice) -> torch.Tensor:
        """c of the samples, (B,) float64."""
        return self.mapped(self.x[sample_ids])

    def mapped(self, x: torch.Tensor) -> torch.Tensor:
        """c of samples with this x, float64, with the present normaliser."""
        return self._raw(x) * (self.n / self.total)

    def effective_share(self) -> float:
        """Effective number of samples (Kish: (sum c)^2 / sum c^2) as a share of N; 1 if all weights are equal. O(N)."""
        squares = sum(float(self._raw(self.x[part]).square().sum()) for part in chunks(self.n))
        return self.total**2 / squares / self.n

    def refresh(self) -> None:
        """Recompute the normaliser exactly, O(N)."""
        self.total = sum(float(self._raw(self.x[part]).sum()) for part in chunks(self.n))

    def state_dict(self) -> dict[str, Any]:
        """x and its normaliser."""
        return {"x": self.x, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.x, self.total = state["x"], state["total"]

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        """Coefficients before normalisation, float64."""
        return x.double()


Weights = FixedSourceWeights | FixedSampleWeights
