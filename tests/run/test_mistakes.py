"""Mistakes that once ended in a traceback, or were guessed at: exit code 2 and one message, or the right result."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from run_helpers import finished_run, settings, train_until

import train_bilevel
from bilevel.data.sources import find_sources
from bilevel.errors import DataError, UserError
from bilevel.export import selection
from bilevel.export.selection import draw
from bilevel.processes import ALONE
from bilevel.report import command as report
from bilevel.run import checkpoint_file
from bilevel.run.checkpoint import Checkpoints
from bilevel.settings.command_line import read_yaml
from bilevel.settings.deepspeed import read_config
from bilevel.settings.run_length import MOST_STEPS, steps_per_run

pytestmark = pytest.mark.usefixtures("no_old_log")


# ----------------------------------------------------------------------------------------------------------------------
# settings


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lr_x: 1\nlr_y: 2\nlr_x: 3", "lr_x is given twice"),
        ("model_config: {n_layer: 1, n_layer: 2}", "n_layer is given twice"),
        ("seed: 010", "010 is the number 8 in YAML"),
        ("seed: -07", "-07 is the number -7 in YAML"),
        ("run_name: 12:30", "12:30 is the number 750 in YAML"),
        ("epochs: 1:30.5", "1:30.5 is the number 90.5 in YAML"),
    ],
)
def test_yaml_that_means_something_else(tmp_path: Path, text: str, problem: str):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=problem):
        read_yaml(str(tmp_path / "c.yaml"))


def test_yaml_that_means_what_it_says(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("a: '010'\nb: '12:30'\nc: 0x10\nd: 0\ne: 0.5\nf: -1\ng: {a: 1}\n'1': 2\n1: 3\n")
    assert read_yaml(str(tmp_path / "c.yaml"))["a"] == "010"


@pytest.mark.parametrize("changes", [{"epochs": 1e308, "max_steps": None}, {"max_steps": 10**15}])
def test_steps_without_end(data: Path, tmp_path: Path, capsys, changes: dict):
    assert train_bilevel.main(settings(data, tmp_path / "r", **changes)) == 2
    assert f"steps are more than {MOST_STEPS:,}" in capsys.readouterr().err and not (tmp_path / "r").exists()
    assert steps_per_run(100, 10, 1.05, None) == 11 and steps_per_run(1, 10, 0.1, None) == 1


@pytest.mark.parametrize("text", ["[]", "7", '{"zero_optimization": {"stage": "two"}}', "[" * 100_000,
                                  '{"zero_optimization": {"stage": 2, "offload_optimizer": [1]}}'])  # fmt: skip
def test_a_deepspeed_file_of_another_kind(tmp_path: Path, text: str):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match="ds.json"):
        read_config(tmp_path / "ds.json")


@pytest.mark.parametrize("name", ["=1+1", "+a", "-a", "@a"])
def test_a_name_that_a_spreadsheet_runs(tmp_path: Path, name: str):
    (tmp_path / f"{name}.json").write_text("[]")
    with pytest.raises(DataError, match=f"begins with \\{name[0]} as a formula: rename it"):
        find_sources([f"{tmp_path}/*.json"])
    (tmp_path / f"{name}.json").rename(tmp_path / f"a{name}.json")
    assert find_sources([f"{tmp_path}/*.json"])


# ----------------------------------------------------------------------------------------------------------------------
# export


def test_more_draws_than_anyone_can_want(monkeypatch):
    c, none = np.array([1.0, 0.0, 2.0]), np.zeros(3, dtype=np.int8)
    with pytest.raises(UserError, match="at most 1,000 draws for each of the run's 3 records"):
        draw(c, none, 10**12, True, 0)
    whole = draw(c, none, 1000, True, 0)
    monkeypatch.setattr(selection, "CHUNK", 7)  # the same draws, however many at a time
    assert np.array_equal(draw(c, none, 1000, True, 0), whole) and whole.sum() == 1000


# ----------------------------------------------------------------------------------------------------------------------
# the files of a run


SMALL = {"max_steps": 4, "global_batch_size": 8, "val_batch_size": 8}


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its step 3 of 4."""
    out = tmp_path_factory.mktemp("stopped") / "r"
    assert train_until(2, settings(data, out, **SMALL)) == 143
    return out


@pytest.fixture
def again(data: Path, tmp_path: Path, stopped: Path) -> tuple[Path, list[str]]:
    """A copy of it, and the command that goes on with it."""
    arguments = settings(data, tmp_path / "r", **SMALL)
    shutil.copytree(stopped, tmp_path / "r")
    return tmp_path / "r", arguments


SAVED: dict[str, Callable[[str], bytes]] = {
    "semicolons": lambda text: text.replace(",", ";").encode(),
    "a mark of byte order": lambda text: ("\ufeff" + text).encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "quotes": lambda text: "\n".join(f'"{line}"' for line in text.splitlines()).encode(),
    "steps as floats": lambda text: text.replace("\n1,", "\n1.0,").replace("\n2,", "\n2.0,").encode(),
    "a row more": lambda text: text.replace("\n1,", "\nsum,\n1,").encode(),
}


@pytest.mark.parametrize("how", SAVED)
def test_metrics_that_a_spreadsheet_has_saved(again: tuple[Path, list[str]], capsys, how: str):
    """The run goes on from its checkpoint; what was saved is kept."""
    out, arguments = again
    text = (out / "metrics.csv").read_bytes().decode()
    (out / "metrics.csv").write_bytes(SAVED[how](text))
    (out / "metrics.csv.1").write_text("mine")
    assert train_bilevel.main(arguments) == 0
    said = capsys.readouterr().out
    assert "metrics.csv is not as the run has written it" in said and "it is now metrics.csv.2" in said
    assert (out / "metrics.csv.2").read_bytes() == SAVED[how](text) and (out / "metrics.csv.1").read_text() == "mine"
    assert pd.read_csv(out / "metrics.csv")["step"].tolist() == [3, 4]


