"""The penalty step: one step of u and w, and the sums for x.

    u descends  g(x, u) = 1/|B| sum_B c_i l_i(u)
    w descends  g(x, w) + nu f(w),   f = mean of l over the validation batch
    x descends  alpha (d/dx g(x, w) - d/dx g(x, u)), from the same losses (bilevel.weights)

F2SA: Kwon, Kwon, Wright and Nowak, "A Fully First-Order Method for Stochastic Bilevel Optimization" (2023); F2BA: Chen,
Ma and Zhang, "Near-Optimal Nonconvex-Strongly-Convex Bilevel Optimization with Fully First-Order Oracles" (2025).
"""

import dataclasses
import math
from collections.abc import Sequence

import torch

from bilevel.backend import ModelCopy
from bilevel.data import MicroBatch
from bilevel.weights import SampleWeights, SourceWeights


@dataclasses.dataclass
class StepResult:
    """What one step saw, at the parameters before it: means over the batch of l_i, and of l over validation."""

    loss_u: float
    loss_w: float
    val_loss: float
    grad_norm_u: float
    grad_norm_w: float
    tokens: int

    def row(self) -> dict[str, float]:
        """The step's columns of metrics.csv."""
        return {
            "loss_w": self.loss_w,
            "loss_u": self.loss_u,
            "gap": self.loss_w - self.loss_u,
            "val_loss_w": self.val_loss,
            "grad_norm_w": self.grad_norm_w,
            "grad_norm_u": self.grad_norm_u,
        }


class NonFiniteLoss(Exception):
    """A loss or gradient is not finite; no parameter has moved."""

    def __init__(self, result: StepResult):
        numbers = ", ".join(f"{name} {value:g}" for name, value in result.row().items())
        super().__init__(f"a loss or gradient is not finite ({numbers}); try a smaller lr_y or clip_grad_norm")


def penalty_step(
    u: ModelCopy,
    w: ModelCopy,
    x: SourceWeights | SampleWeights,
    train: Sequence[MicroBatch],
    validation: Sequence[MicroBatch],
    nu: float,
    lr_y: float,
    seed: int,
) -> StepResult:
    """Forward, backward and step of u and w on one global batch; the gaps go to x, which does not move here.

    seed: both copies draw their dropout masks from it. With no validation batch w descends g alone, as u does.
    Raises NonFiniteLoss before any parameter moves.
    """
    losses_u = _add_lower_level(u, x, train, seed)
    losses_w = _add_lower_level(w, x, train, seed)
    losses_f = _add_validation(w, validation, nu, seed + len(train))
    norm_u, norm_w = u.gradient_norm(), w.gradient_norm()
    sample_ids = torch.cat([batch.sample_ids for batch in train])
    result = StepResult(
        loss_u=float(losses_u.mean()),
        loss_w=float(losses_w.mean()),
        val_loss=float(losses_f.mean()) if validation else math.nan,
        grad_norm_u=norm_u,
        grad_norm_w=norm_w,
        tokens=sum(batch.input_ids.numel() for batch in (*train, *train, *validation)),
    )
    if not math.isfinite(result.loss_u + result.loss_w + norm_u + norm_w + (result.val_loss if validation else 0)):
        raise NonFiniteLoss(result)
    x.accumulate(sample_ids, losses_w - losses_u)
    u.step(lr_y, norm_u)
    w.step(lr_y, norm_w)
    return result


def _add_lower_level(
    copy: ModelCopy, x: SourceWeights | SampleWeights, batches: Sequence[MicroBatch], seed: int
) -> torch.Tensor:
    """Add the gradient of 1/|B| sum_B c_i l_i; returns the l_i of all micro-batches in turn, (|B|,) on the CPU."""
    size = sum(len(batch.sample_ids) for batch in batches)
    losses = []
    for number, batch in enumerate(batches):
        loss = copy.losses(batch, seed + number)
        c = x.coefficients(batch.sample_ids).to(loss)
        copy.backward((c * loss).sum() / size)
        losses.append(loss.detach())
    return torch.cat(losses).cpu()


def _add_validation(copy: ModelCopy, batches: Sequence[MicroBatch], nu: float, seed: int) -> torch.Tensor:
    """Add the gradient of nu f; returns the validation losses, (|B|,) on the CPU."""
    size = sum(len(batch.sample_ids) for batch in batches)
    losses = [torch.empty(0)]
    for number, batch in enumerate(batches):
        loss = copy.losses(batch, seed + number)
        copy.backward(nu * loss.sum() / size)
        losses.append(loss.detach().cpu())
    return torch.cat(losses)
