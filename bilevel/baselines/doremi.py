"""Weights of sources from how much there is to learn in them: DoReMi, without validation data.

Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining" (2023), Algorithm 1. A reference
model is trained on the mix as it is. A second one, the proxy, is trained on weighted losses, and at each step

    p_s  <-  p_s exp(RATE excess_s) / sum        excess_s: mean over the batch of max(0, l_i(proxy) - l_i(reference))
    p    <-  (1 - SMOOTHING) p + SMOOTHING / S

The weights are the mean of p over all steps. Three simplifications: the excess is cut at 0 per sample instead of per
token; batches are drawn from the mix, with weights on losses instead of equal draws from all sources; and both models
have the size of the run's own. A source of noise has little excess, as the reference cannot learn it either.
"""

import torch

from bilevel.baselines.scores import Scoring
from bilevel.data.batches import Batch
from bilevel.model.base_copy import ModelCopy
from bilevel.step.result import StepResult

RATE, SMOOTHING = 1.0, 1e-3


class DomainWeights:
    """p (S,) of the sources, float64, and its mean over the steps. source_ids (N,) of the samples."""

    def __init__(self, source_ids: torch.Tensor, sources: int):
        self.source_ids = source_ids.long()
        self.sizes = torch.bincount(self.source_ids, minlength=sources).double()
        self.p = torch.full((sources,), 1 / sources, dtype=torch.float64)
        self.total, self.steps = torch.zeros_like(self.p), 0

    def coefficients(self, sample_ids: torch.Tensor, p: torch.Tensor | None = None) -> torch.Tensor:
        """Weights (n,) of samples, whose mean over all samples is 1; with the present p, or another."""
        p = self.p if p is None else p
        return (p * len(self.source_ids) / self.sizes)[self.source_ids[sample_ids]]

    def update(self, sample_ids: torch.Tensor, excess: torch.Tensor) -> None:
        """A step with the excess losses (n,) of a batch; a source that is not in it counts as without excess."""
        sources, seen = self.source_ids[sample_ids], torch.zeros_like(self.p)
        sums = torch.zeros_like(self.p).index_add_(0, sources, excess.double().clamp_min(0))
        seen.index_add_(0, sources, torch.ones_like(excess, dtype=torch.float64))
        p = torch.softmax(self.p.log() + RATE * sums / seen.clamp_min(1), 0)
        self.p = (1 - SMOOTHING) * p + SMOOTHING / len(p)
        self.total, self.steps = self.total + self.p, self.steps + 1

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.steps


def doremi_score(s: Scoring) -> torch.Tensor:
    """The weights c (N,) of all samples, equal within a source and 1 on average."""
    reference = s.losses(s.trained(s.train), s.train)
    weights = DomainWeights(s.train.source_ids, len(s.train.sources))

    def after(w: ModelCopy, done: int, batch: Batch, result: StepResult) -> None:
        if bool(result.losses.isfinite().all()):
            weights.update(batch.sample_ids, result.losses - reference[batch.sample_ids])

    s.trained(s.train, after, weights.coefficients)
    return weights.coefficients(s.train.all_ids, weights.mean)
