"""Influence scores: how much a training step on a record would lower the validation loss (LESS).

Xia, Malladi, Gururangan, Arora and Chen, "LESS: Selecting Influential Data for Targeted Instruction Tuning" (2024).
With checkpoints t of a warm-up run, and eta_t the mean learning rate since the checkpoint before,

    score_i = max over validation files of   sum_t eta_t cos(gradient of the file's mean loss, Gamma_t(gradient of l_i))

where Gamma_t(gradient) is the step that Adam would make with its moments at checkpoint t. Gradients are those of the
last decoder block. Both sides are projected at random to PROJECTED dimensions; this changes inner products by about
1/sqrt(PROJECTED) of the product of the lengths.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from bilevel.data.batches import MicroBatch
from bilevel.data.samples import Samples
from bilevel.model.lisa import find_blocks
from bilevel.model.losses import sample_losses
from bilevel.model.torch_copy import TorchCopy

PROJECTED = 2048
AT_ONCE = 1 << 26  # gradient entries in memory at once

Project = Callable[[torch.Tensor], torch.Tensor]  # (B, D) to (B, K)


class LastBlock:
    """The trainable matrices of a model's last decoder block, and per-sample gradients with respect to them."""

    def __init__(self, copy: TorchCopy):
        blocks = find_blocks(copy.model)
        layers = [module for module in blocks[-1].modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
        self.copy, self.blocks = copy, len(blocks)
        self.layers = [layer for layer in layers if layer.weight.requires_grad]
        self.parameters = [layer.weight for layer in self.layers]
        self.size = sum(p.numel() for p in self.parameters)

    def gradients(self, micro: MicroBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield row numbers (n,) of the micro-batch and the gradients (n, D) float32 of their l_i, some rows at a time.

        The gradient of a matrix is the sum over positions of its input times the gradient of its output.
        """
        noted: list[tuple[torch.Tensor, torch.Tensor]] = []

        def note(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            noted.append((inputs[0].detach(), output))

        hooks = [layer.register_forward_hook(note) for layer in self.layers]
        self.copy.passed.add_last_block(micro, self.blocks)
        try:
            with self.copy.computing():
                losses = sample_losses(self.copy.model, micro.to(self.copy.world.device))
        finally:
            for hook in hooks:
                hook.remove()
        slopes = torch.autograd.grad(losses.sum(), [output for _, output in noted])
        pairs = [(before.float(), slope.float()) for (before, _), slope in zip(noted, slopes, strict=True)]
        for rows in torch.arange(len(losses)).split(max(1, AT_ONCE // self.size)):
            parts = []
            for layer, (before, slope) in zip(self.layers, pairs, strict=True):
                order = (before[rows], slope[rows]) if isinstance(layer, Conv1D) else (slope[rows], before[rows])
                parts.append(torch.einsum("bti,btj->bij", *order).flatten(1))
            yield rows, torch.cat(parts, 1)

    def adam_steps(self, gradients: torch.Tensor) -> torch.Tensor:
        """Gamma (B, D): the step that AdamW would now make with each gradient (B, D), up to its length and sign.

        The bias correction of the moments is left out, because it changes only the length.
        """
        group = self.copy.optimizer.param_groups[0]
        (beta1, beta2), state = group["betas"], [self.copy.optimizer.state[p] for p in self.parameters]
        m, v = (torch.cat([s[name].flatten() for s in state]) for name in ("exp_avg", "exp_avg_sq"))
        m, v = torch.lerp(gradients, m, beta1), torch.lerp(gradients.square(), v, beta2)
        return m / (v.sqrt() + group["eps"])


def random_projection(size: int, seed: int) -> tuple[Project, int]:
    """A sparse random projection from `size` to PROJECTED dimensions, and its operations per row.

    Li, Hastie and Church (2006), from scikit-learn. Rows of at most PROJECTED entries are not projected.
    """
    from sklearn.random_projection import SparseRandomProjection

    if size <= PROJECTED:
        return lambda rows: rows, 0
    projection = SparseRandomProjection(PROJECTED, dense_output=True, random_state=seed % 2**32)
    projection.fit(np.zeros((1, size), dtype=np.float32))
    return lambda rows: torch.from_numpy(projection.transform(rows.cpu().numpy())), 2 * projection.components_.nnz


def file_gradients(block: LastBlock, val: Samples, token_budget: int) -> torch.Tensor:
    """Gradient of the mean loss of each validation file, (F, D) float32."""
    sums = torch.zeros(len(val.sources), block.size, device=block.copy.world.device)
    for micro in val.in_order(token_budget):
        files = val.sources_of(micro.sample_ids).to(sums.device)
        for rows, gradients in block.gradients(micro):
            sums.index_add_(0, files[rows.to(files.device)], gradients)
    return sums / val.sizes[:, None].to(sums)


def cosines(
    block: LastBlock, train: Samples, val: Samples, project: Project, token_budget: int, tick: Callable[[], None]
) -> torch.Tensor:
    """Cosine of each training sample's Adam step with each validation file's gradient, (N, F) float64 on the CPU.

    The caller must turn dropout off. tick is called after each micro-batch of training samples.
    """
    wanted = torch.nn.functional.normalize(project(file_gradients(block, val, token_budget)).double())
    found = torch.zeros(len(train), len(wanted), dtype=torch.float64)
    for micro in train.in_order(token_budget):
        for rows, gradients in block.gradients(micro):
            steps = torch.nn.functional.normalize(project(block.adam_steps(gradients)).double())
            found[micro.sample_ids[rows]] = (steps @ wanted.T).cpu()
        tick()
    return found
