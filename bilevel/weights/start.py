"""The weights that a run starts from (x_init)."""

from pathlib import Path

import torch

from bilevel.data.samples import Samples
from bilevel.weights.csv_file import TrainingFiles, read_tables


def read_start(x_init: str | Path, per_sample: bool, samples: Samples) -> torch.Tensor | None:
    """p (S,) per source, or c (N,) per sample, where None is 1 for all; both float64.

    x_init: uniform, size, or the path of a weights.csv that a run wrote on the same files. Raises UserError.
    """
    sizes = samples.sizes.double()
    if x_init in ("uniform", "size"):
        start = torch.ones_like(sizes) if x_init == "uniform" else sizes
        return None if per_sample else start / start.sum()
    names = [file.name for file in samples.files]
    files = TrainingFiles(names, samples.sources, samples.sizes.numpy(), same_run=False, index=samples.records)
    weights, end = torch.empty(len(samples) if per_sample else len(sizes), dtype=torch.float64), 0
    for table in read_tables(Path(x_init), per_sample, files, f"x_init {x_init}"):
        start, end = end, end + len(table)
        weights[start:end] = torch.tensor(table["weight"].to_numpy())
    return weights.div_(weights.mean() if per_sample else weights.sum())
