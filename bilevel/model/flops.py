"""Number of floating-point operations of a model's passes, computed from the shapes of the micro-batches."""

import functools
import json

import numpy as np
import torch
import transformers
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bilevel.data.batches import MicroBatch
from bilevel.data.tokenise import IGNORE


class Passes:
    """Sums of B T, B T^2, B and M over all micro-batches of B rows, T tokens and M supervised tokens.

    A pass takes a B T + b B T^2 + c B + d M operations in every architecture: a for the blocks, b for attention scores,
    c for what a row costs besides its tokens, d for the head, which runs on supervised positions only. Packed rows have
    lengths of their own, whose sums stand in the place of B T and B T^2.
    """

    def __init__(self):
        self.forward, self.backward = np.zeros(4), np.zeros(4)  # backward: forward passes that a backward pass followed
        self.model: tuple[transformers.PretrainedConfig, np.ndarray] | None = None  # the last one, and its coefficients

    def add(self, micro: MicroBatch, backward: bool) -> None:
        terms = _of(micro)
        self.forward += terms
        if backward:
            self.backward += terms

    def add_last_block(self, micro: MicroBatch, blocks: int) -> None:
        """Add a forward pass, and a backward pass through the head and the last of `blocks` decoder blocks only."""
        terms = _of(micro)
        self.forward += terms
        self.backward += terms * (1 / blocks, 1 / blocks, 1 / blocks, 0.5)  # no gradient of the head's matrix

    def operations(self, config: transformers.PretrainedConfig) -> float:
        """Operations of all passes through a model of this configuration; NaN if they cannot be counted.

        They assume that all parameters are trainable; LISA and LoRA need fewer.
        """
        if self.model is None or self.model[0] is not config:  # a configuration takes 10 ms to write as text
            self.model = config, _coefficients(type(config), config.to_json_string())
        coefficients = self.model[1]
        return float(self.forward @ coefficients[:, 0] + self.backward @ coefficients[:, 1])


def _of(micro: MicroBatch) -> np.ndarray:
    """The terms of a micro-batch, padded or packed, (4,)."""
    lengths = micro.row_lengths.double()
    supervised = int((micro.targets != IGNORE).sum())
    return np.array([float(lengths.sum()), float(lengths.square().sum()), len(lengths), supervised])


SHAPES = ((1, 8, 4), (2, 8, 5), (2, 16, 7), (3, 10, 20), (4, 30, 11))  # B, T, M


@functools.cache
def _coefficients(kind: type[transformers.PretrainedConfig], numbers: str) -> np.ndarray:
    """Coefficients a, b, c, d of a forward and of a backward pass, (4, 2); NaN if they cannot be found.

    They reproduce exactly what torch.utils.flop_counter counts on a model of this shape without data (device meta). It
    counts eager attention, which computes all T^2 scores, and experts whose products do not depend on the routing.
    """
    unknown = np.full((4, 2), np.nan)
    try:
        with torch.device("meta"):
            config = kind.from_dict(json.loads(numbers))
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", experts_implementation="batched_mm"
            )
        counts = np.array([_count(model, *shape) for shape in SHAPES], dtype=float)
    except Exception:  # a model may fail on the meta device in any way, and that must not stop its training
        return unknown
    terms = np.array([_terms(*shape) for shape in SHAPES])
    found, *_ = np.linalg.lstsq(terms, counts)
    return found if np.allclose(terms @ found, counts, rtol=1e-9) else unknown


def _terms(rows: int, length: int, supervised: int) -> np.ndarray:
    return np.array([rows * length, rows * length**2, rows, supervised], dtype=float)


def _count(model: torch.nn.Module, rows: int, length: int, supervised: int) -> tuple[int, int]:
    """Operations of a forward pass, and of the backward pass after it."""
    ids = torch.ones(rows, length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        # With a mask, because without one some models read token ids, which do not exist on device meta.
        hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        logits = functional.linear(hidden.flatten(0, 1)[:supervised], head.weight, head.bias)
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward, counter.get_total_flops() - forward
