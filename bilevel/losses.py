"""Losses of a micro-batch, with logits only where there is a label, and those in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

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
    with _head_on(model.get_output_embeddings(), supervised):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[0]
    losses = functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.targets[supervised], reduction="none"
    )
    return losses, supervised.nonzero()[:, 0]


def sample_losses(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """l_i, the mean over sample i's supervised tokens of their cross-entropy in nats: (B,) float32; 0 without one."""
    losses, rows = token_losses(model, batch)
    sums = losses.new_zeros(len(batch.input_ids)).index_add_(0, rows, losses)
    return sums / rows.bincount(minlength=len(batch.input_ids)).clamp_min(1)


@contextmanager
def _head_on(head: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Inside, the head sees these positions (B, T) alone; a linear one gives fp32 logits in whatever dtype it is."""

    def cut(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][positions].unsqueeze(0), *inputs[1:])

    hook = head.register_forward_pre_hook(cut)
    own_way = type(head) is torch.nn.Linear and "forward" not in vars(head)
    if own_way:
        head.forward = lambda hidden: wide_linear(head, hidden)
    try:
        yield
    finally:
        hook.remove()
        if own_way:
            del head.forward


def wide_linear(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (1, M, V) in fp32 of hidden (1, M, H), multiplied in the dtype of the weights or of autocast.

    Rounding logits to bf16 costs the gaps l_i(w) - l_i(u), small differences of large losses, more than all other
    rounding together; products of bf16 numbers are summed in fp32 anyway.
    """
    device, dtype = hidden.device.type, head.weight.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype not in (torch.bfloat16, torch.float16):
        return functional.linear(hidden, head.weight, head.bias)
    logits = _WideProduct.apply(hidden[0].to(dtype), head.weight.to(dtype)).unsqueeze(0)
    return logits if head.bias is None else logits + head.bias.float()


class _WideProduct(torch.autograd.Function):
    """a (M, H) times b (V, H) transposed, both bf16, in fp32 (M, V); gradients are bf16 products as everywhere else."""

    @staticmethod
    def forward(ctx, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        if a.device.type == "cpu":  # which has no such product
            with torch.autocast("cpu", enabled=False):
                return a.float() @ b.float().t()
        return torch.mm(a, b.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (a, b), gradient = ctx.saved_tensors, gradient.to(ctx.saved_tensors[0].dtype)
        return (
            gradient @ b if ctx.needs_input_grad[0] else None,
            gradient.t() @ a if ctx.needs_input_grad[1] else None,
        )
