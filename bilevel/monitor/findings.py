"""The evidence on each source, as columns of metrics.csv and in words."""

import math

import torch

from bilevel.monitor.words import many
from bilevel.weights.evidence import Finding
from bilevel.weights.fixed import Weights
from bilevel.weights.removable import can_go
from bilevel.weights.shares import record_weights
from bilevel.weights.statistics import source_shares

MOST = 100_000  # steps; no number is given for a verdict that is further off


def evidence_row(weights: Weights, sources: list[str]) -> dict[str, float]:
    """The columns of metrics.csv on what is known about each source, in runs that learn weights per source."""
    if weights.evidence is None:
        return {}
    found = dict(zip(sources, weights.evidence.findings(weights.x), strict=True))
    row = {}
    for name, each in found.items():
        row |= {f"difference/{name}": each.difference, f"interval/{name}": (each.high - each.low) / 2}
        row[f"evidence/{name}"] = math.copysign(each.evidence, each.difference) if each.evidence > 0 else 0.0
    return {name: value for name, value in row.items() if math.isfinite(value)}


def lines(weights: Weights, sources: list[str]) -> list[str]:
    """A line for each source; none if there is one source, or weights are not learned per source."""
    if weights.evidence is None or len(sources) < 2:
        return []
    found = weights.evidence.findings(weights.x)
    return [f"{name}: {words(each)}" for name, each in zip(sources, found, strict=True)]


def left_out(weights: Weights, sources: list[str], sizes: torch.Tensor) -> list[str]:
    """The sources that the cleaned data would leave out now (bilevel.weights.removable); sizes (S,)."""
    if weights.evidence is None or len(sources) < 2:
        return []
    each = record_weights(weights.p, sizes).tolist()
    found = zip(sources, weights.evidence.findings(weights.x), each, strict=True)
    return [name for name, finding, weight in found if can_go(finding.verdict, weight)]


def source_table(weights: Weights, sources: list[str], sizes: torch.Tensor) -> list[tuple[str, int, float, str]]:
    """Per source its name, number of samples, share of the weight, and verdict with its numbers; sizes (S,)."""
    shares = source_shares(weights, sizes).tolist()
    verdicts = [""] * len(sources)
    if weights.evidence is not None:
        verdicts = [words(each) for each in weights.evidence.findings(weights.x)]
    return list(zip(sources, sizes.tolist(), shares, verdicts, strict=True))


def words(found: Finding) -> str:
    """The verdict on a source and the numbers behind it."""
    if found.called_at:
        state = "settled" if found.settled else "still moving"
        way = f"{share(found.start)} -> {share(found.weight)}"
        odds = f"e-value {math.exp(min(found.peak, math.log(1e12))):.1g}"
        return f"{found.verdict} (called at step {found.called_at}, {odds}; {way}, {state})"
    return f"{found.verdict} ({share(found.weight)}; {more_steps(found.steps_least, found.steps_most)})"


def more_steps(least: float, most: float) -> str:
    """The number of steps until a verdict, in words: from least to most, as chance may have it."""
    if math.isinf(least):
        return "no evidence yet"
    if least > MOST:
        return f"more than {MOST:,} more steps at this rate"
    low, high = (number if math.isinf(number) else _rounded(number) for number in (least, most))
    if high > MOST:
        return f"at least {many(low, 'more step')} at this rate"
    return (
        f"{low:,} to {high:,} more steps at this rate" if low < high else f"about {many(low, 'more step')} at this rate"
    )


def _rounded(number: float) -> int:
    """To two digits."""
    return round(round(number), -max(0, len(f"{number:.0f}") - 2))


def share(weight: float) -> str:
    return f"{weight:.2f}" if weight >= 0.01 else f"{weight:.1g}"


def closing(weights: Weights, sources: list[str]) -> str:
    """The closing sentences: how many sources differ beyond chance, and what the other weights mean."""
    called = sum(each.called_at is not None for each in weights.evidence.findings(weights.x))
    number, others = len(sources), len(sources) - called
    if not called:
        return f"none of {number} sources is shown to differ from the others: the weights mean nothing beyond chance"
    verb = "differs" if called == 1 else "differ"
    luck = max(weights.evidence.luck(), 1e-12)
    luck = f"chance alone calls any of {number} as clearly with a probability of at most {luck:.1g}"
    rest = f"; for {'the other' if others == 1 else f'the other {others}'}, no difference is shown" if others else ""
    return f"{called} of {number} sources {verb} from the others beyond chance ({luck}){rest}"
