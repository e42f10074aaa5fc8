"""The training script, whole, on a small model and a slice of the shipped data."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from run_helpers import ROOT, SHIPPED, dump, emptied, make_data, read_wandb, settings, train, wandb_records
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_bilevel
from bilevel.settings.rules import validate

SOURCES = ["train_clean", "train_noisy"]
PER_SOURCE = ["weight", "difference", "interval", "evidence", "loss", "gap", "tokens"]
STEP_COLUMNS = ["step", "epoch", "loss_w", "loss_u", "gap", "val_loss_w", "grad_norm_w", "grad_norm_u", "lr_y", "lr_x"]
NOISE_COLUMNS = ["roc_auc", "threshold", "precision", "recall"]

FINISHED = {"tracker": "wandb", "log_every": 2, "eval_every": 3}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished per-source run with wandb offline, and what it printed."""
    out, screen = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with contextlib.redirect_stdout(screen):
        assert train_bilevel.main(settings(data, out, **FINISHED)) == 0
    return out, screen.getvalue()


@pytest.mark.slow
def test_a_users_command_is_that_run(finished: tuple[Path, str], data: Path, tmp_path: Path):
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, ROOT / "train_bilevel.py", *settings(data, out, **FINISHED)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    check_screen(out, done.stdout)
    for file in ("metrics.csv", "weights.csv"):
        assert (out / file).read_bytes() == (finished[0] / file).read_bytes()


def test_the_folder_of_a_run(finished: tuple[Path, str]):
    out, _ = finished
    files = {
        "config.yaml",
        "data.json",
        "machine.json",
        "overlap.json",
        "metrics.csv",
        "timing.csv",
        "weights.csv",
        "weights.png",
        "report.html",
        "run.log",
        "model",
        "wandb",
        "checkpoints",
    }
    assert {path.name for path in out.iterdir()} == files
    assert (out / "weights.png").read_bytes().startswith(b"\x89PNG")
    again, problems = validate(yaml.safe_load((out / "config.yaml").read_text()))
    assert not problems and again.max_steps == 6


def test_metrics_and_timing(finished: tuple[Path, str]):
    metrics = pd.read_csv(finished[0] / "metrics.csv")
    assert list(metrics) == [
        *STEP_COLUMNS,
        *(f"{name}/{s}" for name in PER_SOURCE for s in SOURCES),
        "test_loss_w",
        "test_loss_u",
        *NOISE_COLUMNS,
    ]
    assert metrics["step"].tolist() == [0, 2, 3, 4, 6]  # every 2 logged, every 3 evaluated
    assert metrics["test_loss_w"].notna().tolist() == [True, False, True, False, True]
    assert metrics["loss_w"].isna().tolist() == [True, False, False, False, False]
    assert metrics["epoch"].iloc[-1] == 6 * 16 / 192
    np.testing.assert_allclose(metrics["weight/train_clean"] + metrics["weight/train_noisy"], 1)
    parts = [metrics[f"loss/{source}"][1:] - metrics[f"gap/{source}"][1:] for source in SOURCES]  # losses of u
    assert ((np.minimum(*parts) <= metrics["loss_u"][1:]) & (metrics["loss_u"][1:] <= np.maximum(*parts))).all()
    assert (metrics["tokens/train_clean"] + metrics["tokens/train_noisy"])[1:].between(16 * 10, 16 * 128).all()
    timing = pd.read_csv(finished[0] / "timing.csv")
    assert timing["seconds_per_step"].notna().tolist() == [False, True, True, True, True]
    assert timing["step"].tolist() == metrics["step"].tolist() and timing["seconds"].is_monotonic_increasing
    assert (timing["tokens_per_second"][1:] > 0).all() and (timing["memory_mib"] > 0).all()


def test_weights_csv_is_the_last_row(finished: tuple[Path, str]):
    weights = pd.read_csv(finished[0] / "weights.csv")
    last = pd.read_csv(finished[0] / "metrics.csv").iloc[-1]
    known = ["difference", "low", "high", "p_worse", "evidence", "verdict", "called_at"]
    assert list(weights) == ["source", "weight", "samples", *known] and weights["samples"].tolist() == [96, 96]
    assert weights["weight"].tolist() == [last[f"weight/{source}"] for source in weights["source"]]


