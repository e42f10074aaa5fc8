"""Faster kernels for the model's layers on a CPU: the same mathematics with different rounding.

On non-Intel CPUs, torch's fp32 matrix products (MKL) take twice as long as oneDNN's. GPT-2's gelu_new makes eight
passes over its input; torch has a single kernel for it.
"""

import os
from typing import Any

import torch
from torch.nn import functional
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D as TransformersConv1D

# oneDNN compiles a kernel per shape (half a millisecond) and caches it (up to a megabyte). Shapes of micro-batches
# seldom recur after their step, so the default of 1,024 cached kernels would waste memory.
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # read at the first product
    os.environ.setdefault(_cache, "128")


def speed_up(model: torch.nn.Module) -> torch.nn.Module:
    """Change the class of each layer that has a faster one, in place; parameters and names do not change."""
    for module in model.modules():
        module.__class__ = FASTER.get(type(module), type(module))
    return model


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b.T + bias, (M, N), for a (M, K), b (N, K), bias (N,)."""
    if _fast(a) and a.numel() and b.numel():
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return functional.linear(a, b, bias)


def _fast(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _apart(layer: torch.nn.Module, inputs: torch.Tensor) -> bool:
    """Whether to keep the layer's original forward: outside fp32 on CPU, or when ZeRO-3 has patched the product."""
    mixed = torch.is_autocast_enabled("cpu") or layer.weight.dtype != torch.float32
    return mixed or hasattr(layer.weight, "ds_id") or not _fast(inputs)


class Linear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if _apart(self, input) else _Linear.apply(input, self.weight, self.bias, False)


class Conv1D(TransformersConv1D):
    """GPT-2's linear layer, whose weight is (K, N)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if _apart(self, x) else _Linear.apply(x, self.weight, self.bias, True)


class TanhGELU(NewGELUActivation):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.gelu(input, approximate="tanh")


class _Linear(torch.autograd.Function):
    """inputs (..., K) @ weight.T + bias, or @ weight if `turned` (weight (K, N)); saves only what a gradient needs."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, turned: bool):
        ctx.turned = turned
        needs_inputs, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(inputs if needs_weight else None, weight if needs_inputs else None)
        flat = product(inputs.flatten(0, -2), weight.t() if turned else weight, bias)
        return flat.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        inputs, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        to_inputs = to_weight = None
        if weight is not None:
            to_inputs = product(flat, weight if ctx.turned else weight.t()).view(*gradient.shape[:-1], -1)
        if inputs is not None:
            pair = flat.t(), inputs.flatten(0, -2).t()
            to_weight = product(*(reversed(pair) if ctx.turned else pair))
        return to_inputs, to_weight, flat.sum(0) if ctx.needs_input_grad[2] else None, None


FASTER = {torch.nn.Linear: Linear, TransformersConv1D: Conv1D, NewGELUActivation: TanhGELU}
