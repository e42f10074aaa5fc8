"""The step of method=fixed: one model on the mean loss of batches that are drawn in proportion to fixed weights."""

from bilevel.data.batches import Batch
from bilevel.model.base_copy import ModelCopy
from bilevel.processes import HOST, moved
from bilevel.step.gradient import Factors, add_gradient, constant, tokens_read
from bilevel.step.result import StepResult, require_finite
from bilevel.weights.fixed import FixedSampleWeights, FixedSourceWeights

EQUAL = constant(1.0)


def plain_step(w: ModelCopy, train: Batch, lr_y: float, seed: int, coefficients: Factors = EQUAL) -> StepResult:
    """Forward, backward and step of one model on the mean loss of a global batch, or a weighted one.

    coefficients: function from sample numbers (n,) to the factors (n,) of their losses. Raises NonFiniteLoss on every
    rank before any parameter moves.
    """
    losses = add_gradient(w, train, coefficients, seed, last=True)
    (losses,) = moved([losses], HOST)
    result = StepResult(
        loss_w=train.mean(losses),
        grad_norm_w=w.gradient_norm(),
        tokens=w.world.size * tokens_read(train),
        losses=losses,
    )
    require_finite(result, [result.loss_w, result.grad_norm_w], train=(train, losses))
    w.step(lr_y, result.grad_norm_w)
    return result


def step(
    copies: dict[str, ModelCopy],
    weights: FixedSourceWeights | FixedSampleWeights,
    train: Batch,
    validation: None,
    lr_y: float,
    seed: int,
    nu: float,
    order: int,
) -> StepResult:
    """The step of method=fixed. The weights have decided which samples were drawn (bilevel.weights.fixed)."""
    return plain_step(copies["w"], train, lr_y, seed)
