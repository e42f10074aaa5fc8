"""tests/gpu/check.py: on a CPU all parts that need no GPU pass; on a GPU all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from gpu import check, runs, size, zero
from gpu.rows import Rows

SCRIPT = Path(check.__file__)


def checked(tmp_path: Path, *flags: str) -> dict[str, dict]:
    out = tmp_path / "check"
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(out), *flags], capture_output=True, text=True)
    found = json.loads((out / "check.json").read_text())["parts"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"## {name}: {part['state']}" in (out / "check.md").read_text() for name, part in found.items())
    return found


@pytest.mark.slow
def test_what_needs_no_gpu_passes_on_a_cpu(tmp_path: Path):
    found = checked(tmp_path, "--device", "cpu", "--minutes", "60")
    states = {name: part["state"] for name, part in found.items()}
    assert states == dict.fromkeys(check.PARTS, "passed") | {"waits": "left out", "size": "left out"}
    rows = [row for part in found.values() for row in part.get("rows", [])]
    assert sum(row["ok"] is True for row in rows) >= 25


@pytest.mark.slow
def test_every_cell_of_the_large_model_runs(monkeypatch: pytest.MonkeyPatch):
    """On a CPU, with a small shape: what only a card can say is missing, and nothing is left out for a mistake."""
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5}
    monkeypatch.setattr(size, "SHAPE", size.SHAPE | small | {"num_attention_heads": 2})
    for name, number in {"BATCH": 2, "WARM": 1, "MEASURED": 1}.items():
        monkeypatch.setattr(size, name, number)
    found = Rows(lambda rows: None)
    size.check("cpu", found)
    said = {row["what"]: row["found"] for row in found.rows}
    for name in size.CELLS:
        assert f"{name}: seconds per step" in said and "TFLOP/s" in said[f"{name}: useful"], said


@pytest.mark.slow
@pytest.mark.gpu
def test_a_card(tmp_path: Path):
    found = checked(tmp_path, "--device", "cuda", "--minutes", "30")
    assert all(part["state"] == "passed" for part in found.values())


def test_what_only_a_card_runs_has_settings_that_exist(monkeypatch: pytest.MonkeyPatch):
    """A variable that is no setting would change nothing, and say nothing."""
    started = []

    def popen(command: list[str], env: dict[str, str], **_) -> None:
        started.append(env)

    def losses(device: str, out: Path, **changes: object) -> pd.Series:
        runs.run(device, out, **changes)
        return pd.Series([1.0])

    monkeypatch.setattr(runs.subprocess, "Popen", popen)
    monkeypatch.setattr(zero, "losses", losses)
    monkeypatch.setattr(zero, "resumed", runs.run)
    zero.check("cuda", Rows(lambda rows: None))
    assert {"device", "host"} <= {env.get("lisa_residual") for env in started} and len(started) == 11
    with pytest.raises(ValueError, match="no settings: {'residual_bits'}"):
        runs.run("cuda", Path("out"), residual_bits="host")


def test_a_part_that_fails_or_crashes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The state follows from the rows and the exit code; rows written before a crash are kept."""
    ended = [(0, True, "passed"), (0, False, "failed"), (-11, True, "crashed")]
    for code, ok, state in ended:

        def child(command: list[str], code: int = code, ok: bool = ok, **_) -> subprocess.CompletedProcess:
            result = Path(command[command.index("--result") + 1])
            Rows(lambda rows: result.write_text(json.dumps(rows))).holds("a sum", ok)
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(subprocess, "run", child)
        part = check.run_part("exactness", "cpu", tmp_path, left=9)
        assert part["state"] == state and len(part["rows"]) == 1
    assert check.run_part("exactness", "cpu", tmp_path, left=0)["state"] == "left out"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    assert check.missing("size", "cpu") == "it needs a GPU" and check.missing("runs", "cpu") is None
    find = check.importlib.util.find_spec
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    assert check.missing("zero", "cpu") == "deepspeed not installed"
