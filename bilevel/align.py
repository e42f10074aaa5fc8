"""Weights learned online from how well gradients align with validation's, while one model trains on them.

    y descends  g(x, y)
    x descends  -alpha/N sum_i (dc_i/dx) <grad l_i(y), grad f(y)>

A step of y on sample i lowers f by lr_y <grad l_i, grad f>: x looks one step ahead, where F2SA's x looks at how far two
copies have come apart. Per source as in DoGE (Fan, Pagliardini and Jaggi, "DoGE: Domain Reweighting with Generalization
Estimation", 2024), with weights on losses and not on draws as in FastMix (Tan et al., "FastMix: Fast Data Mixture
Optimization via Gradient Descent", 2026); per sample as in Ren, Zeng, Yang and Urtasun, "Learning to Reweight Examples
for Robust Deep Learning" (2018). Simplified: x has the maps and the optimizer of bilevel.weights, where DoGE multiplies
weights by the exponential of the alignment; and every sample's alignment is a central difference of its loss along
grad f, two forward passes, where DoGE runs a backward pass for each source. The step is bilevel.f2sa.align_step.
"""

import torch

from bilevel.backend import TorchCopy
from bilevel.data import Batch
from bilevel.losses import sample_losses
from bilevel.schedule import process_seed

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
