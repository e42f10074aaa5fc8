"""bilevel/weights/removable.py: what is left out of the cleaned data, and how many records stand for the rest."""

import pytest

from bilevel.weights.removable import LITTLE, Advice, can_go, known_harmful, on_records, on_sources


def test_a_source_goes_that_is_worse_and_nearly_without_weight():
    assert can_go("worse", LITTLE) and not can_go("worse", 0.2) and not can_go("better", 0.01)


def test_what_is_worse_but_stays_is_drawn_in_proportion():
    """As many as the records of equal weight that are worth the same."""
    assert on_sources(["worse", "better"], [0.16, 1.84], [100, 100]) == Advice("draw", 117)
    assert on_sources(["worse", "better"], [1.0, 1.0], [30, 70]) == Advice("draw", 100)
    assert on_sources(["worse", "better"], [0.05, 1.95], [100, 100]) == Advice("leave out")


def test_nothing_is_advised_of_sources_that_nothing_is_shown_of():
    assert on_sources(["no difference shown"] * 2, [0.5, 1.5], [100, 100]) == Advice("wait")
    assert on_sources(["no difference shown", "better"], [0.5, 1.5], [100, 100]) == Advice("keep")
    assert on_sources([], [], []) == Advice("keep"), "weights that were given"


def test_records_are_left_out_if_they_are_shown_to_harm():
    assert on_records(True, 3, True, False) == Advice("leave out")
    assert on_records(True, 0, True, False) == on_records(True, None, False, False) == Advice("wait")
    assert on_records(True, 0, True, True) == on_records(True, None, True, True) == Advice("groups")
    assert on_records(False, None, True, False) == Advice("groups"), "scores of a baseline"
    assert on_records(False, None, False, False) == Advice("keep")


def test_what_is_called_counts_if_it_sets_the_weights_or_most_were_compared():
    assert known_harmful("auto", 5, 20, 100) == known_harmful("sgd", 5, 95, 100) == 5
    assert known_harmful("sgd", 5, 20, 100) is known_harmful("auto", 0, 0, 100) is None


@pytest.mark.parametrize("weights", [[0.2, 0.2], [0.5, 3.0]])
def test_never_more_than_there_are(weights: list[float]):
    assert on_sources(["worse", "better"], weights, [10, 20]).drawn <= 30
