"""The penalty step: one step of u and w, and the sums for x; and the plain step of one model on fixed weights.

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
from collections.abc import Callable, Iterable

import torch

from bilevel.align import alignments
from bilevel.backend import ModelCopy, TorchCopy
from bilevel.data import Batch
from bilevel.weights import SampleWeights, SourceWeights


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


def leave_out(error: NonFiniteLoss, records: str, copies: Iterable[ModelCopy], skipped: int, allowed: int) -> str:
    """Discard the step's gradients and say so; raises TrainingStopped where as many as allowed were skipped before."""
    if skipped == allowed:
        raise TrainingStopped(
            f"{error}; records {records}. Try a smaller lr_y or clip_grad_norm; "
            f"skip_nonfinite={allowed + 1} leaves such a step out"
        ) from error
    for copy in copies:
        copy.discard()
    return f"{error}; records {records}. Left out, {skipped + 1} of {allowed}"


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
    seen = [norm_u, norm_w] + ([result.loss_u, result.loss_w] if len(train.sample_ids) else [])
    seen += [result.val_loss] if validation is not None else []
    seen += [result.val_loss_u] if central else []
    if not all(map(math.isfinite, seen)):
        raise NonFiniteLoss(result, _suspects(train, losses_u + losses_w, validation, losses_f + losses_f_u))
    x.accumulate(train.sample_ids, result.gaps, train.counts)
    u.step(lr_y, norm_u)
    w.step(lr_y, norm_w)
    return result


def plain_step(w: ModelCopy, train: Batch, lr_y: float, seed: int) -> StepResult:
    """Forward, backward and step of one model on the mean loss of a global batch, drawn as bilevel.fixed does.

    Raises NonFiniteLoss as penalty_step does.
    """
    losses = _add_gradient(w, train, lambda ids: torch.ones(len(ids), dtype=torch.float64), seed, last=True)
    result = StepResult(
        loss_w=train.mean(losses),
        grad_norm_w=w.gradient_norm(),
        tokens=w.world.size * sum(m.input_ids.numel() for m in train.micro_batches),
    )
    if not (math.isfinite(result.loss_w) and math.isfinite(result.grad_norm_w)):
        raise NonFiniteLoss(result, _suspects(train, losses, None, None))
    w.step(lr_y, result.grad_norm_w)
    return result


def align_step(
    w: TorchCopy,
    x: SourceWeights | SampleWeights,
    train: Batch,
    validation: Batch,
    lr_y: float,
    seed: int,
) -> StepResult:
    """The step of bilevel.align on one global batch: minus the alignments go to x as gaps do, and x does not move here.

    Raises NonFiniteLoss as penalty_step does.
    """
    val_losses = _add_validation(w, validation, 1.0, seed + len(train.micro_batches))
    toward = alignments(w, train, seed)
    w.discard()
    losses = _add_gradient(w, train, x.coefficients, seed, last=True)
    passes = [train] * 3 + [validation]
    result = StepResult(
        loss_w=train.mean(losses),
        grad_norm_w=w.gradient_norm(),
        val_loss=float(val_losses.mean()),
        tokens=sum(micro.input_ids.numel() for batch in passes for micro in batch.micro_batches),
    )
    seen = [result.val_loss, result.grad_norm_w, float(toward.sum())]
    seen += [result.loss_w] if len(train.sample_ids) else []
    if not all(map(math.isfinite, seen)):
        raise NonFiniteLoss(result, _suspects(train, losses + toward, validation, val_losses))
    x.accumulate(train.sample_ids, -toward, train.counts)
    w.step(lr_y, result.grad_norm_w)
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
    train: Batch, train_losses: torch.Tensor, validation: Batch | None, val_losses: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The samples whose losses are not finite; without one, all."""
    parts = {"train": (train.sample_ids, train_losses)}
    if validation is not None:
        parts["val"] = (validation.sample_ids, val_losses)
    bad = {part: ids[~losses.isfinite()] for part, (ids, losses) in parts.items()}
    return bad if any(map(len, bad.values())) else {part: ids for part, (ids, _) in parts.items()}
