"""Baselines as runs of the script: what is in the folder, what fixed makes of it, what is refused."""

from pathlib import Path

import pandas as pd
import pytest
from run_helpers import make_data, settings, train, train_until

import train_bilevel

QUICK, OTHERS = ["influence", "uniform"], ["loss", "perplexity", "rho", "ifd", "random", "oracle"]
MIXED = {"weights": "sample", "max_steps": None, "epochs": 1.0, "global_batch_size": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of 24 records a source: a score reads all of them."""
    return make_data(tmp_path_factory.mktemp("few"), 24)


@pytest.fixture(autouse=True)
def quiet(no_old_log: None) -> None:
    pass


def mixed(data: Path) -> list[str]:
    return [str(data / "mixed" / "train_mixed.json")]


@pytest.mark.parametrize("method", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_baseline_s_run_ends_in_weights(method: str, data: Path, tmp_path: Path):
    metrics = train(data, tmp_path / "run", method=method, train_data=mixed(data), **MIXED)
    weights = pd.read_csv(tmp_path / "run" / "weights.csv")
    assert list(weights) == ["file", "index", "weight", "is_noisy", "score"] and len(weights) == 48
    assert weights["weight"].mean() == pytest.approx(1)
    chosen = weights["weight"] > 0
    assert chosen.sum() == (48 if method == "uniform" else 24)
    assert method == "uniform" or weights["score"][chosen].min() >= weights["score"][~chosen].max()
    assert len(metrics) == 1 and {"roc_auc", "weight/train_mixed"} <= set(metrics) and "loss_w" not in metrics
    timing = pd.read_csv(tmp_path / "run" / "timing.csv")
    assert (timing["gflop"][0] > 0) == (method not in ("uniform", "random", "oracle"))
    assert not (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "weights.png").exists()


def test_fixed_trains_on_what_a_baseline_keeps(data: Path, tmp_path: Path):
    train(data, tmp_path / "oracle", method="oracle", train_data=mixed(data), **MIXED)
    start = str(tmp_path / "oracle")
    fixed = train(data, tmp_path / "fixed", method="fixed", x_init=start, train_data=mixed(data), **MIXED)
    assert fixed["step"].iloc[-1] == 2 and fixed["roc_auc"].iloc[-1] == 1


def test_per_source_a_baseline_gives_shares_of_what_is_kept(data: Path, tmp_path: Path):
    train(data, tmp_path / "rho", method="rho", keep=0.25)
    weights = pd.read_csv(tmp_path / "rho" / "weights.csv")
    assert list(weights) == ["source", "weight", "samples", "score"] and weights["weight"].sum() == pytest.approx(1)
    assert (weights["weight"] * 12 % 1).round(6).isin([0, 1]).all()
    train(data, tmp_path / "fixed", method="fixed", x_init=str(tmp_path / "rho"), max_steps=2)


def test_align_trains_one_model_and_saves_it(data: Path, tmp_path: Path):
    metrics = train(data, tmp_path / "align", method="align", max_steps=2, x_optimizer="adam")
    assert metrics["weight/train_noisy"].iloc[-1] != 0.5
    assert {"val_loss_w", "lr_x", "test_loss_w"} <= set(metrics) and not {"loss_u", "gap", "test_loss_u"} & set(metrics)
    assert (tmp_path / "align" / "model").exists()


@pytest.mark.slow
def test_align_goes_on_where_it_was_stopped(data: Path, tmp_path: Path):
    train(data, tmp_path / "whole", method="align")
    assert train_until(3, settings(data, tmp_path / "stopped", method="align")) == 143
    train(data, tmp_path / "stopped", method="align")
    for name in ("metrics.csv", "weights.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    gflop = [pd.read_csv(tmp_path / name / "timing.csv")["gflop"].tolist() for name in ("whole", "stopped")]
    assert gflop[0] == gflop[1]


@pytest.mark.slow
def test_operations_of_f2sa_are_those_of_three_passes_and_of_fixed_of_one(data: Path, tmp_path: Path):
    """u and w on training data, w on as many validation samples of the same kinds."""
    second = tmp_path / "second.json"
    second.write_bytes((data / "test.json").read_bytes())
    gflop, files = {}, [str(data / "train_clean.json"), str(second)]
    for method in ("f2sa", "fixed"):
        train(data, tmp_path / method, method=method, train_data=files)
        gflop[method] = pd.read_csv(tmp_path / method / "timing.csv")["gflop"].iloc[-1]
    assert 2.5 < gflop["f2sa"] / gflop["fixed"] < 3.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "best"}, "method: input should be"),
        ({"method": "influence", "lisa_layers": 1}, "remove lisa_layers"),
        ({"method": "align", "backend": "deepspeed"}, "method=align needs backend=torch"),
        (
            {"method": "oracle", "train_data": "test.json", "test_data": [], "weights": "sample"},
            "needs the field is_noisy",
        ),
        ({"method": "ifd", "loss_on": "all"}, "have no prompts"),
        ({"method": "rho", "keep": 0}, "keep: input should be greater than 0"),
        (
            {"max_steps": None, "epochs": 1, "x_warmup_steps": 3},
            "x_warmup_steps 3 leave x no step to learn in the run's 3",
        ),
        (
            {"max_steps": None, "epochs": 1, "x_warmup_steps": 100},
            "x_warmup_steps 100 leave x no step to learn in the run's 3 steps",
        ),
        (
            {"max_steps": 4, "upper_every": 5, "x_optimizer": "sgd"},
            "upper_every 5 leave x no step to learn in the run's 4 steps",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict, words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if "train_data" in changes:
        changes = changes | {"train_data": [str(data / changes["train_data"])]}
    assert train_bilevel.main(settings(data, tmp_path / "refused", **changes)) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "refused").exists()


def test_a_dry_run_sees_that_no_weight_would_move(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for warmup, code in ((2, 0), (3, 2), (100, 2)):
        given = settings(data, tmp_path / "r", max_steps=None, epochs=1, x_warmup_steps=warmup)
        assert train_bilevel.main([*given, "--dry_run"]) == code
        assert ("leave x no step to learn in the run's 3 steps" in capsys.readouterr().err) == (code == 2)
