"""The head and the cross-entropy on this device against float64, and what exact checkpoints rest on."""

import torch
from gpu.rows import Rows
from torch.nn import functional

from bilevel.model.chunked_head import head_losses

M, H, V = 700, 256, 9001  # supervised positions, width, vocabulary; none of them a round number of chunks


def check(device: str, rows: Rows) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(M, H, generator=generator), 0.1 * torch.randn(V, H, generator=generator)
    targets, scales = torch.randint(V, (M,), generator=generator), torch.rand(M, generator=generator)
    for dtype, loss_limit, slope_limit in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 1e-2)):
        found = ours(hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), scales.to(device))
        wanted = reference(hidden.to(dtype).double(), weight.to(dtype).double(), targets, scales.double())
        name = str(dtype).removeprefix("torch.")
        for what, ours_, theirs, limit in zip(
            ("losses", "gradient of the hidden states", "gradient of the head"),
            found,
            wanted,
            (loss_limit, slope_limit, slope_limit),
            strict=True,
        ):
            error = (ours_.cpu().double() - theirs).norm() / theirs.norm()
            rows.at_most(f"{name}: {what} against float64, relative", float(error), limit)
        again = ours(hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), scales.to(device))
        rows.holds(f"{name}: the same bits twice", all(map(torch.equal, found, again)))
    sums_of_rows(device, rows)
    exact_products(device, hidden, weight, rows)
    exact_halves(device, rows)


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scales: torch.Tensor) -> list[torch.Tensor]:
    head = torch.nn.Linear(H, V, bias=False, device=hidden.device, dtype=hidden.dtype)
    head.weight.data.copy_(weight)
    hidden = hidden.clone().requires_grad_()
    losses = head_losses(head, hidden[None], targets, scales)[0, :, 0]
    (losses * scales).sum().backward()
    return [losses.detach(), hidden.grad, head.weight.grad]


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scales: torch.Tensor
) -> list[torch.Tensor]:
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    losses = functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    (losses * scales).sum().backward()
    return [losses.detach(), hidden.grad, weight.grad]


def sums_of_rows(device: str, rows: Rows) -> None:
    """A sample's loss is a sum over its tokens; one row has none (bilevel.model.losses.sample_losses)."""
    sizes = torch.tensor([300, 0, 7, M - 307])
    losses = torch.rand(M, generator=torch.Generator().manual_seed(2))
    wanted = torch.stack([part.double().sum() for part in losses.split(sizes.tolist())])
    found, again = (
        torch.segment_reduce(losses.to(device), "sum", lengths=sizes.to(device), unsafe=True) for _ in range(2)
    )
    error = float((found.cpu().double() - wanted).norm() / wanted.norm())
    rows.at_most("sums over the tokens of samples against float64, relative", error, 1e-6)
    rows.holds("sums over the tokens of samples: the same bits twice", torch.equal(found, again))


def exact_products(device: str, hidden: torch.Tensor, weight: torch.Tensor, rows: Rows) -> None:
    """torch.mm(out_dtype=float32) of bf16 numbers must not round its result to bf16."""
    a, b = (each.to(device, torch.bfloat16) for each in (hidden, weight))
    if device == "cpu":
        return rows.add("torch.mm(out_dtype=)", "left out: for GPUs alone")
    found, wanted = torch.mm(a, b.t(), out_dtype=torch.float32), a.double() @ b.double().t()
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    rows.at_most("torch.mm(out_dtype=float32) of bf16 against float64, relative", error, 1e-5)


def exact_halves(device: str, rows: Rows) -> None:
    """bf16 and the residual bits of an fp32 number (bilevel.model.zero_copy) rest on frexp and ldexp."""
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).to(device)
    values *= torch.linspace(-120, 120, 100_000, device=device).exp2()
    mantissa, exponent = torch.frexp(values)
    rows.holds("ldexp(frexp) gives fp32 numbers back", bool(torch.equal(torch.ldexp(mantissa, exponent), values)))
    wanted = torch.frexp(values.cpu())
    same = torch.equal(mantissa.cpu(), wanted.mantissa) and torch.equal(exponent.cpu(), wanted.exponent)
    rows.holds("frexp as on the CPU", same)
