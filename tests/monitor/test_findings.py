"""bilevel/monitor/findings.py: what a run says of each source; and the columns of weights.csv."""

import io
import math

import pandas as pd
import pytest
import torch
from samples_helpers import make_samples

from bilevel.monitor.findings import closing, evidence_row, lines, more_steps
from bilevel.weights.csv_file import write_weights
from bilevel.weights.fixed import FixedSourceWeights
from bilevel.weights.learned import SampleWeights, SourceWeights
from bilevel.weights.start import read_start

NAMES = ["a", "b", "c"]


def learned(steps: int, shift: list[float], sizes: list[int] | None = None) -> SourceWeights:
    """Weights after so many steps in which the gaps of source k have the mean shift[k] and standard deviation 1."""
    samples = make_samples(["a.json", "b.json", "c.json"], sizes or [100, 100, 100])
    weights = SourceWeights(samples.source_ids, torch.full((3,), 1 / 3), 10.0, "auto")
    generator, n = torch.Generator().manual_seed(0), len(samples)
    for _ in range(steps):
        ids = torch.randperm(n, generator=generator)[:24]
        gaps = torch.randn(24, generator=generator) + torch.tensor(shift)[samples.source_ids[ids].long()]
        weights.accumulate(ids, gaps)
        weights.step(0.0)
    return weights


def test_the_words_of_a_source_that_is_called_and_of_others():
    weights = learned(60, [2.0, 0.0, 0.0])
    first, second, third = lines(weights, NAMES)
    at = int(weights.evidence.called_at[0])
    assert first.startswith(f"a: worse (called at step {at}, e-value 1e+12; 0.33 -> ")
    assert first.endswith(("settled)", "still moving)"))
    for name, line in (("b", second), ("c", third)):
        assert line.startswith(f"{name}: better (") or line.startswith(f"{name}: no difference shown (0.")
    called = int((weights.evidence.called_at > 0).sum())
    assert closing(weights, NAMES).startswith(f"{called} of 3 sources differ")
    assert "at most 1e-12)" in closing(weights, NAMES) or called > 1


def test_sources_that_do_not_differ():
    weights = learned(20, [0.0, 0.0, 0.0])
    for line in lines(weights, NAMES):
        assert "no difference shown (0.33; " in line and "more steps at this rate" in line
    assert closing(weights, NAMES).startswith("none of 3 sources is shown to differ")
    assert "no difference shown (0.33; no evidence yet)" in lines(learned(0, [0.0] * 3), NAMES)[0]


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [
        (1, 1, "about 1 more step"),
        (7, 7, "about 7 more steps"),
        (138, 143, "about 140 more steps"),
        (42, 1234, "42 to 1,200 more steps"),
        (98765, 2e5, "at least 99,000 more steps"),
        (30, math.inf, "at least 30 more steps"),
        (2e5, math.inf, "more than 100,000 more steps"),
    ],
)
def test_how_long_it_takes_to_a_verdict(least: float, most: float, words: str):
    assert more_steps(least, most) == f"{words} at this rate"
    assert more_steps(math.inf, math.inf) == "no evidence yet"


def test_nothing_is_said_of_one_source_of_records_and_of_weights_that_stay():
    assert lines(SourceWeights(torch.zeros(5).long(), torch.ones(1), 1.0, "auto"), ["a"]) == []
    for weights in (SampleWeights(5, None, "sigmoid", 1.0, "adam"), FixedSourceWeights(torch.arange(3), torch.ones(3))):
        assert lines(weights, NAMES) == [] and evidence_row(weights, NAMES) == {}


def test_the_columns_of_metrics_csv():
    weights = learned(60, [2.0, 0.0, 0.0])
    row = evidence_row(weights, NAMES)
    for name, found in zip(NAMES, weights.evidence.findings(weights.x), strict=True):
        middle, half = row[f"difference/{name}"], row[f"interval/{name}"]
        assert (middle - half, middle + half) == pytest.approx((found.low, found.high))
    assert row["difference/a"] > 1 > 0 > row["difference/b"] and row["evidence/a"] > 3
    assert evidence_row(learned(0, [0.0] * 3), NAMES) == {f"evidence/{name}": 0 for name in NAMES}


def test_weights_csv_says_how_sure_each_weight_is(tmp_path):
    samples, weights = make_samples(["a.json", "b.json", "c.json"], [100, 100, 100]), learned(30, [2.0, 0.0, 0.0])
    write_weights(tmp_path / "weights.csv", weights, samples)
    table = pd.read_csv(tmp_path / "weights.csv")
    columns = ["difference", "low", "high", "p_worse", "evidence", "verdict", "called_at"]
    assert list(table) == ["source", "weight", "samples", *columns]
    worst = table.iloc[0]
    assert worst["verdict"] == "worse" and worst["low"] > 0 and worst["p_worse"] > 0.999 and worst["evidence"] > 20
    assert worst["called_at"] == weights.evidence.called_at[0]
    torch.testing.assert_close(read_start(tmp_path / "weights.csv", False, samples), weights.p)


def test_without_evidence_the_columns_are_empty(tmp_path):
    samples, weights = make_samples(["a.json", "b.json", "c.json"], [100, 100, 100]), learned(0, [0.0] * 3)
    write_weights(tmp_path / "weights.csv", weights, samples)
    rows = pd.read_csv(io.StringIO((tmp_path / "weights.csv").read_text()), keep_default_na=False, dtype=str)
    for name, value in {"difference": "", "low": "", "p_worse": "0.5", "evidence": "1.0", "called_at": ""}.items():
        assert set(rows[name]) == {value}
    torch.testing.assert_close(read_start(tmp_path / "weights.csv", False, samples), weights.p)
