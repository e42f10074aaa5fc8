"""sampling=weighted: of the samples that a step draws, compute each with a probability that follows its weight.

Sample i of the drawn batch B is computed with probability

    pi_i = min(1, max(sampling_floor, c_i(x)))

by a coin of its own, and then stands for 1/pi_i samples (Horvitz and Thompson 1952):

    g(x, y)   ~  1/|B| sum of c_i l_i / pi_i       over the samples computed, |B| counting all that were drawn
    mean gap  ~  sum of gap_i / pi_i  /  sum of 1 / pi_i     where the x-gradient takes means and counts of gaps

Given B, the expectation over the coins of the first, and of the sums in the second, is what uniform sampling computes,
whatever x is. What counts for less than the average is computed in proportion to its weight and then counts for one,
c_i / pi_i = 1; what counts for more is always computed. The floor keeps 1/pi_i bounded, and lets a weight come back.
"""

import torch

from bilevel.seeding import generator
from bilevel.settings.fields import Settings
from bilevel.weights.learned import SampleWeights, SourceWeights


def chances(c: torch.Tensor, floor: float) -> torch.Tensor:
    """pi of samples with coefficients c (n,): their probabilities to be computed, (n,) float64 in [floor, 1]."""
    return c.double().clamp(floor, 1)


def choose(
    sample_ids: torch.Tensor, x: SourceWeights | SampleWeights, settings: Settings, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a step's drawn samples (|B|,) those to compute (n,), in order, and how many each stands for, (n,) float64.

    A function of seed, step and x: equal on all ranks and after a resume. n may be 0.
    """
    if settings.sampling == "uniform":
        return sample_ids, torch.ones(len(sample_ids), dtype=torch.float64)
    pi = chances(x.coefficients(sample_ids), settings.sampling_floor)
    coins = torch.rand(len(pi), generator=generator(settings.seed, "sampling", step), dtype=torch.float64)
    computed = coins < pi
    return sample_ids[computed], 1 / pi[computed]
