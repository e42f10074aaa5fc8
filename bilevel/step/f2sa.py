"""The penalty step: one step of u and w, and the sums for x; and the plain step of one model on fixed weights.

    u descends  g(x, u) = 1/|B| sum_B c_i l_i(u)
    w descends  g(x, w) + nu f(w),   f = mean of l over the validation batch
    x descends  1/nu (d/dx g(x, w) - d/dx g(x, u)), from the same losses (bilevel.weights.learned)

or with order 2, the central difference, whose bias is O(nu^2) and not O(nu),

    u descends  g(x, u) - nu f(u)
    x descends  1/(2 nu) (d/dx g(x, w) - d/dx g(x, u))

F2SA: Kwon, Kwon, Wright and Nowak, "A Fully First-Order Method for Stochastic Bilevel Optimization" (2023); F2BA: Chen,
Ma and Zhang, "Near-Optimal Nonconvex-Strongly-Convex Bilevel Optimization with Fully First-Order Oracles" (2025).
"""

import math
from collections.abc import Iterable

import torch

from bilevel.data.samples import Batch
from bilevel.errors import TrainingStopped
from bilevel.model.base_copy import ModelCopy
from bilevel.step.gradient import _add_gradient, _add_validation
from bilevel.step.result import NonFiniteLoss, StepResult, _suspects
from bilevel.weights.learned import SampleWeights, SourceWeights


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
