"""The base class of the rules that move x."""

import math
from collections.abc import Sequence

import torch

from bilevel.weights.fixed import Weights


class XOptimizer:
    """A rule that moves x (n entries: sources or samples), with defaults for what a rule may override.

    It receives the gaps of every model step (`observe`) and, at each step of x, the mean gradient since the last one
    (`update`).
    """

    uses_slope = True  # whether the slope dc/dx is a factor of its gradient
    sets_all = False  # whether it sets the weights of all records at once, by `factors` and not by `update`

    def __init__(self, n: int):
        """Start without a history."""

    def observe(self, weights: Weights, entries: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor) -> None:
        """Take note of a model step: gaps (B,) of the entries (B,) of weights.x, each standing for counts (B,) samples.

        Called at every model step, before the gaps are added to the gradient. A rule that needs the gradient alone
        does nothing here.
        """

    def update(self, weights: Weights, index: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
        """The change of weights.x[index], (K,) float64; index (K,) without repeats, gradient (K,) float64."""
        raise NotImplementedError

    def factors(self, weights: Weights) -> torch.Tensor | None:
        """What the weights at the start are multiplied by, (N,) float32, for a rule that sets all; None: not now."""
        raise NotImplementedError

    def reach(self, rates: Sequence[float]) -> float:
        """The furthest that updates at these learning rates can carry an entry; inf if the gradients decide."""
        return math.inf

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state that a checkpoint must hold."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
