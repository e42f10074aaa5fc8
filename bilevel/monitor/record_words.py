"""What is known about the weights of single records, in words: for the screen of a run, and at its end."""

import torch

from bilevel.data.samples import Samples
from bilevel.monitor.words import apart
from bilevel.weights.chunks import chunks
from bilevel.weights.fixed import FixedSampleWeights
from bilevel.weights.statistics import bounds, quantiles, split_point
from bilevel.weights.two_groups import verdict

LOWEST = 3  # records that are named
SHOWN = (0.05, 0.5, 0.95)  # quantiles


def lines(weights: FixedSampleWeights, samples: Samples) -> list[str]:
    """Quantiles of the weights, the number below the two-means threshold, and the records with the lowest weights."""
    low, high = bounds(weights, len(samples))
    if low == high:
        return [f"all records still have the same weight, {low:.3g}"]
    cut = split_point(weights, len(samples))
    threshold, least, middle, most = apart([cut, *quantiles(weights, SHOWN)])
    below = sum(int((weights.coefficients(part) < cut).sum()) for part in chunks(len(samples)))
    return [
        f"weights of the records (mean 1): 5 % are below {least}, half below {middle}, 95 % below {most}",
        f"{below:,} of {len(samples):,} are below {threshold}, where two-means divides the weights",
        f"lowest: {', '.join(_lowest(weights, samples, high))}",
    ]


def _lowest(weights: FixedSampleWeights, samples: Samples, high: float) -> list[str]:
    """The records with the lowest weights: file, place in it from 0, and weight."""
    ids = weights.x.topk(min(LOWEST, len(samples)), largest=False).indices  # c rises with x
    c = apart([*weights.mapped(weights.x[ids]).tolist(), high])[:-1]
    places = zip(samples.sources_of(ids).tolist(), ids.tolist(), c, strict=True)
    return [
        f"{samples.files[source].name} #{samples.records(slice(i, i + 1))[0]} ({weight})"
        for source, i, weight in places
    ]


def closing(weights: FixedSampleWeights, logarithm: bool) -> str:
    """The closing sentence: whether the weights form two groups, and what that means."""
    return verdict(torch.cat([weights.coefficients(part) for part in chunks(weights.n)]).numpy(), logarithm)
