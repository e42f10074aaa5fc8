"""The head and the cross-entropy: logits (M, V) in fp32, computed in chunks if only the losses are needed.

Logits are fp32 even if the weights are bf16 or fp16; for fp64 weights everything is fp64.

Why not torch.nn.functional.linear_cross_entropy (torch 2.13)? On a CPU it takes 5 to 6 times as long as this module,
its bf16 losses are off by 3e-2 (here 9e-7), and with reduction="none", which per-sample losses need, it computes the
logits twice. Liger's fused kernel multiplies logits in bf16. Such rounding would hide the gaps l_i(w) - l_i(u).
"""

import torch
from torch.nn import functional

from bilevel.model.cpu_kernels import Linear, product

CHUNK = {"cpu": 2**22}  # logits in memory at once
GPU_CHUNK = 2**26
HALF = (torch.bfloat16, torch.float16)
TILE = 4096  # rows of the head's gradient that are computed at a time
NOTHING = 1e-30  # smaller scales count as 0: float32 could not represent their products


def is_linear(head: torch.nn.Module) -> bool:
    """Whether the head is a plain linear layer whose forward function has not been replaced."""
    return type(head) in (torch.nn.Linear, Linear) and "forward" not in vars(head)


def wide_linear(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (1, M, V) in fp32 of hidden (1, M, H), multiplied in the dtype of the weights or of autocast.

    The gaps l_i(w) - l_i(u) are small differences of large losses. Rounding logits to bf16 would harm them more than
    all other rounding together; and products of bf16 numbers are summed in fp32 anyway.
    """
    dtype = _dtype(head, hidden)
    if dtype not in HALF:
        return functional.linear(hidden, head.weight, head.bias)
    logits = _WideProduct.apply(hidden[0].to(dtype), head.weight.to(dtype)).unsqueeze(0)
    return logits if head.bias is None else logits + head.bias.float()


def head_losses(
    head: torch.nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    scales: torch.Tensor | None,
    in_place: bool = False,
) -> torch.Tensor:
    """Cross-entropy in nats (1, M, 1) of targets (M,) given hidden (1, M, H), in the dtypes of wide_linear.

    scales (M,): the gradients of the losses in the backward pass, up to a common factor. With scales, the forward pass
    also computes the gradients of head and hidden, so that each chunk of logits is computed once; without scales there
    is no gradient. in_place: add the head's gradient to its .grad in the forward pass, which saves a second (V, H)
    tensor. The common factor must then be 1, and no hook may wait for this gradient.
    """
    dtype = _dtype(head, hidden)
    weight, bias, sink = head.weight, head.bias, None
    if in_place and torch.is_grad_enabled():
        sink, weight, bias = head, weight.detach(), None if bias is None else bias.detach()
    losses = _HeadLosses.apply(hidden[0].to(dtype), weight, bias, targets, scales, sink)
    return losses.view(1, -1, 1)


class _HeadLosses(torch.autograd.Function):
    """Losses (M,) and, if scales (M,) are given, the gradients of sum(scales * losses)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scales, sink):
        needs = [scales is not None and need for need in ctx.needs_input_grad[:3]]
        grads: list[torch.Tensor | None] = [None, None, None]
        if needs[0]:
            grads[0] = torch.empty_like(hidden)
        parameters = (weight, bias) if sink is None else (sink.weight, sink.bias)
        weight = weight.to(hidden.dtype)  # inside the function, so that its gradient is summed in the parameter's dtype
        for place, parameter in enumerate(parameters, 1):
            if sink is not None and scales is not None and parameter is not None and parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads[place] = parameter.grad
            elif needs[place]:
                grads[place] = torch.zeros_like(parameter)
        losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        wide = _widened(weight)
        size = max(1, CHUNK.get(hidden.device.type, GPU_CHUNK) // len(weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logs = torch.log_softmax(_wide_product(hidden[rows], wide, bias), 1)
            at = targets[rows, None]
            losses[rows] = -logs.gather(1, at)[:, 0]
            if any(grad is not None for grad in grads):
                # Scales in the dtype of the slopes: a product of two dtypes would dominate the time.
                slopes = logs.exp_().scatter_add_(1, at, logs.new_full(at.shape, -1)).mul_(scales[rows, None].to(logs))
                _add_gradients(grads, slopes, hidden[rows], weight, rows)
        ctx.scales, ctx.in_place = scales, sink is not None
        ctx.grads = grads if sink is None else [grads[0], None, None]
        return losses

    @staticmethod
    def backward(ctx, gradient):
        scales, grads, ctx.grads = ctx.scales, ctx.grads, None
        along, length = gradient.double() @ scales.double(), scales.double().square().sum()
        told = length > NOTHING**2
        factor = torch.where(told, along / length, 1.0)
        if scales.device == torch.device("cpu") and told:  # elsewhere this check would make the host wait
            aside = (gradient - factor * scales).abs().max() / (factor * scales).abs().max()
            assert not aside > 1e-3, "the gradients of the losses are not proportional to the scales that were given"
            assert not ctx.in_place or not abs(factor - 1) > 1e-3, (
                "in_place: the head's gradient was already added with factor 1, but the factor is another"
            )
        return (*(None if grad is None else grad.mul_(factor) for grad in grads), None, None, None)


def _add_gradients(
    grads: list[torch.Tensor | None], slopes: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, rows: slice
) -> None:
    """Add to the gradients of hidden, weight and bias what slopes (m, V), the gradient of the logits, contribute."""
    if grads[2] is not None:
        grads[2].add_(slopes.sum(0))
    slopes = slopes.to(hidden.dtype)
    if grads[0] is not None:
        grads[0][rows] = product(slopes, weight.t())
    if grads[1] is not None and slopes.device.type != "cpu" and slopes.dtype == grads[1].dtype:
        grads[1].addmm_(slopes.t(), hidden)  # tiles are for products that must be converted, and for a CPU's cache
    elif grads[1] is not None:
        for start in range(0, len(weight), TILE):
            tile = slice(start, start + TILE)
            grads[1][tile].add_(product(slopes[:, tile].t(), hidden.t()))


def _dtype(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.dtype:
    """The dtype of the product: that of autocast if it is on, else that of the weights."""
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return head.weight.dtype


def _widened(weight: torch.Tensor) -> torch.Tensor:
    """The weight for _wide_product: fp32 on a CPU, which cannot multiply bf16 numbers into fp32."""
    return weight.float() if weight.device.type == "cpu" and weight.dtype in HALF else weight


def _wide_product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Logits (m, V) in fp32 of hidden (m, H) and a weight (V, H) from _widened."""
    if weight.dtype in HALF:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    elif hidden.dtype in HALF:
        with torch.autocast("cpu", enabled=False):
            logits = product(hidden.float(), weight)
    else:
        logits = product(hidden, weight)
    return logits if bias is None else logits.add_(bias.to(logits.dtype))


class _WideProduct(torch.autograd.Function):
    """Product of a (M, H) and b.T, b (V, H), both bf16, as fp32 (M, V). Gradients are bf16 products, as elsewhere."""

    @staticmethod
    def forward(ctx, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return _wide_product(a, _widened(b), None)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (a, b), gradient = ctx.saved_tensors, gradient.to(ctx.saved_tensors[0].dtype)
        return (
            gradient @ b if ctx.needs_input_grad[0] else None,
            gradient.t() @ a if ctx.needs_input_grad[1] else None,
        )
