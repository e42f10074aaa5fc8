"""What a bilevel step with two adapters on one frozen model costs beside other ways to train the same model.

    python -m tests.benchmarks.adapters [--rounds 5] [--batch 32] [--layers 30] [--out DIR]

The model has the shape of SmolLM2-135M, the samples Alpaca's lengths (tests.benchmarks.samples). In each round every
peer of ADAPTED (tests.benchmarks.peers), each in a process of its own, takes one step on the same samples, in turn; the
first round warms up and is not counted. Ratios are taken within a round. Writes adapters.csv.
"""

import argparse
import statistics
from pathlib import Path

import pandas as pd
import torch

from tests.benchmarks.peers import ADAPTED, Round, Work
from tests.benchmarks.samples import train_and_validation
from tests.benchmarks.step import machine, seconds
from train_bilevel import quiet_libraries

OURS = "two adapters on one copy"


def shape(layers: int) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }


def table(times: dict[str, list[float]]) -> pd.DataFrame:
    """A row per peer: its seconds, and ours as a part of them."""
    rows = []
    for name, found in times.items():
        ratios = [ours / other for ours, other in zip(times[OURS], found, strict=True)]
        rows.append({"peer": name, "rounds": len(found), "seconds": statistics.median(found),
                     "ours_of_it": statistics.median(ratios), "least": min(ratios), "most": max(ratios)})  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="training samples, and validation samples, of a step")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    quiet_libraries()
    train, validation = train_and_validation(None, shape(args.layers))
    generator = torch.Generator().manual_seed(0)
    draws = [
        Round(*(torch.randperm(len(part), generator=generator)[: args.batch] for part in (train, validation)))
        for _ in range(args.rounds + 1)
    ]
    found = table(seconds(Work(shape(args.layers), train, validation, draws), list(ADAPTED)))
    args.out.mkdir(parents=True, exist_ok=True)
    found.assign(machine=machine()).to_csv(args.out / "adapters.csv", index=False, float_format="%.4g")
    print(found.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
