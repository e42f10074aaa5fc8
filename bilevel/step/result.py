"""The losses and norms of one step, and what happens when a loss or gradient is not finite."""

import dataclasses
import math
from collections.abc import Iterable

import torch

from bilevel.data.batches import Batch
from bilevel.errors import TrainingStopped
from bilevel.model.base_copy import ModelCopy


@dataclasses.dataclass
class StepResult:
    """Values of one step at the parameters before it: means of l_i over the batch and over the validation batch.

    A value is None if the step does not compute it: a plain step has no u and no validation.
    """

    loss_w: float
    grad_norm_w: float
    tokens: int  # padded tokens read by all passes of all processes
    loss_u: float | None = None
    grad_norm_u: float | None = None
    val_loss: float | None = None
    val_loss_u: float | None = None  # order 2 only
    losses: torch.Tensor | None = None  # l_i(w) of the samples computed, (n,)
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
    """A loss or gradient is not finite. No parameter has moved, and the gradients still wait to be discarded.

    suspects: sample numbers for each part of the data (train, val). They are the samples with a non-finite loss; if
    every loss is finite and only a gradient is not, they are the whole batch.
    """

    def __init__(self, result: StepResult, suspects: dict[str, torch.Tensor]):
        numbers = ", ".join(f"{name} {value:g}" for name, value in result.row().items())
        super().__init__(f"a loss or gradient is not finite ({numbers})")
        self.result, self.suspects = result, suspects


def require_finite(result: StepResult, seen: Iterable[float], **parts: tuple[Batch, torch.Tensor]) -> None:
    """Raise NonFiniteLoss on every rank if one of the numbers is not finite.

    parts: for each part of the data its batch and the losses (n,) of the batch's samples, to find the suspects.
    """
    if all(map(math.isfinite, seen)):
        return
    bad = {part: batch.sample_ids[~losses.isfinite()] for part, (batch, losses) in parts.items()}
    if not any(map(len, bad.values())):
        bad = {part: batch.sample_ids for part, (batch, _) in parts.items()}
    raise NonFiniteLoss(result, bad)


def leave_out(error: NonFiniteLoss, records: str, copies: Iterable[ModelCopy], skipped: int, allowed: int) -> str:
    """Discard the step's gradients and return a message. Raises TrainingStopped if the allowed number is used up.

    skipped: steps left out before this one; allowed: the setting skip_nonfinite.
    """
    if skipped == allowed:
        raise TrainingStopped(
            f"{error}; records {records}. Try a smaller lr_y or clip_grad_norm; "
            f"skip_nonfinite={allowed + 1} leaves such a step out"
        ) from error
    for copy in copies:
        copy.discard()
    return f"{error}; records {records}. Left out, {skipped + 1} of {allowed}"
