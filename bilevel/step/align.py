"""Weights learned online from how well gradients align with validation's, while one model trains on them.

    y descends  g(x, y)
    x descends  -alpha/N sum_i (dc_i/dx) <grad l_i(y), grad f(y)>

A step of y on sample i lowers f by lr_y <grad l_i, grad f>: x looks one step ahead, where F2SA's x looks at how far two
copies have come apart. Per source as in DoGE (Fan, Pagliardini and Jaggi, "DoGE: Domain Reweighting with Generalization
Estimation", 2024), with weights on losses and not on draws as in FastMix (Tan et al., "FastMix: Fast Data Mixture
Optimization via Gradient Descent", 2026); per sample as in Ren, Zeng, Yang and Urtasun, "Learning to Reweight Examples
for Robust Deep Learning" (2018). Simplified: x has the maps and the optimizer of bilevel.weights.learned, where DoGE
multiplies weights by the exponential of the alignment; and every sample's alignment is a central difference of its loss
along grad f, two forward passes, where DoGE runs a backward pass for each source. The step is
bilevel.step.align.align_step.
"""

import math

import torch

from bilevel.data.samples import Batch
from bilevel.model.losses import sample_losses
from bilevel.model.torch_copy import TorchCopy
from bilevel.seeding import process_seed
from bilevel.step.gradient import _add_gradient, _add_validation
from bilevel.step.result import NonFiniteLoss, StepResult, _suspects
from bilevel.weights.learned import SampleWeights, SourceWeights

STEP = 1e-4  # of the difference, relative to the norm of all parameters


@torch.no_grad()
def alignments(copy: TorchCopy, batch: Batch, seed: int) -> torch.Tensor:
    """<grad l_i, grad f> of the batch's samples, (n,) float64, where grad f is the gradient that the copy now holds.

    Its parameters are bit for bit what they were when this returns. The passes are fp32: rounding to bf16 would hide
    differences as small as these.
    """
    held = [p for p in copy.model.parameters() if p.grad is not None]
    before = [p.clone() for p in held]
    length = copy.gradient_norm()
    if length == 0:
        return torch.zeros(len(batch.sample_ids), dtype=torch.float64)
    size = STEP * float(torch.nn.utils.get_total_norm(before))
    ends = []
    for sign in (1, -1):
        for p, start in zip(held, before, strict=True):
            p.copy_(start + sign * size / length * p.grad)
        losses = []
        for number, micro in enumerate(batch.micro_batches):
            torch.manual_seed(process_seed(seed + number, copy.world.rank, copy.world.size))
            copy.passed.add(micro, backward=False)
            losses.append(sample_losses(copy.model, micro.to(copy.world.device)).double())
        ends.append(batch.collect(losses, copy.world))
    for p, start in zip(held, before, strict=True):
        p.copy_(start)
    return (ends[0] - ends[1]) * (length / (2 * size))


def align_step(
    w: TorchCopy,
    x: SourceWeights | SampleWeights,
    train: Batch,
    validation: Batch,
    lr_y: float,
    seed: int,
) -> StepResult:
    """The step of bilevel.step.align on one global batch: minus the alignments go to x as gaps do, and x does not move
    here.

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
