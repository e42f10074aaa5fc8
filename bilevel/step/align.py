"""Weights learned online from how well the samples' gradients align with validation's, while one model trains on them.

    y descends  g(x, y)
    x descends  -alpha/N sum_i (dc_i/dx) <grad l_i(y), grad f(y)>

A step of y on sample i lowers f by lr_y <grad l_i, grad f>: x looks one step ahead, where x of F2SA looks at how far
two copies have come apart. Per source this is DoGE (Fan, Pagliardini and Jaggi, "DoGE: Domain Reweighting with
Generalization Estimation", 2024), with weights on losses instead of draws as in FastMix (Tan et al., "FastMix: Fast
Data Mixture Optimization via Gradient Descent", 2026); per sample it is Ren, Zeng, Yang and Urtasun, "Learning to
Reweight Examples for Robust Deep Learning" (2018).

It is simplified in two ways. x has the maps and the optimizers of bilevel.weights, where DoGE multiplies weights by the
exponential of the alignment. The alignment of a sample is a central difference of its loss along grad f, two forward
passes, where DoGE runs a backward pass for each source.
"""

import torch

from bilevel.data.batches import Batch
from bilevel.model.losses import sample_losses
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import HOST, moved
from bilevel.seeding import seed_masks
from bilevel.step.gradient import add_gradient, constant, tokens_read
from bilevel.step.result import StepResult, require_finite
from bilevel.weights.learned import SampleWeights, SourceWeights

STEP = 1e-4  # of the difference, relative to the norm of all parameters


def align_step(
    w: TorchCopy,
    weights: SourceWeights | SampleWeights,
    train: Batch,
    validation: Batch,
    lr_y: float,
    seed: int,
) -> StepResult:
    """One step of the model on one global batch. Minus the alignments go to the weights, in the place of gaps.

    The weights do not move here. Raises NonFiniteLoss before any parameter moves.
    """
    val_losses = add_gradient(w, validation, constant(1.0), seed + len(train.micro_batches), last=True)
    toward = alignments(w, train, seed)
    w.discard()
    losses = add_gradient(w, train, weights.coefficients, seed, last=True)
    val_losses, losses = moved([val_losses, losses], HOST)
    result = StepResult(
        loss_w=train.mean(losses),
        grad_norm_w=w.gradient_norm(),
        val_loss=float(val_losses.mean()),
        tokens=tokens_read(train, train, train, validation),
        losses=losses,
    )
    seen = [result.val_loss, result.grad_norm_w, float(toward.sum())]
    seen += [result.loss_w] if len(train.sample_ids) else []
    require_finite(result, seen, train=(train, losses + toward), val=(validation, val_losses))
    weights.accumulate(train.sample_ids, -toward, train.counts)
    w.step(lr_y, result.grad_norm_w)
    return result


@torch.no_grad()
def alignments(copy: TorchCopy, batch: Batch, seed: int) -> torch.Tensor:
    """<grad l_i, grad f> of the batch's samples, (n,) float64; grad f is the gradient that the copy holds now.

    Leaves the parameters bit for bit as they were. The passes are fp32, as rounding to bf16 would hide such small
    differences.
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
            seed_masks(seed + number, copy.world)
            copy.passed.add(micro, backward=False)
            losses.append(sample_losses(copy.model, micro.to(copy.world.device)).double())
        ends += moved([batch.collect(losses, copy.world)], HOST)
    for p, start in zip(held, before, strict=True):
        p.copy_(start)
    return (ends[0] - ends[1]) * (length / (2 * size))


def step(
    copies: dict[str, TorchCopy],
    weights: SourceWeights | SampleWeights,
    train: Batch,
    validation: Batch,
    lr_y: float,
    seed: int,
    nu: float,
    order: int,
) -> StepResult:
    """The step of method=align."""
    return align_step(copies["w"], weights, train, validation, lr_y, seed)
