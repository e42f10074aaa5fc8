"""x stays finite, or the run stops with a message that names x."""

import math

import pytest
import torch

from bilevel.errors import TrainingStopped
from bilevel.weights.learned import SampleWeights, SourceWeights


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "mirror"])
@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_records_whose_weights_have_all_underflowed(x_map: str, optimizer: str):
    """Their weighted mean gap is that of their ratios: as for records as far apart that have not underflowed."""
    moved = []
    for level in (-1e4, -2.0 if x_map == "softmax" else -40.0):
        x = SampleWeights(6, None, x_map, 10.0, optimizer)
        x.x[:4] = torch.tensor([level, level, level - 1, level + 1])
        x.refresh()
        before = x.x.clone()
        x.accumulate(torch.arange(4), torch.tensor([0.3, 0.1, -0.2, 0.5]))
        x.step(0.01)
        assert x.x.isfinite().all() and math.isfinite(x.total)
        moved.append(x.x - before)
    assert (moved[0][4:] == 0).all()
    if optimizer == "mirror":
        torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=2e-3)  # x of 1e4 has three digits behind the point
        assert moved[0][:4].abs().min() > 1e-3
    else:
        assert (moved[0] == 0).all()  # the gradient has the factor c


def test_lr_x_that_takes_every_weight():
    x = SampleWeights(4, None, "sigmoid", 10.0, "mirror")
    x.x[:] = -1e5
    x.refresh()
    with pytest.raises(TrainingStopped, match="every weight has become 0: steps of x with lr_x 0.1 carry it too far"):
        x._check(torch.arange(4), 0.1)


@pytest.mark.parametrize("per_sample", [True, False])
def test_x_that_overflows(per_sample: bool):
    x = (
        SampleWeights(4, None, "softmax", 10.0, "sgd")
        if per_sample
        else SourceWeights(torch.arange(4), torch.full((4,), 0.25), 10.0, "sgd")
    )
    x.accumulate(torch.arange(4), torch.tensor([0.3, 0.1, -0.2, 0.5]) * (1e300 if not per_sample else 1))
    with pytest.raises(TrainingStopped, match="x is not finite any more: steps of x with lr_x 1e\\+3"):
        x.step(1e300 if not per_sample else 1e39)


def test_rounding_of_the_normaliser_is_no_reason_to_stop():
    x = SampleWeights(4, None, "sigmoid", 10.0, "mirror")
    x.total = -1e-20
    x.accumulate(torch.arange(4), torch.tensor([0.3, 0.1, -0.2, 0.5]))
    x.x[:] = 2.0
    x.step(0.1)
    assert x.total == pytest.approx(float(torch.sigmoid(x.x.double()).sum()), rel=1e-6)
