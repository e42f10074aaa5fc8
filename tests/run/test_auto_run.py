"""A run per source with x_optimizer=auto, its default: what it says and leaves, and that it resumes bit for bit."""

import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from run_helpers import settings, train, train_until

from bilevel.run.finished import read_finished

pytestmark = pytest.mark.usefixtures("no_old_log")

CHANGES = {"max_steps": 8, "eval_every": 4, "save_every": 3, "save_model": "none", "x_warmup_steps": 2}


@pytest.mark.slow
def test_a_run_with_the_default(data: Path, tmp_path: Path):
    whole = train(data, tmp_path / "whole", **CHANGES)
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["x_optimizer"] == "auto"
    assert whole["lr_x"].isna().all() and whole["lr_y"][1:].notna().all()
    assert whole["weight/train_noisy"].iloc[:3].nunique() == 1  # x_warmup_steps
    assert whole["difference/train_noisy"].iloc[-1] > 0 and (whole["evidence/train_noisy"].iloc[2:] != 0).any()
    table = pd.read_csv(tmp_path / "whole" / "weights.csv")
    assert {"difference", "p_worse", "verdict", "called_at"} <= set(table)
    assert read_finished(tmp_path / "whole").weights[0][0] == pytest.approx(table["weight"][0] * 2)

    said = (tmp_path / "whole" / "run.log").read_text()
    assert "x_optimizer auto at every step (lr_x, x_lr_schedule and upper_every are not used)" in said
    (known,) = re.findall(r"step 4/8: batch loss .*\n  .* per step, about .* left, memory .*\n  (.*): ", said)
    assert known == "train_clean"
    assert "of 2 sources" in said and "lr_x=" not in said

    stopped = settings(data, tmp_path / "stopped", **CHANGES)
    assert train_until(4, stopped) == 143
    train(data, tmp_path / "stopped", **CHANGES)
    for file in ("metrics.csv", "weights.csv"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
