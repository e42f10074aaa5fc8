"""What is known about the weights of single records, in words: for the screen of a run, and at its end."""

import math

from bilevel.data.samples import Samples
from bilevel.monitor.words import apart
from bilevel.weights.chunks import chunks
from bilevel.weights.fixed import FixedSampleWeights
from bilevel.weights.record_evidence import CALL
from bilevel.weights.statistics import bounds, quantiles, split_point

LOWEST = 3  # records that are named
SHOWN = (0.05, 0.5, 0.95)  # quantiles


def lines(weights: FixedSampleWeights, samples: Samples) -> list[str]:
    """What is shown, quantiles of the weights, how many are below the two-means threshold, and the lowest ones."""
    known = [] if weights.records is None else [harm_words(weights)]
    low, high = bounds(weights, len(samples))
    if low == high:
        follow = weights.records is not None and weights.records.harm().number and weights.optimizer.sets_all
        later = ": they are set after x_warmup_steps, at each quarter of an epoch and at the end" if follow else ""
        return [*known, f"all records have the same weight, {low:.3g}{later}"]
    cut = split_point(weights, len(samples))
    threshold, least, middle, most = apart([cut, *quantiles(weights, SHOWN)])
    below = sum(int((weights.coefficients(part) < cut).sum()) for part in chunks(len(samples)))
    return [
        *known,
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


def harm_words(weights: FixedSampleWeights) -> str:
    """Whether harmful records are shown to exist, and how many."""
    evidence = weights.records
    harm = evidence.harm()
    if not harm.seen or not harm.trusted:
        return "nothing is known about the records yet: none has been compared with trusted ones"
    compared = f"compared with {harm.trusted} trusted ones"
    if not harm.shown:
        z = f"z {harm.z:.1f}" if math.isfinite(harm.z) else "no z"
        return f"no record is shown to be harmful ({harm.seen:,} {compared}; {z}, shown from {CALL:g})"
    return f"{harm.number:,} of {harm.seen:,} records are called harmful ({compared}; z {harm.z:.1f})"