def test_metrics_that_an_older_version_began(again: tuple[Path, list[str]]):
    """Its rows are kept, and the columns that it did not know are empty there."""
    out, arguments = again
    before = pd.read_csv(out / "metrics.csv")
    new = [name for name in before if name.startswith("interval/")]
    assert new
    before.drop(columns=new).to_csv(out / "metrics.csv", index=False)
    assert train_bilevel.main(arguments) == 0
    after = pd.read_csv(out / "metrics.csv")
    assert list(after) == list(before) and after["step"].tolist() == [0, 1, 2, 3, 4]
    pd.testing.assert_frame_equal(after.drop(columns=new)[:3], before.drop(columns=new)[:3])
    assert after[new][:3].isna().all(axis=None) and after[new][3:].notna().all(axis=None)


def seal(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest of a checkpoint and seal it again, its files' checksums as well."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"] = {name: checkpoint_file.fingerprint(folder / name) for name in manifest["files"]}
    change(manifest)
    manifest["sha256"] = checkpoint_file._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_of_another_version(again: tuple[Path, list[str]], capsys):
    out, arguments = again
    for change in (lambda manifest: manifest.pop("version"), lambda manifest: manifest.update(version=99)):
        seal(out / "checkpoints" / "step_000003", change)
        assert train_bilevel.main(arguments) == 2
        assert "step_000003 was written by another version of this tool" in capsys.readouterr().err


STATES: dict[str, Callable[[dict], object]] = {
    "step 99": lambda state: state.update(step=99),
    "no x": lambda state: state.pop("x"),
    "x of one source": lambda state: None,  # in the tensors
    "no copy": lambda state: state["copies"].pop("u"),
    "a list": lambda state: [],
    "watch is a number": lambda state: state.update(watch=7),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_sealed_by_hand(again: tuple[Path, list[str]], capsys, kind: str):
    out, arguments = again
    folder = out / "checkpoints" / "step_000003"
    state = json.loads((folder / "rank0.json").read_text())
    changed = STATES[kind](state)
    (folder / "rank0.json").write_text(json.dumps(changed if kind == "a list" else state))
    if kind.startswith("x") or kind in ("no copy", "no x"):
        tensors = checkpoint_file.safetensors.torch.load_file(folder / "rank0.safetensors")
        gone = {"no copy": "copies > u", "no x": "x > "}.get(kind, "nothing")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
        if kind == "x of one source":
            tensors["x > x"] = torch.zeros(1, dtype=torch.float64)
        checkpoint_file.safetensors.torch.save_file(tensors, folder / "rank0.safetensors")
    step = 99 if kind == "step 99" else 3
    seal(folder, lambda manifest: manifest.update(step=step))
    folder = folder.rename(folder.with_name(f"step_{step:06d}"))
    assert train_bilevel.main(arguments) == 2
    assert f"{folder} holds a state that this run cannot go on from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"files": {}}, {"files": {"../../x": {}}}, {"step": "3"}, {"step": -1}, {"processes": 0}, {"settings": []},
     {"data": None}, {"files": ["rank0.json"]}],
    ids=str,
)  # fmt: skip
def test_a_manifest_sealed_by_hand_is_damaged(tmp_path: Path, caplog, change: dict):
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=2)
    saved.begin(3, {"step": 3, "x": torch.zeros(2)})
    assert saved.finish()
    seal(tmp_path / "step_000003", lambda manifest: manifest.update(change))
    assert saved.read("auto") is None and "is damaged and passed over" in caplog.text


def test_what_a_user_puts_beside_a_checkpoint_stays(tmp_path: Path):
    """Checkpoints go as new ones come; files and folders that no run has written stay."""
    saved = Checkpoints(tmp_path, ALONE, {}, {}, keep=1)
    mine = [
        tmp_path / name for name in ("step_000001.partial/notes.txt", "step_mine.partial/a", "step_best/rank0.json")
    ]
    for path in mine:
        path.parent.mkdir()
        path.write_text("mine")
    for step in (2, 3):
        saved.begin(step, {"step": step, "x": torch.zeros(2)})
        assert saved.finish()
        mine.append(tmp_path / f"step_{step:06d}" / "notes.txt")
        mine[-1].write_text("mine")
    saved.begin(4, {"step": 4, "x": torch.zeros(2)})
    assert saved.finish() and saved.read("auto")["step"] == 4
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)
    assert sorted(path.name for path in (tmp_path / "step_000003").iterdir()) == ["notes.txt"]


@pytest.mark.parametrize("kind", ["/dev/zero", "a FIFO", "a FIFO for data.json"])
def test_a_finished_run_from_somebody_else(data: Path, tmp_path: Path, capsys, kind: str):
    """Its data.json names what never ends; only regular files are read."""
    files = [data / "train_clean.json", data / "train_noisy.json"]
    table = pd.DataFrame({"source": ["train_clean", "train_noisy"], "weight": [0.9, 0.1], "samples": [96, 96]})
    run = finished_run(tmp_path / "run", files, table)
    os.mkfifo(tmp_path / "fifo")
    told = json.loads((run / "data.json").read_text())
    told["train"][0]["path"] = "/dev/zero" if kind == "/dev/zero" else str(tmp_path / "fifo")
    (run / "data.json").write_text(json.dumps(told))
    if kind == "a FIFO for data.json":
        (run / "data.json").unlink()
        os.mkfifo(run / "data.json")
    assert report.main([str(run)]) == 2
    assert "not a regular file" in capsys.readouterr().err
