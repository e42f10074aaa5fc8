"""Tiny models, batches and weights for the tests of a step."""

import copy
import dataclasses

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from bilevel.data.batches import Batch, MicroBatch
from bilevel.data.tokenise import IGNORE
from bilevel.model.torch_copy import TorchCopy
from bilevel.step.f2sa import penalty_step
from bilevel.weights.learned import SampleWeights, SourceWeights

VOCABULARY, SAMPLES = 50, 24
NU = 4.0  # large, so that the gaps stand far above the rounding of the losses they are differences of


def tiny_model(dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    shape |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape, **rates)).train()


def batch(sample_ids: list[int]) -> MicroBatch:
    """Sample i: 5 + i % 7 tokens drawn from its number, of which the second half is supervised."""
    lengths = [5 + i % 7 for i in sample_ids]
    input_ids = torch.zeros(len(sample_ids), max(lengths), dtype=torch.long)
    targets = torch.full_like(input_ids, IGNORE)
    for row, (i, length) in enumerate(zip(sample_ids, lengths, strict=True)):
        tokens = torch.randint(VOCABULARY, (length + 1,), generator=torch.Generator().manual_seed(i))
        input_ids[row, :length] = tokens[:-1]
        targets[row, length // 2 : length] = tokens[length // 2 + 1 :]
    ones = torch.ones(len(sample_ids), dtype=torch.float64)
    return MicroBatch(input_ids, targets, torch.tensor(sample_ids), torch.arange(len(sample_ids)), ones)


def cut(sample_ids: list[int], size: int, counts: torch.Tensor | None = None, drawn: int | None = None) -> Batch:
    """A global batch in micro-batches of `size` rows, dealt in an order that is not the batch's."""
    counts = torch.ones(len(sample_ids), dtype=torch.float64) if counts is None else counts
    micro_batches = []
    for places in torch.arange(len(sample_ids)).flip(0).split(size):
        micro = batch([sample_ids[place] for place in places])
        micro_batches.append(dataclasses.replace(micro, places=places, counts=counts[places]))
    return Batch(torch.tensor(sample_ids), micro_batches, counts, drawn or len(sample_ids))


def two_copies(model, weight_decay: float = 0.0, clip_grad_norm: float | None = None) -> tuple[TorchCopy, TorchCopy]:
    return tuple(TorchCopy(copy.deepcopy(model), weight_decay, clip_grad_norm) for _ in "uw")


def source_weights(alpha: float = 1 / NU) -> SourceWeights:
    return SourceWeights(torch.arange(SAMPLES) % 3, torch.tensor([0.2, 0.3, 0.5]), alpha, "adam")


def sample_weights() -> SampleWeights:
    return SampleWeights(SAMPLES, None, "sigmoid", 1 / NU, "adam")


def train(steps: int, micro: int, x, dropout: float = 0.0, clip: float | None = None, val: bool = True, order: int = 1):
    u, w = two_copies(tiny_model(dropout), weight_decay=0.0, clip_grad_norm=clip)
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        ids = torch.randperm(SAMPLES, generator=generator)
        validation = cut((100 + ids[:7]).tolist(), micro) if val else None
        penalty_step(u, w, x, cut(ids[:12].tolist(), micro), validation, NU, 1e-3, 1000 * step, order)
        if step % 2:
            x.step(0.1)
    return u, w, x


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain_loss(model: torch.nn.Module, sample: int) -> torch.Tensor:
    """l_i by full logits of a single row, the obvious way."""
    row = batch([sample])
    logits = model(input_ids=row.input_ids).logits[0]
    return functional.cross_entropy(logits, row.targets[0], ignore_index=IGNORE)
