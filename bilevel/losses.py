"""Losses of a micro-batch, with logits only where there is a label."""

import torch
from torch.nn import functional

from bilevel.data import MicroBatch
from bilevel.tokenise import IGNORE


def token_losses(model: torch.nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats of every supervised token, (M,) float32, and the row each belongs to, (M,).

    The head runs on supervised positions only: its input (B, T, H) is cut to (1, M, H), so logits are (1, M, V),
    whatever the architecture does to them afterwards. Right padding needs no mask under causal attention.
    """
    supervised = batch.targets != IGNORE

    def cut(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][supervised].unsqueeze(0), *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[0]
    finally:
        hook.remove()
    losses = functional.cross_entropy(logits.float(), batch.targets[supervised], reduction="none")
    return losses, supervised.nonzero()[:, 0]


def sample_losses(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """l_i, the mean over sample i's supervised tokens of their cross-entropy in nats: (B,) float32; 0 without one."""
    losses, rows = token_losses(model, batch)
    sums = losses.new_zeros(len(batch.input_ids)).index_add_(0, rows, losses)
    return sums / rows.bincount(minlength=len(batch.input_ids)).clamp_min(1)
