"""A task small enough to know what scores of its records should say, and a model for it."""

from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bilevel.data.samples import TOKEN_FEATURES, Samples
from bilevel.data.tokenise import IGNORE

EOS, VOCABULARY = 0, 40
SHAPE = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
SHAPE |= {"bos_token_id": EOS, "eos_token_id": EOS} | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def make_samples(n: int, kind: str, seed: int) -> Samples:
    """Prompts of three digits, whose first says the answer; odd samples are noisy: emptied, or of random tokens."""
    random, rows = np.random.default_rng(seed), []
    for index in range(n):
        prompt = random.integers(1, 10, 3)
        response = prompt[0] + np.array([10, 20, 30])
        noisy = bool(index % 2) and kind != "clean"
        if noisy:
            response = response[:0] if kind == "empty" else random.integers(10, VOCABULARY, 3)
        ids = [*prompt.tolist(), *response.tolist(), EOS]
        rows.append({"index": index, "is_noisy": noisy if kind != "clean" else None, "input_ids": ids})
        rows[-1]["labels"] = [IGNORE] * 3 + ids[3:]
    return Samples([Path("file.json")], [datasets.Dataset.from_list(rows, features=TOKEN_FEATURES)], [0])


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **SHAPE))
