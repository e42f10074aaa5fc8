"""bilevel/monitor/record_words.py: what a run says of the weights of its records."""

import re

import pytest
import torch
from samples_helpers import make_samples

from bilevel.monitor.record_words import lines
from bilevel.weights.learned import SampleWeights


def learned(c: torch.Tensor) -> SampleWeights:
    return SampleWeights(len(c), c / c.mean(), "sigmoid", 1.0, "adam")


def test_two_groups_and_the_lowest_records():
    """Every tenth sample has about a hundredth of the others' weight; samples 20 and 430 are records 40 and 260."""
    c = 1 + 0.05 * torch.rand(500, generator=torch.Generator().manual_seed(0))
    c[::10] /= 100
    c[20], c[430] = 0.001, 0.002
    weights, samples = learned(c), make_samples(["a.json", "b.json"], [300, 200])
    known, quantiles, below, lowest = lines(weights, samples)
    assert known == "nothing is known about the records yet: none has been compared with trusted ones"
    assert quantiles.startswith("weights of the records (mean 1): 5 % are below 0.01, half below 1.1")
    assert below.startswith("50 of 500 are below 0.5")
    assert lowest.startswith("lowest: a.json #40 (0.001), b.json #260 (0.002), ")


@pytest.mark.parametrize("share", [0, 0.4])
def test_what_is_known_about_harm(share: float):
    weights, samples = learned(torch.ones(500)), make_samples(["a.json"], [500])
    gaps = torch.randn(500, generator=torch.Generator().manual_seed(0)).double() - 2
    gaps[: int(500 * share)] = 2
    trusted = torch.randn(60, generator=torch.Generator().manual_seed(1)).double() - 2
    weights.accumulate(torch.arange(500), gaps, trusted=trusted)
    known, _ = lines(weights, samples)
    if share:
        words = r"(\d+) of 500 records are called harmful \(compared with 60 trusted ones; z [\d.]+\)"
        assert abs(int(re.fullmatch(words, known)[1]) - 200) < 20
    else:
        words = r"no record is shown to be harmful \(500 compared with 60 trusted ones; z -?[\d.]+, shown from 3.7\)"
        assert re.fullmatch(words, known)


def test_weights_that_have_not_moved():
    weights, samples = learned(torch.ones(20)), make_samples(["a.json"], [20])
    assert lines(weights, samples)[1:] == ["all records have the same weight, 1"]
