"""bilevel/run/results.py: weights.png of records."""

from pathlib import Path

import pandas as pd
from samples_helpers import SIZES, make_samples, make_weights

from bilevel.run.results import draw_weights
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
