"""Twenty steps of u, w and x on this device beside the same on a CPU; the gaps in bf16; dropout's masks."""

import torch
from gpu import work
from gpu.rows import Rows

from bilevel.processes import World
from bilevel.step.f2sa import penalty_step
from bilevel.step.result import StepResult
from bilevel.weights.learned import SourceWeights

STEPS = {"cuda": 20, "cpu": 2}  # on a CPU there is nothing to find, but the script must work
BATCH, BUDGET, NU = 16, 2048, 0.1


def check(device: str, rows: Rows) -> None:
    steps = STEPS[device]
    for family in work.TINY:
        ours, x = train(family, device, steps)
        theirs, x_cpu = train(family, "cpu", steps)
        errors = [abs(a.loss_w - b.loss_w) / b.loss_w for a, b in zip(ours, theirs, strict=True)]
        rows.at_most(f"{family}, fp32, {steps} steps: loss against the CPU's, relative", max(errors), 1e-4)
        rows.holds(f"{family}: x of the same signs as the CPU's", bool(torch.equal(x.sign(), x_cpu.sign())))
        rows.holds(f"{family}: all gaps are 0 at the first step, where w = u", not ours[0].gaps.any())
        half, x_half = train(family, device, steps, bf16=True)
        correlation = torch.corrcoef(torch.stack([ours[-1].gaps.double(), half[-1].gaps.double()]))[0, 1]
        rows.add(f"{family}: correlation of the last step's gaps in bf16 with those in fp32", float(correlation))
        rows.add(f"{family}: x of the emptied source in fp32, bf16", f"{x[1]:.4f}, {x_half[1]:.4f}")
    (first, *_), _ = train("gpt2", device, 1, dropout=0.1)
    rows.holds("gpt2 with dropout: u and w draw the same masks (gaps 0 while w = u)", not first.gaps.any())


def train(
    family: str, device: str, steps: int, bf16: bool = False, dropout: float = 0.0
) -> tuple[list[StepResult], torch.Tensor]:
    """The results of all steps, and x at the end. The draws are those of the CPU's generator, on every device."""
    u, w = work.copies(work.model(family, dropout), device, bf16)
    vocabulary = u.shape.vocab_size
    data, trusted = work.Data(128, vocabulary), work.Data(64, vocabulary, seed=1)
    weights = SourceWeights(data.source_ids, torch.tensor([0.5, 0.5]), 1 / NU, "adam")
    sound = torch.arange(0, 64, 2)
    generator, world, results = torch.Generator().manual_seed(0), World(), []
    for step in range(steps):
        numbers = torch.randperm(128, generator=generator)[:BATCH]
        train_batch = data.batch(numbers, BUDGET, world)
        chosen = sound[torch.randperm(32, generator=generator)[:BATCH]]
        validation = trusted.batch(chosen, BUDGET, world)
        results.append(penalty_step(u, w, weights, train_batch, validation, NU, 1e-3, 1000 * step))
        weights.step(0.1)
    return results, weights.x.clone()
