"""The step of one model on fixed weights."""

import math

import torch

from bilevel.data.samples import Batch
from bilevel.model.base_copy import ModelCopy
from bilevel.step.gradient import _add_gradient
from bilevel.step.result import NonFiniteLoss, StepResult, _suspects


def plain_step(w: ModelCopy, train: Batch, lr_y: float, seed: int) -> StepResult:
    """Forward, backward and step of one model on the mean loss of a global batch, drawn as bilevel.weights.fixed does.

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
