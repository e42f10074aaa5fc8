"""method=fixed: draws in proportion to weights that stay, and plain fine-tuning where all are equal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from run_helpers import ROOT, dump, make_data, settings, train, train_until
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import train_bilevel
from bilevel.data.stream import BatchStream
from bilevel.data.tokenise import IGNORE
from bilevel.run.state import Run
from bilevel.settings.rules import validate
from bilevel.weights import draws as drawing
from bilevel.weights.draws import WeightedStream, draws
from bilevel.weights.fixed import FixedSampleWeights, FixedSourceWeights

pytestmark = pytest.mark.usefixtures("no_old_log")

RNG = np.random.default_rng(0)


def mixed(data: Path) -> dict:
    return {"train_data": [str(data / "mixed" / "train_mixed.json")], "weights": "sample", "method": "fixed"}


# ----------------------------------------------------------------------------------------------------------------------
# draws


@pytest.mark.parametrize(
    "parts", [[64, 64, 64], [1, 127, 64], [0, 3, 189], [0, 0, 192, 256, 5, 0, 0, 59], [640] + [0] * 9]
)
def test_over_all_starts_each_sample_is_drawn_as_often_as_its_weight(monkeypatch: pytest.MonkeyPatch, parts: list[int]):
    monkeypatch.setattr(drawing, "UNIT", 64)
    parts, total = np.array(parts), np.zeros(len(parts), dtype=int)
    for start in range(64):
        times = np.bincount(draws(parts / 64, RNG.permutation(len(parts)), start), minlength=len(parts))
        assert times.sum() == len(parts) and (times >= parts // 64).all() and (times <= -(-parts // 64)).all()
    line = RNG.permutation(len(parts))
    for start in range(64):
        total += np.bincount(draws(parts / 64, line, start), minlength=len(parts))
    assert total.tolist() == parts.tolist()


@pytest.mark.slow
def test_an_epoch_of_a_stream_has_n_draws_in_proportion():
    c = torch.tensor(RNG.gamma(0.5, size=500))
    c[:100] = 0
    c /= c.mean()
    stream, times = WeightedStream(c, 50, 3), np.zeros((200, 500))
    for epoch in times:
        for _ in range(10):
            np.add.at(epoch, next(stream), 1)
    assert (times[:, :100] == 0).all() and (np.abs(times - c.numpy()) < 1 + 1e-5).all()
    spread = np.sqrt((c % 1 * (1 - c % 1)).numpy() / 200)
    z = (times.mean(0) - c.numpy())[100:] / spread[100:]
    assert 0.8 < z.std() < 1.2 and np.abs(z).max() < 5
    # Neighbours are not tied: whether one is drawn says little of the next.
    rest = times[:, 100:] - c.numpy()[100:]
    assert abs(np.corrcoef(rest[:, :-1].ravel(), rest[:, 1:].ravel())[0, 1]) < 0.01


def test_equal_weights_give_the_batches_of_plain_training():
    sizes = torch.tensor([7, 31, 3, 12])
    sources = torch.repeat_interleave(torch.arange(4), sizes)
    per_source = FixedSourceWeights(sources, sizes / sizes.sum())
    per_sample = FixedSampleWeights(53, None)
    for x in (per_source, per_sample):
        plain, weighted = BatchStream(53, 8, 5), WeightedStream(x.coefficients(slice(None)), 8, 5)
        assert all(torch.equal(next(plain), next(weighted)) for _ in range(30))


def test_a_stream_goes_on_from_its_state():
    c = torch.tensor(RNG.gamma(1.0, size=40))
    stream = WeightedStream(c, 7, 1)
    for _ in range(9):
        next(stream)
    state, expected = stream.state_dict(), [next(stream) for _ in range(20)]
    again = WeightedStream(c, 7, 1)
    again.load_state_dict(state)
    assert all(torch.equal(next(again), batch) for batch in expected)


def test_weights_are_those_given_with_their_zeros():
    p = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64)
    x = FixedSourceWeights(torch.tensor([0, 0, 1, 2, 2, 2]), p)
    torch.testing.assert_close(x.p, p, rtol=1e-15, atol=0)
    torch.testing.assert_close(x.coefficients(slice(None)), torch.tensor([0, 0, 1.5, 1.5, 1.5, 1.5]).double())
    c = torch.tensor([0.0, 2.0, 0.5, 1.5])
    assert FixedSampleWeights(4, c).coefficients(torch.tensor([0, 2])).tolist() == [0.0, 0.5]


# ----------------------------------------------------------------------------------------------------------------------
# runs


def plain_loop(run: Run) -> tuple[dict[str, torch.Tensor], list[float]]:
    """torch's AdamW on the mean over each batch of the samples' mean losses, row by row with whole logits.

    The state at the end, and the gradients' norms.
    """
    s = run.settings
    torch.manual_seed(s.seed)
    model = AutoModelForCausalLM.from_config(run.copies["w"].model.config).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=s.weight_decay)
    stream, norms = BatchStream(len(run.train), s.global_batch_size, s.seed), []
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.schedule.lr_y(step)
        for number in next(stream).tolist():
            row = run.train.tokens[number]
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = model(ids).logits[0, :-1]
            loss = functional.cross_entropy(logits, labels[1:], ignore_index=IGNORE)
            (loss / s.global_batch_size).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), norms


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of 24 records a source, of which few steps read all."""
    return make_data(tmp_path_factory.mktemp("few"), 24)


