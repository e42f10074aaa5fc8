"""A resumable stream of global batches of sample numbers."""

import math

import numpy as np
import torch

from bilevel.errors import UserError
from bilevel.seeding import Permutation

MOST_STEPS = 10_000_000  # of a run


class BatchStream:
    """Endless batches of sample numbers: epoch after epoch, each in an order of its own; resumable by its state.

    The order is a function of seed, epoch and position, computed for each batch, so that none is stored.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.load_state_dict({"epoch": 0, "position": 0})

    def __next__(self) -> torch.Tensor:
        """(batch_size,) int64 sample numbers; a batch may end one epoch and begin the next."""
        parts, missing = [], self.batch_size
        while missing:
            end = min(self.n, self.position + missing)
            parts.append(self._order(np.arange(self.position, end)))
            missing -= end - self.position
            self.position = end
            if end == self.n:
                self.load_state_dict({"epoch": self.epoch + 1, "position": 0})
        return torch.from_numpy(np.concatenate(parts))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = Permutation(self.n, f"seed {self.seed}, epoch {self.epoch}")


def steps_per_run(n: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Number of steps: max_steps, or as many as pass `epochs` times over n samples. Raises UserError if too many."""
    steps = max_steps or epochs * n / batch_size
    if steps > MOST_STEPS:
        raise UserError(
            f"{steps:.3g} steps are more than {MOST_STEPS:,}, the most that a run can have; "
            + ("make max_steps smaller" if max_steps else "make epochs smaller, or give max_steps")
        )
    return max(1, math.ceil(steps))
