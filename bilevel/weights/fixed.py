"""Method fixed: weights that stay, and batches drawn in proportion to them.

An epoch of N draws holds sample i floor(c_i) or ceil(c_i) times, c_i times on average over epochs (c has mean 1). It is
systematic sampling (Madow and Madow 1944), with the samples in a new order in each epoch, so that no two are tied to
each other. Each draw counts 1, so a batch B estimates g(x, y) by 1/|B| sum_B l_i, without bias. A sample of weight 0 is
never computed, and weights of 1 are plain fine-tuning, with the batches of bilevel.data.stream.BatchStream.
"""

import numpy as np
import torch

from bilevel.data.stream import BatchStream
from bilevel.seeding import Permutation, key_number
from bilevel.weights.learned import SampleWeights, SourceWeights
from bilevel.weights.optimizers import XOptimizer

UNIT = 2**20  # steps in a weight of 1; weights are rounded to a step, so that sums of them are exact


class FixedSourceWeights(SourceWeights):
    """Shares p of the sources (S,), which may be 0."""

    def __init__(self, source_ids: torch.Tensor, p: torch.Tensor):
        super().__init__(source_ids, p, alpha=0.0, optimizer="sgd")
        self.x = p.double().log()


class FixedSampleWeights(SampleWeights):
    """Weights c of the samples (N,), which may be 0; x is c itself. None is 1 for all."""

    x_map = "identity"

    def __init__(self, n: int, c: torch.Tensor | None):
        self.n, self.alpha = n, 0.0
        self.x = torch.ones(n) if c is None else c.float()
        self.optimizer = XOptimizer(n, "sgd")
        self.clear()
        self.refresh()

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


class WeightedStream(BatchStream):
    """Endless batches in which sample i comes c_i times per epoch; c (N,) float64, none negative.

    Holds the sample numbers of one epoch. Resumable by its state, equal on all ranks.
    """

    def __init__(self, c: torch.Tensor, batch_size: int, seed: int):
        self.c = c.numpy()
        super().__init__(len(c), batch_size, seed)

    def load_state_dict(self, state: dict[str, int]) -> None:
        super().load_state_dict(state)
        key = f"draws of seed {self.seed}, epoch {self.epoch}"
        line = Permutation(self.n, key)(np.arange(self.n))
        start = key_number(key) % UNIT
        order, drawn = self._order, draws(self.c, line, start)
        self._order = lambda places: drawn[order(places)]


def draws(c: np.ndarray, line: np.ndarray, start: int) -> np.ndarray:
    """The draws of an epoch, (N,) int64 sample numbers in rising order, for weights c (N,).

    On a line the samples are stretches as long as their weights, one after the other in the order `line` (N,). N marks
    at distances of 1, the first at start / UNIT in [0, 1), tell which samples are drawn, and how often.
    """
    n = len(c)
    ends = c[line].cumsum()
    ends = np.rint(ends * (n * UNIT / ends[-1])).astype(np.int64)
    marks = (ends - start + UNIT - 1) // UNIT  # that lie before each end
    times = np.empty(n, dtype=np.int64)
    times[line] = np.diff(marks, prepend=0)
    return np.repeat(np.arange(n), times)