def test_uniform_weights_are_plain_fine_tuning(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept, fit = [], train_bilevel.fit
    monkeypatch.setattr(train_bilevel, "fit", lambda run, *others: kept.append(run) or fit(run, *others))
    metrics = train(few, tmp_path / "r", **mixed(few), max_steps=5, weight_decay=0.1, clip_grad_norm=0.5)
    assert metrics["epoch"].iloc[-1] > 1
    (expected, norms), found = plain_loop(kept[0]), load_file(tmp_path / "r" / "model" / "model.safetensors")
    np.testing.assert_allclose(metrics["grad_norm_w"][1:], norms, rtol=1e-5)
    a, b = (torch.cat([state[name].flatten() for name in found]) for state in (found, expected))
    assert (a - b).norm() / b.norm() < 1e-6


def test_a_learned_run_is_retrained_on_its_weights(data: Path, tmp_path: Path):
    train(data, tmp_path / "learned", lr_x=1.0, x_optimizer="adam", max_steps=2)
    given = {"method": "fixed", "x_init": str(tmp_path / "learned"), "weights": "source", "max_steps": 2}
    metrics = train(data, tmp_path / "again", **given)
    learned, again = (pd.read_csv(tmp_path / name / "weights.csv") for name in ("learned", "again"))
    pd.testing.assert_frame_equal(learned[["source", "weight", "samples"]], again, rtol=1e-12)
    shares = ["weight/train_clean", "weight/train_noisy"]
    noise = ["roc_auc", "threshold", "precision", "recall"]
    of_sources = [f"{what}/train_{name}" for name in ("clean", "noisy") for what in ("loss", "tokens")]
    expected = {"step", "epoch", "loss_w", "grad_norm_w", "lr_y", *shares, *of_sources, "test_loss_w", *noise}
    assert set(metrics) == expected
    assert metrics[shares].nunique().tolist() == [1, 1] and metrics["loss_w"].notna().sum() == 2
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"config.yaml", "metrics.csv", "weights.csv", "weights.png", "model", "run.log"} <= files
    said = (tmp_path / "again" / "run.log").read_text()
    assert "one copy" in said and "test loss per token: w" in said and ", u " not in said