def test_the_saved_model_generates(finished: tuple[Path, str]):
    folder = finished[0] / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("### Instruction:\nAdd 2 and 3.\n\n### Response:\n", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > prompt["input_ids"].shape[1]
    assert model.config.eos_token_id == tokenizer.eos_token_id, "or generation would never end"


def test_what_the_user_sees(finished: tuple[Path, str]):
    check_screen(*finished)


def check_screen(out: Path, screen: str) -> None:
    assert screen == (out / "run.log").read_text(), "run.log is what was on the screen"
    last = pd.read_csv(out / "metrics.csv").iloc[-1]
    assert f"w_noisy: {last['weight/train_noisy']:.4f}" in screen
    assert f"test loss per token: w {last['test_loss_w']:.4f}, u {last['test_loss_u']:.4f}" in screen
    assert screen.count("wandb: kept offline; to send the run later: wandb sync ") == 1
    warnings = [line.strip() for line in screen.splitlines() if "warn" in line.lower()]
    cut = [line for line in warnings if "fill max_length 128; what is beyond it is cut off" in line]
    others = [line for line in warnings if line not in cut]
    assert "step 3/6: " in screen and others == ["warning: 96 records (first: record 0): a response is empty"]
    assert len(cut) == 3  # of train_clean, val and test; emptied ones are short


def test_the_report_goes_to_wandb_only_when_asked(finished: tuple[Path, str], data: Path, tmp_path: Path):
    """It holds the records' texts. Offline its place is kept, and `wandb sync` reads it there."""
    train(data, tmp_path / "run", max_steps=1, tracker="wandb", track_report=True)
    sent = []
    for folder in (finished[0], tmp_path / "run"):
        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        records = wandb_records(file.read_bytes())
        sent.append([record.artifact for record in records if record.WhichOneof("record_type") == "artifact"])
    assert all(artifact.type != "report" for artifact in sent[0])
    (artifact,) = [artifact for artifact in sent[1] if artifact.type == "report"]
    (entry,) = artifact.manifest.contents
    assert entry.path == "report.html" and Path(entry.local_path) == (tmp_path / "run" / "report.html").absolute()
    assert entry.skip_cache


def test_wandb_holds_every_logged_weight(finished: tuple[Path, str]):
    metrics = pd.read_csv(finished[0] / "metrics.csv")
    history = read_wandb(finished[0])
    (table,) = finished[0].glob("wandb/offline-run-*/files/media/table/sources*.json")
    columns, rows = (json.loads(table.read_text())[name] for name in ("columns", "data"))
    assert columns == ["source", "samples", "weight", "verdict"] and len(rows) == 2
    assert rows[0][0] == "train_clean" and sum(row[2] for row in rows) == pytest.approx(1)
    assert all("no difference shown" in row[3] for row in rows)
    assert not list((Path.home() / ".local/share/wandb").rglob(table.name))
    assert [row["step"] for row in history] == metrics["step"].tolist()
    for name in [f"weight/{source}" for source in SOURCES]:
        assert [row[name] for row in history] == metrics[name].tolist()


def test_per_sample_run(data: Path, tmp_path: Path):
    mixed = [str(data / "mixed" / "train_mixed.json")]
    metrics = train(data, tmp_path / "r", train_data=mixed, weights="sample", tracker="wandb", eval_every=3)
    quantiles = [f"weight_q/{q}" for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    source = [f"{name}/train_mixed" for name in ("weight", "loss", "gap", "tokens")]
    assert list(metrics)[10:] == [
        *source,
        "test_loss_w",
        "test_loss_u",
        *quantiles,
        "harmful",
        "harmful_z",
        *NOISE_COLUMNS,
    ]
    weights = pd.read_csv(tmp_path / "r" / "weights.csv")
    assert list(weights) == ["file", "index", "weight", "is_noisy", "mean_gap", "harmful_share"]
    assert weights["index"].tolist() == list(range(192)) and set(weights["file"]) == {"train_mixed.json"}
    assert weights["is_noisy"].tolist() == [False, True] * 96
    assert weights["weight"].mean() == pytest.approx(1) and weights["weight"].std() > 0
    assert metrics["weight_q/0.5"].iloc[-1] == pytest.approx(weights["weight"].median())
    history = read_wandb(tmp_path / "r")
    assert [row["step"] for row in history if "weights.values" in row] == [0, 3, 6]
    assert sum(history[-1]["weights.values"]) == 192


def test_same_settings_same_bytes(data: Path, tmp_path: Path):
    for name in ("a", "b"):
        train(data, tmp_path / name, dropout=0.1, max_steps=3, x_optimizer="adam")
    for file in ("metrics.csv", "weights.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_evaluation_and_logging_change_nothing(data: Path, tmp_path: Path):
    """Invariant 10, with dropout on."""
    changes = {"dropout": 0.1, "max_steps": 3, "x_optimizer": "adam"}
    often = train(data, tmp_path / "often", eval_every=1, **changes)
    seldom = train(data, tmp_path / "seldom", eval_every=100, test_data=[], **changes)
    names = [*STEP_COLUMNS, *(f"weight/{source}" for source in SOURCES)]
    pd.testing.assert_frame_equal(often[names], seldom[names])
    assert "test_loss_w" not in seldom


@pytest.mark.slow
def test_between_logged_steps_nothing_is_logged(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And the rows that there are, are those of a run that logs every step."""
    logged, log_row = [], train_bilevel.log_row
    monkeypatch.setattr(train_bilevel, "log_row", lambda run, *rest: (logged.append(run.step), log_row(run, *rest))[1])
    changes = {"eval_every": 100, "max_steps": 5, "x_optimizer": "adam"}
    seen = train(data, tmp_path / "seldom", log_every=2, **changes)
    assert logged == [0, 2, 4, 5]
    every = train(data, tmp_path / "every", **changes)
    pd.testing.assert_frame_equal(seen, every.iloc[[0, 2, 4, 5]].reset_index(drop=True))


def test_names_mean_nothing(data: Path, tmp_path: Path):
    """Invariant 11: renamed in the same order, no name saying clean or noisy, x is the same."""
    for source, name in zip(SOURCES, ("noisy_a", "pure_b"), strict=True):
        (tmp_path / f"{name}.json").write_bytes((data / f"{source}.json").read_bytes())
    changes = {"max_steps": 3, "x_optimizer": "adam"}
    named = train(data, tmp_path / "named", **changes)
    renamed = train(data, tmp_path / "renamed", train_data=[str(tmp_path / "*_[ab].json")], **changes)
    assert named["weight/train_clean"].nunique() > 1
    assert named["weight/train_clean"].tolist() == renamed["weight/noisy_a"].tolist()
    assert named["weight/train_noisy"].tolist() == renamed["weight/pure_b"].tolist()


def test_warmup_of_x_and_upper_every(data: Path, tmp_path: Path):
    metrics = train(data, tmp_path / "r", x_warmup_steps=3, upper_every=2, max_steps=5, x_optimizer="adam")
    moved = metrics["weight/train_clean"].diff().fillna(0) != 0
    assert moved.tolist() == [False, False, False, False, True, False]


def test_schedules(data: Path, tmp_path: Path):
    changes = {"warmup_ratio": 0.25, "x_lr_schedule": "constant", "x_optimizer": "adam"}
    metrics = train(data, tmp_path / "r", max_steps=8, global_batch_size=2, val_batch_size=1, test_data=[], **changes)
    cosine = [0.5 * (1 + np.cos(np.pi * k / 6)) for k in range(6)]
    np.testing.assert_allclose(metrics["lr_y"][1:], 3e-3 * np.array([1 / 3, 2 / 3, *cosine]))
    np.testing.assert_allclose(metrics["lr_x"][1:], 0.1 * np.array([1 / 3, 2 / 3, *[1] * 6]))


@pytest.mark.parametrize("weights", [pytest.param("source", marks=pytest.mark.slow), "sample"])
def test_x_starts_from_an_earlier_runs_weights(data: Path, tmp_path: Path, weights: str):
    train(data, tmp_path / "first", weights=weights, max_steps=2, x_optimizer="adam")
    start = str(tmp_path / "first" / "weights.csv")
    train(data, tmp_path / "second", weights=weights, x_init=start, x_warmup_steps=1, max_steps=2, upper_every=2)
    train(data, tmp_path / "still", weights=weights, x_init=start, lr_x=0, max_steps=1)
    first, still = (pd.read_csv(tmp_path / name / "weights.csv")["weight"] for name in ("first", "still"))
    assert first.nunique() > 1
    np.testing.assert_allclose(first, still, rtol=1e-5)
    other = make_data(tmp_path / "other", size=90)
    changes = {"weights": weights, "x_init": start, "max_steps": 1}
    assert train_bilevel.main(settings(other, tmp_path / "no", **changes)) == (2 if weights == "sample" else 0)


def test_size_start_counts_every_sample_once(data: Path, tmp_path: Path):
    dump(tmp_path / "d" / "train_clean.json", SHIPPED[:60])
    dump(tmp_path / "d" / "train_noisy.json", emptied(SHIPPED[60:80]))
    metrics = train(
        data, tmp_path / "r", train_data=[str(tmp_path / "d" / "*.json")], x_init="size", max_steps=1, lr_x=0
    )
    assert metrics["weight/train_clean"].iloc[0] == pytest.approx(0.75)


def test_epochs_decide_the_steps(data: Path, tmp_path: Path):
    assert train(data, tmp_path / "r", max_steps=None, epochs=0.25)["step"].iloc[-1] == 3


@pytest.mark.parametrize(
    "copy", ["w", pytest.param("u", marks=pytest.mark.slow), pytest.param("none", marks=pytest.mark.slow)]
)
def test_the_copy_that_is_saved(data: Path, tmp_path: Path, copy: str):
    losses = train(data, tmp_path / "r", save_model=copy, max_steps=2).iloc[-1]
    if copy == "none":
        assert not (tmp_path / "r" / "model").exists()
        return
    saved = {"w": "test_loss_w", "u": "test_loss_u"}[copy]
    assert losses["test_loss_w"] != losses["test_loss_u"]
    again = train(
        data,
        tmp_path / "again",
        model_config=None,
        model_name_or_path=str(tmp_path / "r" / "model"),
        max_steps=1,
        lr_y=0,
    )
    assert again["test_loss_w"].iloc[0] == pytest.approx(losses[saved], rel=1e-6)


def test_a_run_that_explodes_stops(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_bilevel.main(settings(data, tmp_path / "r", lr_y=1e30)) == 1
    said = capsys.readouterr().out
    assert "step 3: a loss or gradient is not finite" in said or "step 2: a loss" in said
    assert not (tmp_path / "r" / "weights.csv").exists()


CLEAN, BROKEN, ODD, SILENT = "DATA/train_clean.json", "TMP/broken.json", "TMP/odd.json", "TMP/silent.json"
MISTAKES = {
    "one source": ({"train_data": [CLEAN]}, "weights=source needs two training files"),
    "no match": ({"val_data": ["nowhere/*.json"]}, "val_data: no file matches 'nowhere/*.json'"),
    "batch": ({"global_batch_size": 999}, "global_batch_size 999 is larger than the data, 192"),
    "val batch": ({"val_batch_size": 97}, "val_batch_size 97 is larger than the data, 96"),
    "x_init": ({"x_init": "uniformly"}, "x_init: 'uniformly' is neither"),
    "not JSON": ({"val_data": [BROKEN]}, "broken.json, record 0: not JSON"),
    "no object": ({"val_data": [ODD]}, "odd.json, record 1: expected an object"),
    "no supervised token": ({"val_data": [SILENT], "val_batch_size": 1}, "silent.json: no record has a supervised"),
    "no folder": ({"model_config": None, "model_name_or_path": "./nothing"}, "model_name_or_path './nothing'"),
    "positions": ({"max_length": 4000}, "max_length 4000: the model has only 128 positions"),
    "model type": ({"model_config": {"model_type": "gpt9", "vocab_size": 400}}, "model_config: "),
    "no weights.csv": ({"x_init": CLEAN}, "expected columns source, weight"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_answered_before_anything_is_written(name: str, data: Path, tmp_path: Path, capsys):
    (tmp_path / "broken.json").write_text('[{"instruction": "a"')
    dump(tmp_path / "odd.json", [{"instruction": "a", "output": "b"}, ["c"]])
    dump(tmp_path / "silent.json", [{"instruction": "long " * 500, "output": "b"}])
    changes, message = MISTAKES[name]
    placed = json.loads(json.dumps(changes).replace("DATA", str(data)).replace("TMP", str(tmp_path)))
    assert train_bilevel.main(settings(data, tmp_path / "r", **placed)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err, captured.err
    assert "Traceback" not in captured.err and not (tmp_path / "r").exists()


def test_several_mistakes_are_answered_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_bilevel.main(settings(tmp_path, tmp_path / "r", x_init="what")) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in ("train_data: no file", "val_data: no file", "test_data: no file", "x_init"))


def test_another_run_is_never_overwritten(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("keep")
    assert train_bilevel.main(settings(data, tmp_path / "r")) == 2
    assert "already holds a run, which is never overwritten" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["mine.txt"]


def test_dry_run_prints_what_would_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_bilevel.main([*settings(data, tmp_path / "r"), "--dry_run", "-v"]) == 0
    printed, problems = validate(yaml.safe_load(capsys.readouterr().out))
    assert not problems and printed.lr_y == 3e-3 and not (tmp_path / "r").exists()


def test_a_dry_run_that_does_not_fit_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for limit, code in ((1e-3, 2), (100, 0)):
        assert train_bilevel.main([*settings(data, tmp_path / "r", gpu_memory_gib=limit), "--dry_run"]) == code
        out, err = capsys.readouterr()
        assert ("IT DOES NOT FIT" in out) == ("error: the run does not fit" in err) == (code == 2)


def test_dropped_records_are_reported(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    long = [{"instruction": "long " * 500, "output": "b"}]
    dump(tmp_path / "d" / "a.json", SHIPPED[:30] + 3 * long)
    dump(tmp_path / "d" / "b.json", SHIPPED[30:60])
    train(data, tmp_path / "r", train_data=[str(tmp_path / "d" / "*.json")], max_steps=1)
    said = capsys.readouterr().out
    assert "a: 30 samples (3 records dropped: no response within max_length), read as: alpaca" in said
    assert "b: 30 samples, read as: alpaca" in said
