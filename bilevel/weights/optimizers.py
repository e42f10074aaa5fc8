"""Optimizers of x."""

import torch

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class XOptimizer:
    """Adam, SGD or mirror descent on chosen entries of x, without decay. Under Adam each entry counts its own steps
    (lazy Adam), so its first visit moves it by lr whenever it comes; per entry two float32 moments and an int32 count.
    """

    def __init__(self, n: int, kind: str):
        self.kind = kind
        if kind == "adam":
            self.m, self.v = torch.zeros(n), torch.zeros(n)
            self.count = torch.zeros(n, dtype=torch.int32)

    def update(self, index: torch.Tensor, grad: torch.Tensor, lr: float) -> torch.Tensor:
        """What to add to x[index]; index (K,) without repeats, grad (K,) float64. Returns (K,) float64."""
        if self.kind != "adam":
            return -lr * grad
        m = BETA1 * self.m[index].double() + (1 - BETA1) * grad
        v = BETA2 * self.v[index].double() + (1 - BETA2) * grad**2
        count = self.count[index] + 1
        self.m[index], self.v[index], self.count[index] = m.float(), v.float(), count
        m_hat, v_hat = m / (1 - BETA1 ** count.double()), v / (1 - BETA2 ** count.double())
        return -lr * m_hat / (v_hat.sqrt() + EPS)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Moments and counts, to go on from."""
        return {"m": self.m, "v": self.v, "count": self.count} if self.kind == "adam" else {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