def test_what_weighs_nothing_is_never_read(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = tmp_path / "weights.csv"
    places = pd.DataFrame({"file": "train_mixed.json", "index": range(48), "weight": [2.0, 0.0] * 24})
    places.to_csv(weights, index=False)
    seen, draw = [], Run.draw
    monkeypatch.setattr(Run, "draw", lambda run: seen.append(draw(run)) or seen[-1])
    train(few, tmp_path / "r", **mixed(few), x_init=str(weights), max_steps=3)
    drawn = torch.cat([batch.sample_ids for batch, _ in seen])
    assert (drawn % 2 == 0).all() and drawn.bincount(minlength=48)[::2].tolist() == [2] * 24
    found = pd.read_csv(tmp_path / "r" / "weights.csv")
    assert found["weight"].tolist() == places["weight"].tolist()


LISA = {"lisa_layers": 1, "lisa_interval": 2, "dropout": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LISA], ids=["plain", "lisa"])
def test_a_stopped_run_goes_on_bit_for_bit(data: Path, tmp_path: Path, changes: dict):
    weights = tmp_path / "weights.csv"
    pd.DataFrame({"source": ["train_clean", "train_noisy"], "weight": [0.8, 0.2]}).to_csv(weights, index=False)
    given = {"method": "fixed", "x_init": str(weights), "clip_grad_norm": 1.0, "save_every": 2} | changes
    train(data, tmp_path / "whole", **given)
    assert train_until(3, settings(data, tmp_path / "stopped", **given)) == 143
    train(data, tmp_path / "stopped", **given)
    for name in ("metrics.csv", "weights.csv", "model/model.safetensors"):
        whole, stopped = ((tmp_path / run / name).read_bytes() for run in ("whole", "stopped"))
        assert whole == stopped, name


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("stage", "lisa"), [(2, None), (3, 1)])
def test_two_processes_under_zero_train_the_same_model(data: Path, tmp_path: Path, stage: int, lisa: int | None):
    weights = tmp_path / "weights.csv"
    pd.DataFrame({"source": ["train_clean", "train_noisy"], "weight": [0.7, 0.3]}).to_csv(weights, index=False)
    given = {"method": "fixed", "x_init": str(weights), "lisa_layers": lisa, "lisa_interval": 2, "lr_y": 1e-3}
    one = train(data, tmp_path / "one", **given)
    changes = {"backend": "deepspeed", "zero_stage": stage} | given
    command = [sys.executable, "-m", "bilevel.run.torchrun", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "train_bilevel.py", *settings(data, tmp_path / "two", **changes)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"})
    two = pd.read_csv(tmp_path / "two" / "metrics.csv")
    np.testing.assert_allclose(one[["loss_w", "test_loss_w"]], two[["loss_w", "test_loss_w"]], rtol=1e-5)
    a, b = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two"))
    a, b = (torch.cat([state[name].flatten() for name in a]) for state in (a, b))  # b has the tied head twice
    assert (a - b).norm() / a.norm() < 1e-5


def test_validation_records_in_training_count_one_each(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = tmp_path / "weights.csv"
    pd.DataFrame({"source": ["train_clean", "train_noisy"], "weight": [1.0, 0.0]}).to_csv(weights, index=False)
    seen, draw = [], Run.draw
    monkeypatch.setattr(Run, "draw", lambda run: seen.append((run, *draw(run))) or seen[-1][1:])
    given = {"method": "fixed", "x_init": str(weights), "max_steps": 3, "val_in_training": True}
    metrics = train(few, tmp_path / "r", global_batch_size=24, **given)
    times = torch.cat([batch.sample_ids for _, batch, _ in seen]).bincount(minlength=72).tolist()
    assert times == [2] * 24 + [0] * 24 + [1] * 24 and metrics["epoch"].iloc[-1] == 1
    run = seen[0][0]
    assert run.pool.tokens[56] == run.val.tokens[8] and run.pool.tokens[30] == run.train.tokens[30]
    assert pd.read_csv(tmp_path / "r" / "weights.csv")["source"].tolist() == ["train_clean", "train_noisy"]


def test_validation_data_are_not_needed_and_one_source_is_enough(data: Path, tmp_path: Path):
    given = {"train_data": [str(data / "train_clean.json")], "method": "fixed", "val_data": [], "max_steps": 2}
    assert train(data, tmp_path / "r", **given)["loss_w"].notna().sum() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "f2sa", "val_data": []}, "val_data: missing"),
        ({"method": "f2sa", "val_in_training": True}, "val_in_training=true needs method=fixed"),
        ({"val_in_training": True, "val_data": []}, "val_data: missing"),
        ({"save_model": "u"}, "method=fixed trains only w"),
        ({"method": "fixd"}, "method: input should be"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict, message: str):
    given = {"train_data": ["a"], "val_data": ["b"], "model_name_or_path": "m", "method": "fixed"}
    _, found = validate(given | changes)
    assert len(found) == 1 and message in found[0]


def test_a_run_on_other_data_has_no_weights_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = make_data(tmp_path / "data", 32)
    train(data, tmp_path / "run", max_steps=1)
    records = json.loads((data / "train_clean.json").read_text())
    dump(data / "train_clean.json", [records[0] | {"output": "other"}, *records[1:]])
    assert train_bilevel.main(settings(data, tmp_path / "r", method="fixed", x_init=str(tmp_path / "run"))) == 2
    assert "was made on other training files: 'train_clean.json' differ" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_weights_of_the_other_kind_say_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weights = tmp_path / "weights.csv"
    pd.DataFrame({"source": ["train_mixed"], "weight": [1.0], "samples": [192]}).to_csv(weights, index=False)
    assert train_bilevel.main(settings(data, tmp_path / "r", **mixed(data), x_init=str(weights))) == 2
    assert "this file is of a run with weights=source" in capsys.readouterr().err
    dry = [*settings(data, tmp_path / "r", **mixed(data), x_init=str(weights)), "--dry_run"]
    assert train_bilevel.main(dry) == 2 and "so give weights=source here, too" in capsys.readouterr().err


def test_an_unfinished_run_has_no_weights_to_start_from(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run").mkdir()
    assert train_bilevel.main(settings(data, tmp_path / "r", method="fixed", x_init=str(tmp_path / "run"))) == 2
    assert "a folder without weights.csv, which a run leaves when it is finished" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
