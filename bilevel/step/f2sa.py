"""The penalty step of F2SA: one step of both model copies, and the gaps that move the weights.

    u descends  g(x, u) = 1/|B| sum_B c_i(x) l_i(u)           the model trained without validation
    w descends  g(x, w) + nu f(w)                             the model trained with validation
    x descends  1/nu (d/dx g(x, w) - d/dx g(x, u))            from the same losses (bilevel.weights.learned)

f is the mean of l over the validation batch. The error of this x-gradient is O(nu). Order 2, the central difference,
has an error of O(nu^2) for one more validation pass:

    u descends  g(x, u) - nu f(u)
    x descends  1/(2 nu) (d/dx g(x, w) - d/dx g(x, u))

F2SA: Kwon, Kwon, Wright and Nowak, "A Fully First-Order Method for Stochastic Bilevel Optimization" (2023); F2BA: Chen,
Ma and Zhang, "Near-Optimal Nonconvex-Strongly-Convex Bilevel Optimization with Fully First-Order Oracles" (2025).
"""

import torch

from bilevel.data.batches import Batch
from bilevel.model.base_copy import ModelCopy
from bilevel.processes import HOST, moved
from bilevel.step.gradient import Part, add_gradients, constant
from bilevel.step.result import StepResult, require_finite
from bilevel.weights.learned import SampleWeights, SourceWeights


def penalty_step(
    u: ModelCopy,
    w: ModelCopy,
    weights: SourceWeights | SampleWeights,
    train: Batch,
    validation: Batch | None,
    nu: float,
    lr_y: float,
    seed: int,
    order: int = 1,
) -> StepResult:
    """Forward, backward and step of u and w on one global batch. The gaps go to the weights, which do not move here.

    seed: both copies draw their dropout masks from it. validation.fresh: samples whose gaps are computed, too, for the
    records to be compared with. Without validation w descends g alone, as u does. Every rank
    returns the same result. Raises NonFiniteLoss on every rank before any parameter moves.
    """
    central = order == 2 and validation is not None
    val_seed = seed + len(train.micro_batches)
    trusted = fresh_gaps(u, w, validation.fresh, val_seed) if validation else None

    # Gradients of g(x, .) at u and at w, on the same samples and under the same dropout masks.
    parts = [Part(u, train, weights.coefficients, seed), Part(w, train, weights.coefficients, seed)]

    # + nu f for w; with order 2, - nu f for u.
    if validation:
        parts.append(Part(w, validation, constant(nu), val_seed))
    if central:
        parts.append(Part(u, validation, constant(-nu), val_seed))

    (losses_u, losses_w, *others), tokens = add_gradients(parts)
    none = losses_u.new_full((1,), torch.nan)
    val_losses = others[0] if validation else none
    val_losses_u = others[1] if central else torch.zeros_like(none)

    # The host waits for the device three times: for the losses, and for each copy's gradient norm.
    losses_u, losses_w, val_losses, val_losses_u = moved([losses_u, losses_w, val_losses, val_losses_u], HOST)

    result = StepResult(
        loss_u=train.mean(losses_u),
        loss_w=train.mean(losses_w),
        val_loss=float(val_losses.mean()),
        grad_norm_u=u.gradient_norm(),
        grad_norm_w=w.gradient_norm(),
        tokens=u.world.size * tokens,
        losses=losses_w,
        gaps=losses_w - losses_u,
        val_loss_u=float(val_losses_u.mean()) if central else None,
    )
    _check(result, train, losses_u + losses_w, validation, val_losses + val_losses_u)

    # The gaps move x when it is its turn; then both copies step.
    weights.accumulate(train.sample_ids, result.gaps, train.counts, trusted)
    u.step(lr_y, result.grad_norm_u)
    w.step(lr_y, result.grad_norm_w)
    return result


@torch.no_grad()
def fresh_gaps(u: ModelCopy, w: ModelCopy, batch: Batch | None, seed: int) -> torch.Tensor | None:
    """l_i(w) - l_i(u) of the samples, (k,) float64 on the host, before the step; None without a batch."""
    if batch is None:
        return None
    if not len(batch.sample_ids):
        return torch.zeros(0, dtype=torch.float64)
    of_u, of_w = (
        batch.collect([copy.losses(micro, seed + k) for k, micro in enumerate(batch.micro_batches)], copy.world)
        for copy in (u, w)
    )
    (gaps,) = moved([of_w.double() - of_u.double()], HOST)
    return gaps


def _check(
    result: StepResult, train: Batch, losses: torch.Tensor, validation: Batch | None, val_losses: torch.Tensor
) -> None:
    """Raise NonFiniteLoss if a loss or norm of the step is not finite. A batch without computed samples has no loss."""
    seen, parts = [result.grad_norm_u, result.grad_norm_w], {"train": (train, losses)}
    if len(train.sample_ids):
        seen += [result.loss_u, result.loss_w]
    if validation is not None:
        seen += [result.val_loss] if result.val_loss_u is None else [result.val_loss, result.val_loss_u]
        parts["val"] = (validation, val_losses)
    require_finite(result, seen, **parts)


def step(
    copies: dict[str, ModelCopy],
    weights: SourceWeights | SampleWeights,
    train: Batch,
    validation: Batch,
    lr_y: float,
    seed: int,
    nu: float,
    order: int,
) -> StepResult:
    """The step of method=f2sa."""
    return penalty_step(copies["u"], copies["w"], weights, train, validation, nu, lr_y, seed, order)
