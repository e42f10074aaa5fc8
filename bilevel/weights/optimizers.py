"""The rules that move x by its gradient: Adam, SGD and mirror descent.

The rule x_optimizer=auto is in bilevel.weights.auto; bilevel.settings.optimizers has the table of all rules.
"""

from collections.abc import Sequence

import torch

from bilevel.weights.base_optimizer import XOptimizer
from bilevel.weights.fixed import Weights

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Adam(XOptimizer):
    """Lazy Adam (Kingma and Ba 2015) without decay: each entry counts its own steps, so that its first visit moves it
    by lr, however late it comes. Per entry two float32 moments and an int32 count."""

    def __init__(self, n: int):
        self.m, self.v = torch.zeros(n), torch.zeros(n)
        self.count = torch.zeros(n, dtype=torch.int32)

    def update(self, weights: Weights, index: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
        m = BETA1 * self.m[index].double() + (1 - BETA1) * gradient
        v = BETA2 * self.v[index].double() + (1 - BETA2) * gradient**2
        count = self.count[index] + 1
        self.m[index], self.v[index], self.count[index] = m.float(), v.float(), count
        m_hat, v_hat = m / (1 - BETA1 ** count.double()), v / (1 - BETA2 ** count.double())
        return -lr * m_hat / (v_hat.sqrt() + EPS)

    def reach(self, rates: Sequence[float]) -> float:
        """The sum of the rates: if gradients always point in one direction, an entry moves by lr at each visit."""
        return sum(rates)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"m": self.m, "v": self.v, "count": self.count}


class SGD(XOptimizer):
    """Gradient descent on x."""

    def update(self, weights: Weights, index: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
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
