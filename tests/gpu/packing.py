"""Packed rows on this device: attention against float64, and losses, gradients and waits beside padded rows.

On a GPU in bf16, where attention is torch's varlen_attn; on a CPU in fp32, one attention per row.
"""

import torch
from gpu import work
from gpu.rows import Rows
from gpu.waits import waits
from torch.nn import functional

from bilevel.model.packed_attention import attention
from bilevel.model.packing import check_rows_stay_apart, use_packed_rows, why_padded
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import World
from bilevel.settings.fields import Settings
from bilevel.step.f2sa import penalty_step
from bilevel.weights.learned import SourceWeights

BUDGET, NU, WORLD = 2048, 0.1, World()
BOUNDS = [0, 1, 130, 131, 300]  # of rows: one token, more than a kernel's block, one token, and so on
LIMITS = {"cuda": (2e-2, 5e-3, 5e-2), "cpu": (1e-5, 1e-5, 1e-5)}  # of attention, of losses, of gradients


def check(device: str, rows: Rows) -> None:
    bf16, (of_attention, of_losses, of_gradients) = device == "cuda", LIMITS[device]
    dtype = torch.bfloat16 if bf16 else torch.float32
    for heads, key_heads, width in ((4, 4, 32), (8, 2, 64), (4, 1, 128)):
        error = attention_error(device, dtype, heads, key_heads, width)
        what = f"attention, {heads} heads of {width}, {key_heads} of keys: output and gradients against float64"
        rows.at_most(what, error, of_attention)
    for family in work.TINY:
        settings = Settings(
            train_data=["-"], val_data=["-"], model_config={"model_type": family}, max_length=512, packing=True
        )
        why_padded(settings, work.config(family), torch.device(device), "bf16" if bf16 else "fp32")
        padded, packed = work.copies(work.model(family), device, bf16)
        use_packed_rows(packed, settings)
        check_rows_stay_apart(packed)
        rows.holds(f"{family}: a row does not see another", True)
        (losses, gradient), (found, ours), (again, same) = map(losses_and_gradient, (padded, packed, packed))
        rows.at_most(f"{family}: losses beside padded rows, relative", distance(found, losses), of_losses)
        rows.at_most(f"{family}: gradient beside padded rows, relative", distance(ours, gradient), of_gradients)
        rows.holds(f"{family}: losses have the same bits twice", torch.equal(found, again))
        rows.add(f"{family}: the gradient has the same bits twice", str(torch.equal(ours, same)))
        steps(family, device, bf16, settings, rows)


def attention_error(device: str, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> float:
    """The largest relative distance of output and gradients from those of float64, row by row."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, BOUNDS[-1], width) for count in (heads, key_heads, key_heads)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    slope = torch.randn((1, BOUNDS[-1], heads, width), generator=generator)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, heads // key_heads
    here = [each.to(device).requires_grad_() for each in inputs]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in zip(BOUNDS, BOUNDS[1:], strict=False))
    out, _ = attention(module, *here, None, scaling=width**-0.5, cu_seq_lens_q=bounds, max_length_q=longest)
    ours = [out, *torch.autograd.grad((out * slope.to(out)).sum(), here)]
    exact = [each.double().requires_grad_() for each in inputs]
    parts = [
        functional.scaled_dot_product_attention(
            *(each[:, :, start:end] for each in exact), is_causal=True, scale=width**-0.5, enable_gqa=True
        )
        for start, end in zip(BOUNDS, BOUNDS[1:], strict=False)
    ]
    wanted = torch.cat(parts, 2).transpose(1, 2)
    theirs = [wanted, *torch.autograd.grad((wanted * slope).sum(), exact)]
    return max(distance(a, b) for a, b in zip(ours, theirs, strict=True))


def losses_and_gradient(copy: TorchCopy) -> tuple[torch.Tensor, torch.Tensor]:
    """l_i (n,) of 32 samples, and the gradient of their mean over all parameters."""
    batch = work.Data(32, copy.shape.vocab_size).batch(torch.arange(32), BUDGET, WORLD, packed=copy.packed)
    losses = []
    for number, micro in enumerate(batch.micro_batches):
        factors = (micro.places >= 0).float().to(copy.world.device) / 32
        losses.append(copy.losses(micro, 0, factors))
        copy.backward((factors * losses[-1]).sum(), number + 1 == len(batch.micro_batches))
    gradient = torch.cat([p.grad.flatten() for p in copy.model.parameters()]).clone()
    copy.discard()
    return batch.collect(losses, WORLD), gradient


def steps(family: str, device: str, bf16: bool, settings: Settings, rows: Rows) -> None:
    """Two steps of u and w on packed rows, and the waits of a third."""
    u, w = work.copies(work.model(family), device, bf16)
    for copy in (u, w):
        use_packed_rows(copy, settings)
    data = work.Data(64, u.shape.vocab_size)
    weights = SourceWeights(data.source_ids, torch.tensor([0.5, 0.5]), 1 / NU, "adam")

    def step(number: int) -> torch.Tensor:
        train, validation = (data.batch(torch.arange(32) + start, BUDGET, WORLD, packed=True) for start in (0, 32))
        return penalty_step(u, w, weights, train, validation, NU, 1e-3, number).gaps

    first, second = step(0), step(1)
    rows.holds(f"{family}: all gaps are 0 at the first step, where w = u", not first.any() and bool(second.any()))
    if device == "cuda":
        places, _ = waits(lambda: step(2))
        rows.add(f"{family}: waits of one step", f"{sum(places.values())} {dict(places)}", "at most 3 are wanted")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    a, b = (each.detach().cpu().double() for each in (a, b))
    return float((a - b).norm() / b.norm())
