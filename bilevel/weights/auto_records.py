"""The rule x_optimizer=auto for single records, without a learning rate.

    c_i = c_i at the start x (1 - P_i), with mean 1

P_i is the probability that the record is harmful (bilevel.weights.record_evidence). It is 0 for all until harmful
records are shown to exist, so that equally good ones keep equal weights. A record that has not been compared with
trusted ones counts as much as the mean record.
"""

from typing import Any

import torch

from bilevel.weights.base_optimizer import XOptimizer
from bilevel.weights.chunks import chunks
from bilevel.weights.fixed import Weights

LEAST = 3e-4  # the smallest factor of a weight
OFTEN = 4  # times per epoch that the weights are set


class AutoRecords(XOptimizer):
    """The rule for n records, without lr_x, alpha or upper_every.

    It sets the weights at each quarter of an epoch, and when the run ends.
    """

    sets_all = True

    def __init__(self, n: int):
        self.n, self.visits, self.due = n, 0.0, n / OFTEN

    def observe(self, weights: Weights, entries: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor) -> None:
        self.visits += float(counts.sum())

    def factors(self, weights: Weights, now: bool = False) -> torch.Tensor | None:
        """1 - P of all records, (N,) float32, at least LEAST; None if it is not the time to set the weights.

        now: set them whatever the time, because the run ends.
        """
        if self.visits < self.due and not now:
            return None
        self.due = self.visits + self.n / OFTEN
        evidence = weights.records
        harm = evidence.harm()
        evidence.note(harm)
        if not harm.seen:  # nothing has been compared so far
            return None
        factors = torch.empty(self.n)
        for part in chunks(self.n):
            factors[part] = torch.from_numpy(1 - evidence.harmful_share(harm, part)).clamp_min(LEAST).float()
        seen = ~factors.isnan()
        return torch.where(seen, factors, factors[seen].mean())

    def state_dict(self) -> dict[str, Any]:
        return {"visits": self.visits, "due": self.due}
