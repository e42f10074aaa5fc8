"""bilevel/export/selection.py and bilevel/weights/two_groups.py: which records are chosen, and the threshold that
weights suggest."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import finished_run

from bilevel.errors import UserError
from bilevel.export.selection import DROP, KEEP, at_least, draw, heaviest, inclusion, quotas, read_marks
from bilevel.run.finished import FinishedRun, read_finished
from bilevel.weights.two_groups import split

WEIGHTS = np.array([0.0, 0.3, np.nan, 0.3, 4.0, 1.1, 0.02, 0.3, 2.5, 1.48])
NONE = np.zeros(10, dtype=np.int8)
SEEDS = 4000


def frequencies(n: int, replacement: bool, marks: np.ndarray = NONE) -> np.ndarray:
    """Mean counts of WEIGHTS over SEEDS draws, each of which has n records, none twice unless it may."""
    counts = np.array([draw(WEIGHTS, marks, n, replacement, seed) for seed in range(SEEDS)])
    assert (counts.sum(axis=1) == n).all() and counts.min() == 0
    assert counts.max() == 1 or replacement
    return counts.mean(axis=0)


@pytest.mark.slow
def test_draws_with_replacement_are_in_proportion():
    p = np.nan_to_num(WEIGHTS) / np.nansum(WEIGHTS)
    found = frequencies(7, replacement=True)
    assert found[0] == found[2] == 0
    np.testing.assert_array_less(np.abs(found - 7 * p), 4.5 * np.sqrt(7 * p * (1 - p) / SEEDS) + 1e-12)
    counts = np.array([draw(WEIGHTS, NONE, 7, True, seed) for seed in range(SEEDS)])
    np.testing.assert_allclose(counts.var(axis=0), 7 * p * (1 - p), rtol=0.15)  # independent draws: binomial


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 6])
def test_draws_without_replacement_have_the_probabilities_of_inclusion(n: int):
    expected = inclusion(np.nan_to_num(WEIGHTS), n)
    error = np.sqrt(expected * (1 - expected) / SEEDS)
    np.testing.assert_array_less(np.abs(frequencies(n, replacement=False) - expected), 4.5 * error + 1e-12)


def test_any_two_can_be_drawn_together():
    """Records in file order would leave neighbours apart for ever."""
    pairs = np.zeros((4, 4))
    for seed in range(300):
        counts = draw(np.ones(4), np.zeros(4, dtype=np.int8), 2, False, seed)
        pairs += np.outer(counts, counts)
    off = pairs[~np.eye(4, dtype=bool)] / 300
    np.testing.assert_array_less(np.abs(off - 1 / 6), 0.1)


positive = st.lists(st.floats(0, 1e6, allow_subnormal=False) | st.just(1.0), min_size=1, max_size=40)


@given(c=positive, data=st.data())
def test_inclusion_is_proportional_below_one(c: list[float], data: st.DataObject):
    """sum n, and min(1, k c_i) for one k: the definition."""
    weights = np.array(c)
    if not (weights > 0).any():
        return
    n = data.draw(st.integers(1, int((weights > 0).sum())))
    chances = inclusion(weights, n)
    assert chances.sum() == pytest.approx(n) and (chances[weights == 0] == 0).all() and chances.max() <= 1
    open_ = (chances > 0) & (chances < 1)
    if open_.any():
        k = chances[open_] / weights[open_]
        np.testing.assert_allclose(k, k[0], rtol=1e-9)
        assert (k[0] * weights[chances == 1] >= 1 - 1e-9).all()
    counts = draw(weights, np.zeros(len(c), dtype=np.int8), n, False, 0)
    assert counts.sum() == n and counts.max() == 1 and (counts[weights == 0] == 0).all()


@pytest.mark.parametrize("replacement", [False, True])
def test_quotas_of_the_sources_are_exact(replacement: bool):
    """The example of 4,000 records of five sources; every draw has the same numbers."""
    shares, each = np.array([0.38, 0.06, 0.21, 0.33, 0.02]), 3000
    c = np.repeat(shares, each)
    for seed in range(3):
        counts = draw(c, np.zeros(len(c), dtype=np.int8), 4000, replacement, seed, [each] * 5)
        assert counts.reshape(5, each).sum(1).tolist() == [1520, 240, 840, 1320, 80]


def test_largest_remainders():
    assert quotas(np.array([1.0, 1.0, 1.0]), 10).tolist() == [4, 3, 3]
    assert quotas(np.array([5.0, 3.0, 1.0, 0.0]), 10).tolist() == [6, 3, 1, 0]
    assert quotas(np.zeros(2), 0).tolist() == [0, 0]


@given(shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=9), n=st.integers(0, 10**6))
def test_quotas_are_within_one_of_the_shares(shares: list[float], n: int):
    exact = np.array(shares)
    if not exact.sum() > 1e-300:
        return
    found = quotas(exact, n)
    assert found.sum() == n and (np.abs(found - n * exact / exact.sum()) < 1 + 1e-6).all() and (found >= 0).all()


def test_as_many_as_there_are_are_all():
    np.testing.assert_array_equal(draw(WEIGHTS, NONE, 8, False, 0), WEIGHTS > 0)


def test_too_many():
    with pytest.raises(UserError, match="8 records have a weight above 0; draw at most as many, or add --replacement"):
        draw(WEIGHTS, NONE, 9, False, 0)
    with pytest.raises(UserError, match="no record has a weight above 0"):
        draw(np.array([0.0, np.nan]), NONE[:2], 1, True, 0)


def test_the_heaviest():
    assert heaviest(WEIGHTS, NONE, 1 / 3, 0).nonzero()[0].tolist() == [4, 8, 9]  # of the 9 that have a weight
    assert heaviest(WEIGHTS, NONE, 1, 0).tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    assert heaviest(WEIGHTS, NONE, 0.01, 0).sum() == 0


def test_of_equal_weights_at_the_cut_each_has_the_same_chance():
    counts = np.array([heaviest(WEIGHTS, NONE, 5 / 9, seed) for seed in range(1500)])
    found = counts.mean(axis=0)
    assert found[[4, 5, 8, 9]].tolist() == [1] * 4 and found[[0, 2, 6]].tolist() == [0] * 3
    np.testing.assert_allclose(found[[1, 3, 7]], 1 / 3, atol=0.06)
    np.testing.assert_array_equal(heaviest(WEIGHTS, NONE, 5 / 9, 3), counts[3])


def test_at_least():
    assert at_least(WEIGHTS, NONE, 1.1).nonzero()[0].tolist() == [4, 5, 8, 9]


@pytest.mark.slow
def test_marks_go_before_weights():
    marks = NONE.copy()
    marks[[2, 6]], marks[[4, 9]] = KEEP, DROP
    assert at_least(WEIGHTS, marks, 1.1).nonzero()[0].tolist() == [2, 5, 6, 8]
    assert heaviest(WEIGHTS, marks, 4 / 9, 0).nonzero()[0].tolist() == [2, 5, 6, 8]
    assert heaviest(WEIGHTS, marks, 1 / 9, 0).nonzero()[0].tolist() == [2, 6]
    found = frequencies(4, replacement=False, marks=marks)
    assert found[[2, 6]].tolist() == [1, 1] and found[[4, 9]].tolist() == [0, 0]
    rest = np.array([1, 3, 5, 7, 8])
    np.testing.assert_allclose(found[rest], inclusion(WEIGHTS[rest], 2), atol=0.03)
    found = frequencies(4, replacement=True, marks=marks)
    assert found[2] == 1 and found[6] > 1 and found[[4, 9]].tolist() == [0, 0]
    with pytest.raises(UserError, match="2 records are marked keep; draw at least as many"):
        draw(WEIGHTS, marks, 1, False, 0)


# ----------------------------------------------------------------------------------------------------------------------
# marks


@pytest.fixture
def run(write: Callable[..., Path], tmp_path: Path) -> FinishedRun:
    files = [write(f"{name}.json", [{"text": "x"}] * 3) for name in "ab"]
    table = pd.DataFrame({"source": ["a", "b"], "weight": [0.5, 0.5], "samples": [3, 3]})
    return read_finished(finished_run(tmp_path / "mine", files, table))


def marks_of(*marks: tuple, run: str = "mine") -> str:
    return json.dumps({"run": run, "marks": [dict(zip(("file", "index", "mark"), m, strict=True)) for m in marks]})


def test_marks_are_read(run: FinishedRun, write: Callable[..., Path]):
    path = write("m.json", marks_of(("b.json", 0, "keep"), ("a.json", 2, "drop"), ("b.json", 0, "keep")))
    assert read_marks(str(path), run).tolist() == [0, 0, DROP, KEEP, 0, 0]
    assert read_marks(None, run).tolist() == [0] * 6


BAD_MARKS = {
    "no JSON": ("hello", "not what report.html saves"),
    "a list": ("[]", "not what report.html saves"),
    "other mark": (marks_of(("a.json", 0, "maybe")), "'keep' or 'drop'"),
    "index as text": (marks_of(("a.json", "0", "keep")), "not what report.html saves"),
    "index below 0": (marks_of(("a.json", -1, "keep")), "not what report.html saves"),
    "index past the end": (marks_of(("a.json", 3, "keep")), "the run has no record 3 of a.json"),
    "other file": (marks_of(("c.json", 0, "keep")), "the run has no record 0 of c.json"),
    "other run": (marks_of(run="yours"), "are of the run yours, not of mine"),
    "keep and drop": (marks_of(("a.json", 0, "keep"), ("a.json", 0, "drop")), "is marked keep and drop"),
}


@pytest.mark.parametrize("content, message", BAD_MARKS.values(), ids=BAD_MARKS)
def test_bad_marks(run: FinishedRun, write: Callable[..., Path], content: str, message: str):
    with pytest.raises(UserError, match=message):
        read_marks(str(write("m.json", content)), run)
    with pytest.raises(UserError, match="No such file"):
        read_marks("none.json", run)


# ----------------------------------------------------------------------------------------------------------------------
# two groups


def mixed(rng: np.random.Generator, n: int, distance: float, share: float = 0.5) -> np.ndarray:
    return rng.normal(size=n) + distance * (rng.random(n) < share)


ONE = {
    "normal": lambda rng, n: rng.normal(size=n),
    "flat": lambda rng, n: rng.random(n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "spike with a flat tail": lambda rng, n: np.where(rng.random(n) < 0.9, 0.02 * rng.normal(size=n), -rng.random(n)),
    "two that overlap": lambda rng, n: mixed(rng, n, 1.8),
}
TWO = {
    "two normals": lambda rng, n: mixed(rng, n, 4),
    "a small group": lambda rng, n: mixed(rng, n, 8, 0.95),
    "two values": lambda rng, n: np.where(rng.random(n) < 0.5, 0.1, 1.9),
}


@pytest.mark.parametrize("n", [1000, 5000])
@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_two_humps_are_told_from_one(name: str, n: int):
    """In 20 samples: at most one of one hump is taken for two, and at most one of two for one."""
    said = []
    for seed in range(20):
        values = (ONE | TWO)[name](np.random.default_rng(seed), n)
        said.append(split(values, logarithm=False).convincing)
    assert sum(said) <= 1 if name in ONE else sum(said) >= 19


def test_the_threshold_is_the_best_cut_in_two():
    """Against all cuts between two neighbours, by the sum of squares within the groups."""
    c = np.sort(mixed(np.random.default_rng(1), 300, 5, 0.7))
    within = [c[:i].var() * i + c[i:].var() * (300 - i) for i in range(1, 300)]
    best = 1 + int(np.argmin(within))
    c -= c.min()
    found = split(c, logarithm=False)
    assert found.threshold == pytest.approx((c[:best].mean() + c[best:].mean()) / 2, rel=1e-9)
    assert found.sizes == (best, 300 - best)
    assert found.means == pytest.approx((c[:best].mean(), c[best:].mean())) and found.convincing
    assert "falls to" in found.reason


def test_softmax_weights_are_parted_on_their_logarithm():
    """x has two humps; exp(x) is one with a long tail, which parts nothing but the tail."""
    x = mixed(np.random.default_rng(0), 2000, 5)
    c = np.exp(x) / np.exp(x).mean()
    found = split(c, logarithm=True)
    assert found.convincing and abs(found.sizes[0] - 1000) < 60
    assert found.means[0] < found.threshold < found.means[1]
    assert not split(c, logarithm=False).convincing
    assert split(np.append(c, 0.0), logarithm=True).sizes[0] == found.sizes[0] + 1


@pytest.mark.parametrize("c", [[2.0, 0.0], [1.02, 0.98, 1.0, 0.0], [1.9, 2.1, 0.0, 0.0]])
def test_weights_of_0_are_no_weights_equals(c: list[float]):
    """The clearest case there is: some sources count, and the others not at all."""
    found = split(np.repeat(c, 50), logarithm=True)
    assert found.convincing and found.means[0] == 0 and found.sizes[0] == 50 * c.count(0.0)
    assert 0 < found.threshold < 0.9
