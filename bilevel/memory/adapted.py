"""Bytes of a frozen model and the adapters on it, which every process holds whole."""

import dataclasses

import torch

from bilevel.model.adapters import CONV
from bilevel.model.frozen_base import base_dtype, is_merged
from bilevel.settings.fields import Settings

SIZE = {"fp32": 4, "bf16": 2}
# nf4 with double quantisation: half a byte per weight; of each 64 weights a scale of one byte; of each 256 scales one
# float. A layer has a table of 16 levels, one of 256 for its scales, and the mean of those, all in float.
NF4_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
NF4_LAYER = 4 * (16 + 256 + 1)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model with adapters. frozen: bytes of the model's own tensors; adapters: parameters of all adapters together.

    casts: peak bytes of weights that exist only during a pass, in another dtype. whole: the model's own parameters.
    """

    frozen: float
    adapters: int
    casts: float
    whole: int
    copies: int

    @classmethod
    def of(cls, settings: Settings, model: torch.nn.Module, passes: str) -> "Adapted":
        """Count the tensors of a model with adapters on the meta device; passes: fp32 or bf16."""
        stored = base_dtype(settings, passes)
        packed = packed_layers(model) if stored == "nf4" else {}
        own = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        plain = sum(p.numel() for p in own.values()) - sum(packed.values())
        frozen = SIZE[passes if stored == "nf4" else stored] * plain
        frozen += sum(NF4_WEIGHT * size + NF4_LAYER for size in packed.values())
        casts = 0.0
        if passes == "bf16":  # autocast keeps a copy of each fp32 weight until the backward pass is over
            casts = 2 * (trained + (plain if stored == "fp32" else 0))
        if packed:  # one layer at a time is unpacked
            casts += SIZE[passes] * max(packed.values())
        return cls(frozen, trained, casts, sum(p.numel() for p in own.values()), len(settings.copies) or 1)

    def gpu(self) -> dict[str, float]:
        """Bytes that are kept on one GPU between steps, and the peak of the gradients."""
        return {
            "frozen model": self.frozen,
            "adapters": 4 * self.adapters,
            "Adam moments": 8 * self.adapters,
            "gradients": 4 * self.adapters,
        }

    def checkpoint(self) -> float:
        """Bytes of a checkpoint: adapters and their moments."""
        return 12 * self.adapters

    def saved(self, settings: Settings) -> float:
        """Bytes of model/: one adapter, or the whole model with the adapter merged in."""
        merged = is_merged(settings, four_bit=settings.base_dtype == "nf4")
        return self.frozen if merged else 4 * self.adapters / self.copies


def packed_layers(model: torch.nn.Module) -> dict[str, int]:
    """Weights of each layer that bitsandbytes packs, by name: linear layers of the model except the head."""
    head = model.get_output_embeddings()
    return {
        name: layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, (torch.nn.Linear, CONV)) and layer is not head and ".lora_" not in name
    }
