"""bilevel/monitor/tracker.py: variables that turn wandb off everywhere turn it off here."""

from pathlib import Path

import pytest
from run_helpers import train, wandb_records

from bilevel.monitor.tracker import wandb_disabled

SHORT = {"max_steps": 1, "global_batch_size": 4, "val_batch_size": 4, "test_data": [], "save_model": "none"}
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
    train(data, tmp_path / "r", tracker="wandb", **SHORT)
    assert "wandb is off: WANDB_MODE=disabled" in (tmp_path / "r" / "run.log").read_text()
    assert not (tmp_path / "r" / "wandb").exists()


def test_a_report_that_nobody_gets_is_told(data: Path, tmp_path: Path):
    train(data, tmp_path / "r", tracker="none", track_report=True, **SHORT)
    assert "wandb is off: tracker=none; track_report has no effect" in (tmp_path / "r" / "run.log").read_text()


def test_a_report_that_cannot_be_sent_is_told_and_the_rest_is_sent(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import wandb

    add = wandb.Artifact.add_file

    def add_file(artifact: wandb.Artifact, path: str, *rest: object, **more: object) -> object:
        if path.endswith("report.html"):
            raise ValueError("no such file")
        return add(artifact, path, *rest, **more)

    monkeypatch.setattr(wandb.Artifact, "add_file", add_file)
    train(data, tmp_path / "r", tracker="wandb", track_report=True, **SHORT)
    told = (tmp_path / "r" / "run.log").read_text()
    page = tmp_path / "r" / "report.html"
    assert f"the report has not been sent to wandb (no such file); it is in {page}" in told
    (file,) = tmp_path.glob("r/wandb/offline-run-*/*.wandb")
    assert "exit" in [record.WhichOneof("record_type") for record in wandb_records(file.read_bytes())]
