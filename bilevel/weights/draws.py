"""Batches drawn in proportion to constant weights (method=fixed).

An epoch of N draws contains sample i floor(c_i) or ceil(c_i) times, and c_i times on average over epochs (c has mean
1). This is systematic sampling (Madow and Madow 1944), with a new order of the samples in each epoch, so that the draws
of two samples are not tied to each other. Each draw counts 1, so a batch B estimates g(x, y) by 1/|B| sum_B l_i,
without bias. A sample of weight 0 is never computed. If all weights are 1, this is plain fine-tuning with the batches
of bilevel.data.stream.BatchStream.
"""

import numpy as np
import torch

from bilevel.data.stream import BatchStream
from bilevel.seeding import Permutation, key_number

UNIT = 2**20  # steps in a weight of 1; weights are rounded to a step, so that their sums are exact


class WeightedStream(BatchStream):
    """Endless batches in which sample i comes c_i times per epoch; c (N,) float64, none negative.

    Keeps the sample numbers of one epoch in memory. Resumable by its state, equal on all ranks.
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
    """The draws of an epoch for weights c (N,): (N,) int64 sample numbers, in rising order.

    The samples are laid end to end on a line, in the order `line` (N,), each as long as its weight. N marks at
    distances of 1 stand on the line, the first at start / UNIT in [0, 1). A sample is drawn once for each mark on it.
    """
    n = len(c)
    ends = c[line].cumsum()
    ends = np.rint(ends * (n * UNIT / ends[-1])).astype(np.int64)
    marks = (ends - start + UNIT - 1) // UNIT  # number of marks before each end
    times = np.empty(n, dtype=np.int64)
    times[line] = np.diff(marks, prepend=0)
    return np.repeat(np.arange(n), times)
