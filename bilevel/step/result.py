"""What one step saw, and the error of a step that is not finite."""

import dataclasses

import torch

from bilevel.data.samples import Batch
from bilevel.errors import TrainingStopped


@dataclasses.dataclass
class StepResult:
    """What one step saw, at the parameters before it: means over the batch of l_i, and of l over validation.

    None is what the step did not compute: a plain step has no u and no validation.
    """

    loss_w: float
    grad_norm_w: float
    tokens: int
    loss_u: float | None = None
    grad_norm_u: float | None = None
    val_loss: float | None = None
    val_loss_u: float | None = None  # of order 2
    gaps: torch.Tensor | None = None  # l_i(w) - l_i(u) of the samples computed, (n,)

    def row(self) -> dict[str, float]:
        """The step's columns of metrics.csv."""
        row = {
            "loss_w": self.loss_w,
            "loss_u": self.loss_u,
            "gap": None if self.loss_u is None else self.loss_w - self.loss_u,
            "val_loss_w": self.val_loss,
            "val_loss_u": self.val_loss_u,
            "grad_norm_w": self.grad_norm_w,
            "grad_norm_u": self.grad_norm_u,
        }
        return {name: value for name, value in row.items() if value is not None}


class NonFiniteLoss(TrainingStopped):
    """A loss or gradient is not finite; no parameter has moved, and the gradients are still there to be discarded.

    suspects: sample numbers by the part of the data, train or val; those whose loss is not finite, or when all are,
    and only a gradient is not, the whole batch.
    """

    def __init__(self, result: StepResult, suspects: dict[str, torch.Tensor]):
        numbers = ", ".join(f"{name} {value:g}" for name, value in result.row().items())
        super().__init__(f"a loss or gradient is not finite ({numbers})")
        self.result, self.suspects = result, suspects


def _suspects(
    train: Batch, train_losses: torch.Tensor, validation: Batch | None, val_losses: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The samples whose losses are not finite; without one, all."""
    parts = {"train": (train.sample_ids, train_losses)}
    if validation is not None:
        parts["val"] = (validation.sample_ids, val_losses)
    bad = {part: ids[~losses.isfinite()] for part, (ids, losses) in parts.items()}
    return bad if any(map(len, bad.values())) else {part: ids for part, (ids, _) in parts.items()}
