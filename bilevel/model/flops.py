"""Floating-point operations of a model's passes, from the shapes of the micro-batches alone."""

import functools
import json

import numpy as np
import torch
import transformers
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bilevel.data.samples import MicroBatch
from bilevel.data.tokenise import IGNORE


class Passes:
    """What passed through a model: sums of B T, B T^2, B, M over micro-batches of B rows, T tokens, M supervised ones.

    A pass over them takes a B T + b B T^2 + c B + d M operations, whatever the architecture: those of the blocks, of
    attention scores, of what a row costs beside its tokens, and of a head that sees supervised positions only.
    """

    def __init__(self):
        self.forward, self.backward = np.zeros(4), np.zeros(4)  # backward passes follow a forward pass

    def add(self, micro: MicroBatch, backward: bool) -> None:
        terms = _terms(*micro.input_ids.shape, int((micro.targets != IGNORE).sum()))
        self.forward += terms
        if backward:
            self.backward += terms

    def add_last_block(self, micro: MicroBatch, blocks: int) -> None:
        """A forward pass, and back through the head and the last of so many blocks, to gradients of single samples."""
        terms = _terms(*micro.input_ids.shape, int((micro.targets != IGNORE).sum()))
        self.forward += terms
        self.backward += terms * (1 / blocks, 1 / blocks, 1 / blocks, 0.5)  # the head's matrix gets no gradient

    def operations(self, config: transformers.PretrainedConfig) -> float:
        """Of all passes through a model of this shape, all of whose parameters train: LISA and LoRA need fewer.

        nan where they cannot be counted.
        """
        coefficients = _coefficients(type(config), config.to_json_string())
        return float(self.forward @ coefficients[:, 0] + self.backward @ coefficients[:, 1])


SHAPES = ((1, 8, 4), (2, 8, 5), (2, 16, 7), (3, 10, 20), (4, 30, 11))  # B, T, M


@functools.cache
def _coefficients(kind: type[transformers.PretrainedConfig], numbers: str) -> np.ndarray:
    """(4, 2): a, b, c, d of a forward and of a backward pass; nan of a model that they cannot be found for.

    They fit exactly what torch.utils.flop_counter counts on a model of this shape that has no numbers (device meta),
    under eager attention, whose T^2 is computed whole, with experts whose products do not depend on where tokens go.
    """
    unknown = np.full((4, 2), np.nan)
    try:
        with torch.device("meta"):
            config = kind.from_dict(json.loads(numbers))
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", experts_implementation="batched_mm"
            )
        counts = np.array([_count(model, *shape) for shape in SHAPES], dtype=float)
    except Exception:  # what a model does that has no numbers is its own affair, and ends no run that trains it
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
        # Without a mask, some models look at numbers.
        hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        logits = functional.linear(hidden.flatten(0, 1)[:supervised], head.weight, head.bias)
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward, counter.get_total_flops() - forward
