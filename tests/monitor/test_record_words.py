"""bilevel/monitor/record_words.py: what a run says of the weights of its records."""

import torch
from samples_helpers import make_samples

from bilevel.monitor.record_words import closing, lines
from bilevel.weights.learned import SampleWeights


def learned(c: torch.Tensor) -> SampleWeights:
    return SampleWeights(len(c), c / c.mean(), "sigmoid", 1.0, "adam")


def test_two_groups_and_the_lowest_records():
    """Every tenth sample has about a hundredth of the others' weight; samples 20 and 430 are records 40 and 260."""
    c = 1 + 0.05 * torch.rand(500, generator=torch.Generator().manual_seed(0))
    c[::10] /= 100
    c[20], c[430] = 0.001, 0.002
    weights, samples = learned(c), make_samples(["a.json", "b.json"], [300, 200])
    quantiles, below, lowest = lines(weights, samples)
    assert quantiles.startswith("weights of the records (mean 1): 5 % are below 0.01, half below 1.1")
    assert below.startswith("50 of 500 are below 0.5")
    assert lowest.startswith("lowest: a.json #40 (0.001), b.json #260 (0.002), ")
    said = closing(weights, logarithm=False)
    assert said.startswith("the weights form two groups, of mean weight 0.0107 and 1.11: ")


def test_one_group_is_no_verdict():
    c = 1 + 0.05 * torch.randn(2000, generator=torch.Generator().manual_seed(0))
    assert closing(learned(c), logarithm=False).startswith("the weights form no two separate groups: ")


def test_weights_that_have_not_moved():
    weights, samples = learned(torch.ones(20)), make_samples(["a.json"], [20])
    assert lines(weights, samples) == ["all records still have the same weight, 1"]
    assert closing(weights, logarithm=False).startswith("all 20 records have the same weight")
