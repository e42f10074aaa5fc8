"""The learning rates and the penalty of a step."""

import math

from bilevel.settings.fields import Settings


def schedule(step: int, steps: int, warmup_ratio: float, kind: str) -> float:
    """Factor of a learning rate at step 0..steps-1: rises linearly from 0 in the warm-up, then `kind` decides.

    kind: constant stays at 1; cosine falls to 0 along half a cosine.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Schedule:
    """Learning rates of the model copies (lr_y) and of the weights (lr_x), and alpha, in a run of so many steps."""

    def __init__(self, settings: Settings, steps: int):
        self.settings, self.steps = settings, steps

    def lr_y(self, step: int) -> float:
        """Learning rate of the model copies at step 0..steps-1; its schedule is always cosine."""
        return self.settings.lr_y * schedule(step, self.steps, self.settings.warmup_ratio, "cosine")

    def lr_x(self, step: int) -> float:
        """Learning rate of x at step 0..steps-1, whether or not x moves at that step."""
        s = self.settings
        return s.lr_x * schedule(step, self.steps, s.warmup_ratio, s.x_lr_schedule)

    def alpha(self, step: int) -> float:
        """The penalty at step 0..steps-1. A growing one is what F2SA's proofs have (Kwon et al. 2023, Algorithm 1)."""
        s = self.settings
        if s.alpha_start is None or self.steps == 1:
            return s.alpha
        return s.alpha_start + (s.alpha - s.alpha_start) * step / (self.steps - 1)
