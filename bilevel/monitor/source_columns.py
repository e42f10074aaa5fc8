"""What a step's batch holds of each source: columns of metrics.csv, and the tokens of each source at the start."""

import math

import pyarrow.compute
import torch

from bilevel.data.batches import Batch
from bilevel.data.samples import Samples
from bilevel.step.result import StepResult


def source_row(pool: Samples, sources: list[str], batch: Batch, result: StepResult) -> dict[str, float]:
    """The columns loss/<source>, gap/<source> and tokens/<source> of a step.

    pool: what the batch was drawn from. sources: the training sources, which are the first of the pool's. A source
    without a sample in the batch has 0 tokens and no loss.
    """
    numbers = pool.sources_of(batch.sample_ids)

    def per_source(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pool.sources), dtype=torch.float64).index_add_(0, numbers, values.double())

    tokens = per_source(torch.tensor([len(ids) for ids in batch.rows["input_ids"]])).long().tolist()
    row = dict(zip((f"tokens/{name}" for name in sources), tokens, strict=False))
    seen = per_source(batch.counts)
    for kind, values in {"loss": result.losses, "gap": result.gaps}.items():
        if values is not None:
            means = (per_source(batch.counts * values) / seen).tolist()
            row |= {f"{kind}/{name}": mean for name, mean in zip(sources, means, strict=False) if math.isfinite(mean)}
    return row


def tokens_of(samples: Samples) -> list[int]:
    """The tokens of each source's samples, padding aside; read off the table's offsets."""
    lengths = pyarrow.compute.list_value_length(samples.tokens.data.column("input_ids"))
    ends = samples.sizes.cumsum(0).tolist()
    parts = zip([0, *ends[:-1]], samples.sizes.tolist(), strict=True)
    return [pyarrow.compute.sum(lengths.slice(start, size)).as_py() for start, size in parts]
