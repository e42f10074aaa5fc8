"""bilevel/monitor/tracker.py: variables that turn wandb off everywhere turn it off here."""

from pathlib import Path

import pytest
from run_helpers import train

from bilevel.monitor.tracker import wandb_disabled

pytestmark = pytest.mark.usefixtures("no_old_log")


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [("WANDB_MODE", "disabled", True), ("WANDB_MODE", "offline", False), ("WANDB_DISABLED", "true", True),
     ("WANDB_DISABLED", "false", False), ("WANDB_DISABLED", "", False)],
)  # fmt: skip
def test_what_turns_it_off(name: str, value: str, off: bool, monkeypatch: pytest.MonkeyPatch):
    for variable in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    assert wandb_disabled() == (f"{name}={value}" if off else "")


def test_a_run_says_that_it_is_off(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    changes = {"max_steps": 1, "global_batch_size": 4, "val_batch_size": 4, "test_data": [], "save_model": "none"}
    train(data, tmp_path / "r", tracker="wandb", **changes)
    assert "wandb is off: WANDB_MODE=disabled" in (tmp_path / "r" / "run.log").read_text()
    assert not (tmp_path / "r" / "wandb").exists()
