"""bilevel/run/results.py: weights.csv of many records, written and read a part at a time."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from bilevel.data.samples import TOKEN_FEATURES, Samples
from bilevel.errors import UserError
from bilevel.run import results
from bilevel.run.results import draw_weights, read_start, write_weights
from bilevel.weights import learned as weights
from bilevel.weights.learned import SampleWeights
from bilevel.weights.statistics import QUANTILES
from bilevel.weights.statistics import quantiles as quantiles_of

NAMES, SIZES = ["a, b.json", 'c "d".json', "e.json"], [100, 30, 70]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (weights, results):
        monkeypatch.setattr(module, "CHUNK", 64)


def make_samples(names: list[str] = NAMES, sizes: list[int] = SIZES, noisy: bool = True) -> Samples:
    """Every second record of a file has been dropped."""
    tables = []
    for size in sizes:
        rows = {"index": [*range(0, 2 * size, 2)], "is_noisy": [i % 3 == 0 if noisy else None for i in range(size)]}
        rows |= {key: [[1, 2]] * size for key in ("input_ids", "labels")}
        tables.append(datasets.Dataset.from_dict(rows, features=TOKEN_FEATURES))
    return Samples([Path(name) for name in names], tables, [0] * len(names))


def make_weights(n: int = sum(SIZES)) -> SampleWeights:
    x = SampleWeights(n, None, "sigmoid", 1.0, "adam")
    x.x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    x.x[5] = 0.0
    x.refresh()
    return x


@pytest.mark.parametrize("noisy", [True, False])
def test_weights_csv_is_what_pandas_writes_at_once(tmp_path: Path, noisy: bool):
    samples, x = make_samples(noisy=noisy), make_weights()
    write_weights(tmp_path / "weights.csv", x, samples)
    table = {"file": np.repeat(NAMES, SIZES), "index": np.concatenate([np.arange(0, 2 * n, 2) for n in SIZES])}
    table["weight"] = x.coefficients(torch.arange(200)).numpy()
    if noisy:
        table["is_noisy"] = np.concatenate([np.arange(n) % 3 == 0 for n in SIZES])
    assert (tmp_path / "weights.csv").read_text() == pd.DataFrame(table).to_csv(index=False)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.csv"]
    start = read_start(str(tmp_path / "weights.csv"), True, samples)
    torch.testing.assert_close(start, torch.tensor(table["weight"]), rtol=1e-12, atol=0)


def test_weights_of_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "weights.csv"
    write_weights(path, make_weights(), make_samples())
    others = [
        make_samples([*NAMES[:2], "f.json"]),
        make_samples(sizes=[100, 30, 71]),
        make_samples(sizes=[100, 31, 69]),
        make_samples(NAMES[:2], SIZES[:2]),
        make_samples(sizes=[99, 30, 70]),
    ]
    for other in others:
        with pytest.raises(UserError, match="was made from other training files: its file, index differ"):
            read_start(str(path), True, other)
    with pytest.raises(UserError, match="expected columns source, weight, found file, index, weight, is_noisy"):
        read_start(str(path), False, make_samples())
    lines = path.read_text().splitlines()
    lines[190] = lines[190].replace(lines[190].split(",")[-2], "many")
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="weights must be numbers"):
        read_start(str(path), True, make_samples())


def test_the_figure_of_records_of_which_nobody_says_whether_they_are_noisy(tmp_path: Path):
    x, n = make_weights(), sum(SIZES)
    quantiles = {f"weight_q/{q}": [1.0, value] for q, value in zip(QUANTILES, quantiles_of(x, QUANTILES), strict=True)}
    pd.DataFrame({"step": [0, 1]} | quantiles).to_csv(tmp_path / "metrics.csv", index=False)
    for noisy in (True, False):
        draw_weights(tmp_path, x, make_samples(noisy=noisy))
        assert (tmp_path / "weights.png").stat().st_size > n
        (tmp_path / "weights.png").unlink()
