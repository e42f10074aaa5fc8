"""Padding, passes and balance of the ranks, counted: batches of 64 records of Alpaca's lengths, 4,096 tokens a pass.

    python -m tests.benchmarks.padding

Passes: forward passes of each rank per batch and copy. Padded: all tokens over real ones. Largest: real tokens of the
fullest rank over those of the mean rank, mean of the batches. Slowest: padded tokens of the fullest rank over real ones
of the mean rank, which is what a step costs.
"""

from typing import NamedTuple

import numpy as np
import torch

from bilevel.data.batches import make_micro_batches
from bilevel.processes import World
from tests.benchmarks.samples import alpaca_lengths

BATCH, BUDGET = 64, 4096
RANKS = (1, 2, 4, 8)


class Found(NamedTuple):
    passes: float
    padded: float
    largest: float
    slowest: float


def count(ranks: int, packed: bool, steps: int = 78, batch: int = BATCH, budget: int = BUDGET) -> Found:
    """The mean of so many batches, drawn in random order without return; 78 are five times all lengths."""
    lengths, random = alpaca_lengths().sum(1), np.random.default_rng(0)
    order = np.concatenate([random.permutation(len(lengths)) for _ in range(-(-steps * batch // len(lengths)))])
    ones, found = torch.ones(batch, dtype=torch.float64), []
    for step in range(steps):
        tokens = [[1] * n for n in lengths[order[step * batch : (step + 1) * batch]]]
        rows = {"input_ids": tokens, "labels": tokens}
        shares = [
            make_micro_batches(rows, torch.arange(batch), ones, budget, World(rank, ranks), packed=packed)
            for rank in range(ranks)
        ]
        real = np.array([sum(len(micro.supervised.targets) for micro in share) for share in shares])
        padded = np.array([sum(micro.input_ids.numel() for micro in share) for share in shares])
        mean = real.mean()
        found.append((len(shares[0]), padded.sum() / real.sum(), real.max() / mean, padded.max() / mean))
    return Found(*np.mean(found, 0).tolist())


def main() -> None:
    print("| ranks | rows | passes | padded | largest | slowest |\n|---|---|---|---|---|---|")
    for packed in (False, True):
        for ranks in RANKS:
            numbers = count(ranks, packed)
            cells = [f"{numbers.passes:.1f}", *(f"{number:.2f}" for number in numbers[1:])]
            print(f"| {ranks} | {'packed' if packed else 'padded'} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
