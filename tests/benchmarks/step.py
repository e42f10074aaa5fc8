"""Floating-point operations of one bilevel step, against the same passes cut and padded the usual way.

    python -m tests.benchmarks.step [--data DIR]      DIR: a folder that process.py wrote; default the shipped one

Both make three passes (u and w on 64 training samples, w on 64 validation samples) over the same samples with a 3.4M
GPT-2 of 8,192 tokens. Usual: micro-batches of 8 in drawn order, padded to their longest, logits at every position.
Operations are counted by torch.utils.flop_counter under eager attention, which it sees on a CPU.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from bilevel.backend import TorchCopy
from bilevel.config import Settings
from bilevel.data import BatchStream, MicroBatch, Samples, load_samples
from bilevel.f2sa import penalty_step
from bilevel.model import load_tokenizer, model_shape
from bilevel.records import find_files
from bilevel.tokenise import IGNORE, Tokeniser
from bilevel.weights import SourceWeights
from train_bilevel import quiet_libraries

SHAPE = {"model_type": "gpt2", "vocab_size": 8192, "n_positions": 512, "n_embd": 192, "n_layer": 4, "n_head": 4}
BATCH, STEPS, ALPHA = 64, 6, 10.0


def usual_passes(model: torch.nn.Module, train: list[MicroBatch], validation: list[MicroBatch]) -> None:
    """Forward and backward with logits everywhere: twice on training data, once on validation data."""
    for batch in (*train, *train, *validation):
        logits = model(input_ids=batch.input_ids).logits
        functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE).backward()
    model.zero_grad()


def in_eights(samples: Samples, sample_ids: torch.Tensor) -> list[MicroBatch]:
    return [batch for part in sample_ids.split(8) for batch in samples.batch(part, 10**9).micro_batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data_alpaca_0.5"))
    folder = parser.parse_args().data
    quiet_libraries()
    files = find_files([str(folder / "train_*.json")])
    settings = Settings(train_data=["-"], val_data=["-"], model_config=SHAPE)
    tokenizer = load_tokenizer(settings, files)
    tokeniser = Tokeniser(tokenizer, settings.max_length, settings.loss_on)
    train, val = load_samples(files, "auto", tokeniser), load_samples([folder / "val.json"], "auto", tokeniser)
    model = AutoModelForCausalLM.from_config(model_shape(settings), attn_implementation="eager")
    u, w = TorchCopy(model), TorchCopy(copy.deepcopy(model))
    x = SourceWeights(train.source_ids, torch.full((len(files),), 1 / len(files)), ALPHA, "adam")

    draws = BatchStream(len(train), BATCH, 0), BatchStream(len(val), BATCH, 1)
    operations = {"ours": 0, "usual": 0}
    for step in range(STEPS):
        ids = [next(draw) for draw in draws]
        ours = [part.batch(i, settings.micro_batch_tokens) for part, i in zip((train, val), ids, strict=True)]
        with FlopCounterMode(display=False) as counter:
            penalty_step(u, w, x, *ours, 1 / ALPHA, 1e-4, step)
        operations["ours"] += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            usual_passes(u.model, *[in_eights(part, i) for part, i in zip((train, val), ids, strict=True)])
        operations["usual"] += counter.get_total_flops()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.1f}M parameters, batch {BATCH} + {BATCH} validation, mean of {STEPS} steps")
    for name, count in operations.items():
        print(f"  {name:5} {count / STEPS / 1e9:7.1f} GFLOP a step")
    print(f"  ours / usual {operations['ours'] / operations['usual']:.3f}")


if __name__ == "__main__":
    main()
