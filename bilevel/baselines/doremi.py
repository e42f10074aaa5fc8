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
from bilevel.weights.fixed import FixedSourceWeights

RATE, SMOOTHING = 1.0, 1e-3


class DomainWeights(FixedSourceWeights):
    """Shares p of the sources that change at each step, and their mean over the steps. source_ids (N,) of samples."""

    def __init__(self, source_ids: torch.Tensor, sources: int):
        super().__init__(source_ids, torch.full((sources,), 1 / sources))
        self.total, self.steps = torch.zeros_like(self.x), 0

    def update(self, sample_ids: torch.Tensor, excess: torch.Tensor) -> None:
        """A step with the excess losses (n,) of a batch; a source that is not in it counts as without excess."""
        sources, seen = self.source_ids[sample_ids].long(), torch.zeros_like(self.x)
        sums = torch.zeros_like(self.x).index_add_(0, sources, excess.double().clamp_min(0))
        seen.index_add_(0, sources, torch.ones_like(excess, dtype=torch.float64))
        p = torch.softmax(self.x + RATE * sums / seen.clamp_min(1), 0)
        self.x = ((1 - SMOOTHING) * p + SMOOTHING / len(p)).log()
        self.total, self.steps = self.total + self.p, self.steps + 1

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.steps


def doremi_score(s: Scoring) -> torch.Tensor:
    """The weights c (N,) of all samples, equal within a source and 1 on average."""
    reference = s.losses(s.trained(s.train), s.train)
    weights = DomainWeights(s.train.source_ids, len(s.train.sources))

    def after(w: ModelCopy, done: int, batch: Batch, result: StepResult) -> None:
        if bool(result.losses.isfinite().all()):  # or the step was skipped, which has been said
            weights.update(batch.sample_ids, result.losses - reference[batch.sample_ids])

    s.trained(s.train, after, weights.coefficients)
    return FixedSourceWeights(s.train.source_ids, weights.mean).coefficients(s.train.all_ids)
