"""Models and batches for the check: random tokens, with lengths like Alpaca's, and no data files."""

import copy
from pathlib import Path

import numpy as np
import torch
import transformers

from bilevel.data.batches import Batch, make_micro_batches
from bilevel.data.tokenise import IGNORE
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import World

LENGTHS = Path(__file__).parents[1] / "benchmarks" / "alpaca_lengths.csv"
TINY = {
    "gpt2": {"vocab_size": 2048, "n_positions": 512, "n_embd": 128, "n_layer": 2, "n_head": 4},
    "llama": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}


def config(family: str, dropout: float = 0.0) -> transformers.PretrainedConfig:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout) if family == "gpt2" else {}
    shape = TINY[family] | rates | dict.fromkeys(("bos_token_id", "eos_token_id"))
    return transformers.AutoConfig.for_model(family, **shape)


def model(family: str, dropout: float = 0.0) -> torch.nn.Module:
    """A new model in fp32 on the CPU, the same at each call."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(family, dropout)).train()


def copies(of: torch.nn.Module, device: str, bf16: bool = False) -> tuple[TorchCopy, TorchCopy]:
    """u and w from one model."""
    return tuple(TorchCopy(copy.deepcopy(of).to(device), bf16=bf16) for _ in "uw")


class Data:
    """n samples of Alpaca's lengths, of which every second is of source 1 and has a response of zeros."""

    def __init__(self, n: int, vocabulary: int, seed: int = 0):
        random = np.random.default_rng(seed)
        lengths = np.loadtxt(LENGTHS, delimiter=",", skiprows=1, dtype=int)
        self.ids, self.labels = [], []
        for number, (prompt, response) in enumerate(lengths[random.permutation(len(lengths))[:n]]):
            ids = random.integers(1, vocabulary, prompt + response)
            ids[prompt:] *= 1 - number % 2
            self.ids.append(ids.tolist())
            self.labels.append([IGNORE] * prompt + ids[prompt:].tolist())
        self.source_ids = torch.arange(n) % 2

    def batch(self, numbers: torch.Tensor, token_budget: int, world: World, packed: bool = False) -> Batch:
        """The samples of these numbers (n,) in micro-batches of padded or packed rows."""
        rows = {
            "input_ids": [self.ids[i] for i in numbers.tolist()],
            "labels": [self.labels[i] for i in numbers.tolist()],
        }
        counts = torch.ones(len(numbers), dtype=torch.float64)
        micro_batches = make_micro_batches(rows, numbers, counts, token_budget, world, packed=packed)
        return Batch(numbers, micro_batches, counts, len(numbers), rows)
