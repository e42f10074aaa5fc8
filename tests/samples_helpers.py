"""Samples without text, and weights for them, for tests of what is written about all samples."""

from pathlib import Path

import datasets
import torch

from bilevel.data.samples import TOKEN_FEATURES, Samples
from bilevel.weights.learned import SampleWeights

NAMES, SIZES = ["a, b.json", 'c "d".json', "e.json"], [100, 30, 70]


def make_samples(names: list[str] = NAMES, sizes: list[int] = SIZES, noisy: bool = True, step: int = 2) -> Samples:
    """Files of which every second record (or each, with step 1) has become a sample."""
    tables = []
    for size in sizes:
        rows = {"index": [*range(0, step * size, step)]}
        rows["is_noisy"] = [i % 3 == 0 if noisy else None for i in range(size)]
        rows |= {key: [[1, 2]] * size for key in ("input_ids", "labels")}
        tables.append(datasets.Dataset.from_dict(rows, features=TOKEN_FEATURES))
    return Samples([Path(name) for name in names], tables, [0] * len(names))


def make_weights(n: int = sum(SIZES)) -> SampleWeights:
    """Uneven weights, in the middle of a run."""
    weights = SampleWeights(n, None, "sigmoid", 1.0, "adam")
    weights.x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    weights.x[5] = 0.0
    weights.refresh()
    return weights
