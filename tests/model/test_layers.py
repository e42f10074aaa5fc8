"""bilevel/model/cpu_kernels.py: the same mathematics as the layers that are replaced."""

import copy

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from bilevel.model import cpu_kernels as layers
from bilevel.model.cpu_kernels import product, speed_up


def kinds() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "linear": torch.nn.Linear(24, 40),
        "without bias": torch.nn.Linear(24, 40, bias=False),
        "conv1d": Conv1D(40, 24),
        "gelu_new": NewGELUActivation(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", kinds())
def test_outputs_and_gradients_are_those_of_the_layer(kind: str, dtype: torch.dtype) -> None:
    plain = kinds()[kind].to(dtype)
    fast = speed_up(copy.deepcopy(plain))
    assert type(fast) is layers.FASTER[type(plain)] and fast.state_dict().keys() == plain.state_dict().keys()
    inputs = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    tolerance = 1e-5 if dtype != torch.bfloat16 else 2e-2
    results = []
    for layer in (plain, fast):
        outputs = layer(inputs)
        gradients = torch.autograd.grad((outputs * outputs.detach().cos()).sum(), [inputs, *layer.parameters()])
        results.append([outputs, *gradients])
    for mine, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_frozen_parts_get_no_gradient_and_keep_nothing(kind: str) -> None:
    """As autograd does it: a frozen weight needs no inputs kept; inputs that need no gradient need no weight."""
    layer = speed_up(kinds()[kind])
    layer.weight.requires_grad_(False)
    inputs = torch.randn(4, 24, requires_grad=True)
    outputs = layer(inputs)
    assert [tensor is None for tensor in outputs.grad_fn.saved_tensors] == [True, False]
    outputs.sum().backward()
    assert layer.weight.grad is None and inputs.grad is not None and layer.bias.grad is not None
    layer.weight.requires_grad_(True)
    outputs = layer(inputs.detach())
    assert [tensor is None for tensor in outputs.grad_fn.saved_tensors] == [False, True]


def test_a_model_keeps_its_parameters_results_and_recomputation() -> None:
    shape = transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(shape).eval()
    fast = speed_up(copy.deepcopy(plain))
    found = {type(module) for module in fast.modules()}
    assert found.isdisjoint(layers.FASTER) and found.issuperset(layers.FASTER.values())
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(fast(tokens).logits, plain(tokens).logits, rtol=1e-5, atol=1e-5)
    block, hidden = fast.transformer.h[0], torch.randn(2, 6, 32, requires_grad=True)
    again = checkpoint(lambda h: block(h)[0], hidden, use_reentrant=False).sum()
    for mine, expected in zip(
        torch.autograd.grad(again, list(block.parameters())),
        torch.autograd.grad(plain.transformer.h[0](hidden)[0].sum(), list(plain.transformer.h[0].parameters())),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (7, 3, 4)])
def test_products_of_strided_and_of_empty_matrices(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = torch.randn(k, m), torch.randn(k, n)
    torch.testing.assert_close(product(a.t(), b.t()), a.t() @ b)
    torch.testing.assert_close(product(a.t().contiguous(), b.t(), torch.ones(n)), a.t() @ b + 1)
