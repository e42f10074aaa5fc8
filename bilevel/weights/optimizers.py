"""The rules that move x, one class each, and the table that x_optimizer chooses from.

A new rule is one class (in a module of its own, if it is long) and one row of OPTIMIZERS. Weights hand it the gaps of
every model step (`observe`) and, each time x is due, the gradient of the mean since the last time (`update`).
"""

import math
from collections.abc import Sequence

import torch

from bilevel.weights.fixed import Weights

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class XOptimizer:
    """A rule that moves x (n entries: sources or samples), and the defaults of what it may change."""

    uses_slope = True  # whether the slope dc/dx is a factor of its gradient

    def __init__(self, n: int):
        """Start without a history."""

    def observe(self, weights: Weights, entries: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor) -> None:
        """Take note of a model step: gaps (B,) of the entries (B,) of weights.x, each standing for counts (B,) samples.

        Called at every model step, before the gaps are added to the gradient. A rule that needs the gradient alone
        does nothing here.
        """

    def update(self, index: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
        """What to add to x[index]; index (K,) without repeats, gradient (K,) float64. Returns (K,) float64."""
        raise NotImplementedError

    def reach(self, rates: Sequence[float]) -> float:
        """The furthest that updates at these learning rates can carry an entry; inf if the gradients decide."""
        return math.inf

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold to go on."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Adam(XOptimizer):
    """Lazy Adam (Kingma and Ba 2015) without decay: each entry counts its own steps, so that its first visit moves it
    by lr, however late it comes. Per entry two float32 moments and an int32 count."""

    def __init__(self, n: int):
        self.m, self.v = torch.zeros(n), torch.zeros(n)
        self.count = torch.zeros(n, dtype=torch.int32)

    def update(self, index: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
        m = BETA1 * self.m[index].double() + (1 - BETA1) * gradient
        v = BETA2 * self.v[index].double() + (1 - BETA2) * gradient**2
        count = self.count[index] + 1
        self.m[index], self.v[index], self.count[index] = m.float(), v.float(), count
        m_hat, v_hat = m / (1 - BETA1 ** count.double()), v / (1 - BETA2 ** count.double())
        return -lr * m_hat / (v_hat.sqrt() + EPS)

    def reach(self, rates: Sequence[float]) -> float:
        """The sum of the rates: gradients that always point one way move an entry by lr at each visit."""
        return sum(rates)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"m": self.m, "v": self.v, "count": self.count}


class SGD(XOptimizer):
    """Gradient descent on x."""

    def update(self, index: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
        return -lr * gradient


class Mirror(SGD):
    """Mirror descent (Nemirovski and Yudin 1983), which leaves out dc/dx. x moves at every visit of a sample, or for
    every source seen, by

        x_i -= lr_x factor (gap_i - mean gap)

    For softmax this is the exponentiated gradient (Kivinen and Warmuth 1997): c_i is multiplied by
    exp(-lr_x factor gap_i). For sigmoid the odds of each sample are. It is a descent direction as well, because dx_i
    has the sign of minus the gradient.
    """

    uses_slope = False


OPTIMIZERS: dict[str, type[XOptimizer]] = {"adam": Adam, "sgd": SGD, "mirror": Mirror}
