"""sampling=weighted: compute a drawn sample with a probability that follows its weight.

Sample i of the drawn batch B is computed with probability

    pi_i = min(1, max(sampling_floor, c_i(x)))

by an independent coin, and then stands for 1/pi_i samples (Horvitz and Thompson 1952):

    g(x, y)   ~  1/|B| sum of c_i l_i / pi_i       over the samples computed; |B| counts all that were drawn
    mean gap  ~  sum of gap_i / pi_i  /  sum of 1 / pi_i     in place of means and counts of gaps in the x-gradient

Given B, the first estimate and both sums of the second have the expectation over the coins that uniform sampling
computes, whatever x is. Samples with c_i < 1 are computed in proportion to their weight and then count as one, c_i /
pi_i = 1. Samples with c_i >= 1 are always computed. The floor bounds 1/pi_i and lets a weight recover.
"""

import torch

from bilevel.seeding import generator
from bilevel.settings.fields import Settings
from bilevel.weights.fixed import Weights


def chances(c: torch.Tensor, floor: float) -> torch.Tensor:
    """pi, the probabilities with which samples of coefficients c (n,) are computed: (n,) float64 in [floor, 1]."""
    return c.double().clamp(floor, 1)


def choose(
    sample_ids: torch.Tensor, weights: Weights, settings: Settings, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples to compute (n,) among those drawn (|B|,), in order, and how many each stands for, (n,) float64.

    The choice depends on seed, step and x alone: it is equal on all ranks and after a resume. n may be 0.
    """
    if settings.sampling == "uniform":
        return sample_ids, torch.ones(len(sample_ids), dtype=torch.float64)
    pi = chances(weights.coefficients(sample_ids), settings.sampling_floor)
    coins = torch.rand(len(pi), generator=generator(settings.seed, "sampling", step), dtype=torch.float64)
    computed = coins < pi
    return sample_ids[computed], 1 / pi[computed]
