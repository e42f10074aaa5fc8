"""Measure how much of the gaps l_i(w) - l_i(u), which move x, is lost by rounding to bf16.

A gap is a small difference of large losses. With a small lr_y or nu = 1/alpha it can be smaller than the rounding
error. Then x follows noise, with Adam at full speed, because Adam scales any gradient to the same step.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bilevel.data.batches import Batch
from bilevel.errors import TrainingStopped
from bilevel.model.base_copy import ModelCopy
from bilevel.seeding import process_seed
from bilevel.settings.fields import Settings

log = logging.getLogger("bilevel")

FLIP = 1 / 12  # variance of rounding to nearest, in squared units in the last place
SAFE, HOPELESS = 0.9, 0.3  # values of the gap signal
FIRST, PATIENCE = 16, 64  # steps: the first check, and the first at which a run can be stopped


class RoundingGuard:
    """Checks the gap signal of bf16 runs at steps 16, 32, 64, ...; warns below 0.9, stops a run that stays below 0.3.

    Steps before x starts to learn are measured but not judged.
    """

    def __init__(self, settings: Settings, copies: dict[str, ModelCopy]):
        self.settings, self.copy, self.lost = settings, copies.get("u"), 0
        self.on = self.copy is not None and self.copy.bf16 and settings.rounding_guard != "off"

    def check(self, step: int, batch: Batch, gaps: torch.Tensor) -> dict[str, float]:
        """The column gap_signal of metrics.csv after a step that saw these gaps (|B|,); empty if no check is due.

        A check costs two forward passes of the batch. Raises TrainingStopped.
        """
        if not self.on or step < FIRST or step & (step - 1) or len(gaps) < 2:
            return {}
        signal = gap_signal(gaps, rounding_noise(self.copy, batch, step))
        if step > self.settings.x_warmup_steps:
            self._judge(step, signal)
        return {"gap_signal": signal}

    def _judge(self, step: int, signal: float) -> None:
        if signal >= SAFE:
            self.lost = 0
            return
        s = self.settings
        self.lost = self.lost + 1 if signal < HOPELESS else 0
        words = (
            f"rounding to bf16 hides what moves x: the gaps l_i(w) - l_i(u) have a correlation of about {signal:.2f} "
            f"with exact ones ({SAFE} is safe). Raise lr_y ({s.lr_y:g}), lower alpha ({s.alpha:g}), let x start later "
            f"with a larger x_warmup_steps ({s.x_warmup_steps}), or use dtype=fp32"
        )
        if self.lost >= 2 and step >= PATIENCE and s.rounding_guard == "stop":
            raise TrainingStopped(f"{words}. With rounding_guard=warn the run goes on regardless")
        log.warning(f"step {step}: {words}")


def gap_signal(gaps: torch.Tensor, noise: torch.Tensor) -> float:
    """Estimated correlation of gaps (|B|,) with those in exact arithmetic; noise (|B|,): sampled rounding errors."""
    variance = float(gaps.double().var())
    return math.sqrt(max(0.0, 1 - float(noise.double().square().mean()) / variance)) if variance > 0 else 0.0


@torch.no_grad()
def rounding_noise(copy: ModelCopy, batch: Batch, seed: int) -> torch.Tensor:
    """A sample of the rounding error in the difference of two losses of each sample: (|B|,), equal on all ranks.

    It is the difference of the same losses computed twice, with different dither on the outputs of all layers that have
    weights.
    """
    losses = []
    for number in range(2):
        with _dither(copy, 2 * seed + number):
            losses.append(batch.collect([copy.losses(micro, seed) for micro in batch.micro_batches], copy.world))
    return losses[0] - losses[1]


@contextmanager
def _dither(copy: ModelCopy, seed: int) -> Iterator[None]:
    """Add dither: each bf16 output of a layer with weights moves by one unit in the last place, up or down, one time in
    12. This has the variance of rounding. Outputs of the head are not rounded (bilevel.model.losses)."""
    start = process_seed(seed, copy.world.rank, copy.world.size)
    generator = torch.Generator(copy.world.device).manual_seed(start)

    def dither(layer: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if not isinstance(output, torch.Tensor) or output.dtype != torch.bfloat16:
            return output
        draw = torch.rand(output.shape, generator=generator, device=output.device)
        flips = (draw < FLIP / 2).float() - (draw > 1 - FLIP / 2).float()
        return (output.float() + flips * last_place(output)).to(torch.bfloat16)

    layers = [module for module in copy.model.modules() if list(module.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(dither) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_place(values: torch.Tensor) -> torch.Tensor:
    """The unit in the last place of bf16 values, float32: 2^-7 times the largest power of two not above them."""
    _, exponent = torch.frexp(values.float())
    return torch.ldexp(torch.ones_like(values, dtype=torch.float32), exponent - 8)
