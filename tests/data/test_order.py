"""Runs with order=2: what u's validation pass adds, and the end of a run whose u runs away up the validation loss."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from run_helpers import TINY, settings, train, train_until

import train_bilevel
from bilevel.errors import TrainingStopped
from bilevel.monitor.alarms import Watch
from bilevel.settings.fields import Settings
from bilevel.weights.learned import SourceWeights

pytestmark = pytest.mark.usefixtures("no_old_log")


@pytest.mark.slow
def test_u_goes_up_and_w_down_the_validation_loss(data: Path, tmp_path: Path):
    """From equal starts; and only order 2 reads validation with u, and has a column for it."""
    first, second = (train(data, tmp_path / f"{order}", order=order, max_steps=12) for order in (1, 2))
    assert set(second) - set(first) == {"val_loss_u"} and not set(first) - set(second)
    assert second["val_loss_u"][1] == second["val_loss_w"][1]
    assert (second["val_loss_u"] - second["val_loss_w"])[4:].min() > 0
    assert second["test_loss_u"].iloc[-1] > first["test_loss_u"].iloc[-1]


def test_x_is_stepped_by_half_as_much_per_gap():
    given = {"train_data": ["a"], "val_data": ["b"], "model_config": TINY, "alpha": 10}
    assert [Settings(**given, order=order).x_factor for order in (1, 2)] == [10, 5]
    assert [Settings(**given, order=order, method="align").x_factor for order in (1, 2)] == [10, 10]


# ----------------------------------------------------------------------------------------------------------------------
# cross-entropy has no bound above


def watch() -> Watch:
    x = SourceWeights(torch.arange(2), torch.tensor([0.5, 0.5]), 1.0, "adam")
    return Watch(Settings(train_data=["a"], val_data=["b"], model_config=TINY, order=2), x, ["a", "b"], 100)


def test_a_rise_to_twice_the_start_ends_the_run_and_one_odd_batch_does_not():
    watched, again = watch(), watch()
    for loss in (2, 2, 9, 2, 3.9, 3.9, 9, 3.9, 4.1):
        watched.ascent(loss)
    again.load_state_dict(watched.state_dict())
    for each in (watched, again):
        with pytest.raises(TrainingStopped, match="risen from 2 to 4.1: with order=2 u ascends it"):
            each.ascent(4.1)


@pytest.mark.slow
def test_a_run_ends_with_the_reason_and_at_the_same_step_after_a_resume(data: Path, tmp_path: Path, capsys):
    changes = {"order": 2, "alpha": 0.2, "lr_y": 2e-2, "max_steps": 60, "eval_every": 60, "save_every": 4}
    assert train_bilevel.main(settings(data, tmp_path / "whole", **changes)) == 1
    whole = capsys.readouterr().out
    assert train_until(3, settings(data, tmp_path / "parts", **changes)) == 143
    assert train_bilevel.main(settings(data, tmp_path / "parts", **changes)) == 1
    said = capsys.readouterr().out
    assert "going on after step 4" in said
    reasons = [next(line for line in text.splitlines() if "has risen" in line) for text in (whole, said)]
    assert "a larger alpha (0.2)" in reasons[0] and reasons[1] == reasons[0].replace("whole", "parts")
    assert Path(re.search(r"the last checkpoint is (\S+), the same command", reasons[0])[1]).is_dir()
    assert not (tmp_path / "whole" / "weights.csv").exists()
    table = pd.read_csv(tmp_path / "whole" / "metrics.csv")
    assert table["val_loss_u"].iloc[-1] > 1.5 * table["val_loss_u"].iloc[1]
