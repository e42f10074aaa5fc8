"""bilevel/weights/statistics.py: the same numbers as numpy's and scikit-learn's on all weights at once, in bounded
memory."""

import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from bilevel.weights import chunks
from bilevel.weights.learned import SampleWeights, SourceWeights
from bilevel.weights.statistics import (
    QUANTILES,
    histogram,
    in_order,
    noise_detection,
    quantiles,
    source_shares,
    split_point,
)

N = 1000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All N are visited in several parts, the last of them shorter."""
    monkeypatch.setattr(chunks, "CHUNK", 64)


def sample_weights(x_map: str, kind: str) -> tuple[SampleWeights, np.ndarray, np.ndarray]:
    """Weights with ties and large values, which records are noisy, and all c."""
    random = np.random.default_rng(0)
    is_noisy = random.random(N) < 0.3
    x = SampleWeights(N, None, x_map, 1.0, "adam")
    x.x = torch.from_numpy(random.normal(0, 2, N) - 2 * is_noisy).float()
    if kind == "ties":
        x.x = x.x.round()
    if kind == "unvisited":
        x.x[200:] = 0
    x.refresh()
    return x, is_noisy, x.coefficients(torch.arange(N)).numpy()


@pytest.mark.parametrize("kind", ["distinct", "ties", "unvisited"])
@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_what_all_weights_say(x_map: str, kind: str):
    x, is_noisy, c = sample_weights(x_map, kind)
    np.testing.assert_allclose(quantiles(x, QUANTILES), np.quantile(c, QUANTILES), rtol=1e-12)
    sizes = torch.tensor([400, 1, 599])
    expected = [part.sum() / N for part in np.split(c, [400, 401])]
    np.testing.assert_allclose(source_shares(x, sizes).numpy(), expected, rtol=1e-12)
    for among in (None, is_noisy):
        counts, edges = histogram(x, N, 40, among)
        expected_counts, expected_edges = np.histogram(c if among is None else c[among], 40, (c.min(), c.max()))
        assert np.array_equal(counts, expected_counts) and np.allclose(edges, expected_edges)
    found = noise_detection(x, is_noisy)
    called = c < found["threshold"]
    assert found["roc_auc"] == pytest.approx(roc_auc_score(is_noisy, -c), abs=1e-12)
    assert found["precision"] == pytest.approx(precision_score(is_noisy, called))
    assert found["recall"] == pytest.approx(recall_score(is_noisy, called))
    fit = KMeans(2, init=np.array([[c.min()], [c.max()]]), n_init=1, tol=0).fit(c.reshape(-1, 1))
    assert found["threshold"] == pytest.approx(fit.cluster_centers_.mean(), rel=1e-3)
    assert x.effective_share() == pytest.approx(c.sum() ** 2 / (c**2).sum() / N)


def test_per_source_weights_point_at_noise():
    source_ids, is_noisy = torch.tensor([0, 1, 1, 2, 2] * 200), np.array([True, False, True, False, False] * 200)
    x = SourceWeights(source_ids, torch.tensor([0.1, 0.3, 0.6]), 1.0, "adam")
    c = x.coefficients(torch.arange(N)).numpy()
    found = noise_detection(x, is_noisy)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(is_noisy, -c), abs=1e-12)
    assert source_shares(x, x.sizes).tolist() == pytest.approx([0.1, 0.3, 0.6])


def test_equal_weights_call_nobody_noisy():
    x = SourceWeights(
        torch.tensor([0] * 60 + [1] * 20), torch.tensor([0.75, 0.25]), 1.0, "adam"
    )  # equal but for rounding
    is_noisy = np.arange(80) >= 60
    assert split_point(x, 80) == pytest.approx(1)
    assert noise_detection(x, is_noisy) | {"roc_auc": 0.5} == {
        "roc_auc": 0.5,
        "threshold": pytest.approx(1),
        "precision": 0.0,
        "recall": 0.0,
    }
    assert histogram(x, 80, 64)[0].sum() == 80
    assert noise_detection(x, np.zeros(80, dtype=bool)) == {}


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_in_order_is_what_sorting_gives(scale: float):
    random = np.random.default_rng(1)
    values = (random.normal(0, scale, N)).astype(np.float32)
    values[:100] = values[100]
    values[200:230] = 0.0
    places = np.array([0, 0, 5, 499, 500, 998, 999])
    assert np.array_equal(in_order(values, places), np.sort(values)[places])


def test_memory_does_not_grow_with_n(monkeypatch: pytest.MonkeyPatch):
    """Of an evaluation where noise is not known, beside x itself."""
    monkeypatch.setattr(chunks, "CHUNK", 1 << 16)
    peaks = []
    for n in (1 << 18, 1 << 22):
        x = SampleWeights(n, None, "sigmoid", 1.0, "adam")
        x.x = torch.linspace(-3, 3, n)
        tracemalloc.start()  # of numpy's memory
        x.refresh()
        quantiles(x, QUANTILES), histogram(x, n, 64), source_shares(x, torch.tensor([n])), x.effective_share()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 16 << 20
