"""The penalty step: one step of u and w, and the sums for x.

    u descends  g(x, u) = 1/|B| sum_B c_i l_i(u)
    w descends  g(x, w) + nu f(w),   f = mean of l over the validation batch
    x descends  1/nu (d/dx g(x, w) - d/dx g(x, u)), from the same losses (bilevel.weights)

or with order 2, the central difference, whose bias is O(nu^2) and not O(nu),

    u descends  g(x, u) - nu f(u)
    x descends  1/(2 nu) (d/dx g(x, w) - d/dx g(x, u))

F2SA: Kwon, Kwon, Wright and Nowak, "A Fully First-Order Method for Stochastic Bilevel Optimization" (2023); F2BA: Chen,
Ma and Zhang, "Near-Optimal Nonconvex-Strongly-Convex Bilevel Optimization with Fully First-Order Oracles" (2025).
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from bilevel.backend import ModelCopy
from bilevel.data import Batch
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
    gaps: torch.Tensor  # l_i(w) - l_i(u) of the samples computed, (n,)
    val_loss_u: float | None = None  # of order 2

    def row(self) -> dict[str, float]:
        """The step's columns of metrics.csv."""
        return {
            "loss_w": self.loss_w,
            "loss_u": self.loss_u,
            "gap": self.loss_w - self.loss_u,
            "val_loss_w": self.val_loss,
            **({} if self.val_loss_u is None else {"val_loss_u": self.val_loss_u}),
            "grad_norm_w": self.grad_norm_w,
            "grad_norm_u": self.grad_norm_u,
        }


class TrainingStopped(Exception):
    """Training must not go on; the message says why and what to do."""


class NonFiniteLoss(TrainingStopped):
    """A loss or gradient is not finite; no parameter has moved, and the gradients are still there to be discarded.

    suspects: sample numbers by the part of the data, train or val; those whose loss is not finite, or when all are,
    and only a gradient is not, the whole batch.
    """

    def __init__(self, result: StepResult, suspects: dict[str, torch.Tensor]):
        numbers = ", ".join(f"{name} {value:g}" for name, value in result.row().items())
        super().__init__(f"a loss or gradient is not finite ({numbers})")
        self.result, self.suspects = result, suspects


def penalty_step(
    u: ModelCopy,
    w: ModelCopy,
    x: SourceWeights | SampleWeights,
    train: Batch,
    validation: Batch | None,
    nu: float,
    lr_y: float,
    seed: int,
    order: int = 1,
) -> StepResult:
    """Forward, backward and step of u and w on one global batch; the gaps go to x, which does not move here.

    seed: both copies draw their dropout masks from it. Without validation w descends g alone, as u does. Every rank
    returns the same result. Raises NonFiniteLoss on all of them before any parameter moves.
    """
    central = order == 2 and validation is not None
    losses_u = _add_gradient(u, train, x.coefficients, seed, last=not central)
    losses_w = _add_gradient(w, train, x.coefficients, seed, last=validation is None)
    losses_f, losses_f_u = torch.full((1,), math.nan), torch.zeros(1)
    if validation is not None:
        losses_f = _add_validation(w, validation, nu, seed + len(train.micro_batches))
    if central:
        losses_f_u = _add_validation(u, validation, -nu, seed + len(train.micro_batches))
    norm_u, norm_w = u.gradient_norm(), w.gradient_norm()
    passes = [train, train] + ([validation] * order if validation is not None else [])
    result = StepResult(
        loss_u=train.mean(losses_u),
        loss_w=train.mean(losses_w),
        val_loss=float(losses_f.mean()),
        grad_norm_u=norm_u,
        grad_norm_w=norm_w,
        tokens=u.world.size * sum(m.input_ids.numel() for batch in passes for m in batch.micro_batches),
        gaps=losses_w - losses_u,
        val_loss_u=float(losses_f_u.mean()) if central else None,
    )
    seen = [norm_u, norm_w] + ([result.loss_u, result.loss_w] if len(result.gaps) else [])
    seen += [result.val_loss] if validation is not None else []
    seen += [result.val_loss_u] if central else []
    if not all(map(math.isfinite, seen)):
        raise NonFiniteLoss(result, _suspects(train, losses_u + losses_w, validation, losses_f + losses_f_u))
    x.accumulate(train.sample_ids, result.gaps, train.counts)
    u.step(lr_y, norm_u)
    w.step(lr_y, norm_w)
    return result


def _add_gradient(
    copy: ModelCopy, batch: Batch, factor: Callable[[torch.Tensor], torch.Tensor], seed: int, last: bool
) -> torch.Tensor:
    """Add the gradient of 1/|B| sum_B factor_i l_i; returns all l_i in the batch's order, (n,) on the CPU.

    factor: from the numbers (B,) of a micro-batch's samples to their factors. Where of |B| samples only n are computed,
    each l_i counts for as many as it stands for. last: the step's last gradient.
    """
    losses = []
    for number, micro in enumerate(batch.micro_batches):
        factors = (factor(micro.sample_ids) * batch.counts_of(micro) / batch.drawn).to(copy.world.device)
        loss = copy.losses(micro, seed + number, factors)
        copy.backward((factors.to(loss.dtype) * loss).sum(), last and number + 1 == len(batch.micro_batches))
        losses.append(loss.detach())
    return batch.collect(losses, copy.world)


def _add_validation(copy: ModelCopy, batch: Batch, nu: float, seed: int) -> torch.Tensor:
    """Add the gradient of nu f, the step's last; returns the validation losses, (|B|,) on the CPU."""
    return _add_gradient(copy, batch, lambda ids: torch.full((len(ids),), nu, dtype=torch.float64), seed, last=True)


def _suspects(
    train: Batch, train_losses: torch.Tensor, validation: Batch | None, val_losses: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The samples whose losses are not finite; without one, all."""
    parts = {"train": (train.sample_ids, train_losses)}
    if validation is not None:
        parts["val"] = (validation.sample_ids, val_losses)
    bad = {part: ids[~losses.isfinite()] for part, (ids, losses) in parts.items()}
    return bad if any(map(len, bad.values())) else {part: ids for part, (ids, _) in parts.items()}
