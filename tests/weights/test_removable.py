"""bilevel/weights/removable.py: which sources the cleaned data leave out, and how many records stand for the rest."""

import pytest

from bilevel.weights.removable import LITTLE, can_go, worth_drawing


def test_a_source_goes_that_is_worse_and_nearly_without_weight():
    assert can_go("worse", LITTLE) and not can_go("worse", 0.2) and not can_go("better", 0.01)


def test_what_is_worse_but_stays_is_drawn_in_proportion():
    """As many as the records of equal weight that are worth the same."""
    assert worth_drawing(["worse", "better"], [0.16, 1.84], [100, 100]) == 117
    assert worth_drawing(["worse", "better"], [1.0, 1.0], [30, 70]) == 100
    assert worth_drawing(["worse", "better"], [0.05, 1.95], [100, 100]) is None  # it is left out
    assert worth_drawing(["no difference shown"] * 2, [0.5, 1.5], [100, 100]) is None


@pytest.mark.parametrize("weights", [[0.2, 0.2], [0.5, 3.0]])
def test_never_more_than_there_are(weights: list[float]):
    assert worth_drawing(["worse", "better"], weights, [10, 20]) <= 30
