"""bilevel.run.picture.py: weights.png of records."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from samples_helpers import SIZES, make_samples, make_weights

from bilevel.monitor.findings import evidence_row
from bilevel.run.picture import BESIDE, draw_weights
from bilevel.weights.learned import SourceWeights
from bilevel.weights.statistics import QUANTILES
from bilevel.weights.statistics import quantiles as quantiles_of


def test_the_figure_of_records_of_which_nobody_says_whether_they_are_noisy(tmp_path: Path):
    weights, n = make_weights(), sum(SIZES)
    quantiles = {
        f"weight_q/{q}": [1.0, value] for q, value in zip(QUANTILES, quantiles_of(weights, QUANTILES), strict=True)
    }
    pd.DataFrame({"step": [0, 1]} | quantiles).to_csv(tmp_path / "metrics.csv", index=False)
    for noisy in (True, False):
        draw_weights(tmp_path, weights, make_samples(noisy=noisy))
        assert (tmp_path / "weights.png").stat().st_size > n
        (tmp_path / "weights.png").unlink()


@pytest.mark.parametrize("number", [3, BESIDE + 2])
def test_the_figure_of_sources_has_their_intervals_as_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """At the last step the bands end where the evidence ends; of very many sources only the lines are drawn."""
    samples = make_samples([f"source$_{i}.json" for i in range(number)], [40] * number)
    weights = SourceWeights(samples.source_ids, torch.full((number,), 1 / number), 10.0, "auto")
    generator, rows = torch.Generator().manual_seed(0), []
    for step in range(30):
        row = {"step": step} | dict(zip((f"weight/{s}" for s in samples.sources), weights.p.tolist(), strict=True))
        rows.append(row | evidence_row(weights, samples.sources))
        ids = torch.randperm(len(samples), generator=generator)[:24]
        weights.accumulate(ids, torch.randn(24, generator=generator) + 2 * (samples.source_ids[ids] == 0))
        weights.step(0.0)
    pd.DataFrame(rows).to_csv(tmp_path / "metrics.csv", index=False)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    draw_weights(tmp_path, weights, samples)
    left, right = figures[0].axes
    assert all(each.get_xlabel() == "model step" for each in (left, right))
    assert len({(line.get_color(), line.get_linestyle()) for line in left.get_lines()[:number]}) == number
    bands = [each.get_paths()[0].vertices for each in right.collections]
    assert len(bands) == (number if number <= BESIDE else 0)
    for source, vertices in zip(samples.sources, bands, strict=False):
        middle, half = (rows[-1][f"{name}/{source}"] for name in ("difference", "interval"))
        ends = vertices[vertices[:, 0] == vertices[:, 0].max(), 1]
        np.testing.assert_allclose([ends.min(), ends.max()], [middle - half, middle + half])
    worst = right.get_lines()[0].get_ydata()
    assert worst[-1] > 1 and right.get_ylim()[0] < 0 < worst[-1] < right.get_ylim()[1]
