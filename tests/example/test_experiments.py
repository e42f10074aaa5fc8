"""example/experiments/: experiments are valid, finished runs are not repeated, RESULTS.md agrees with its tables."""

import importlib
import json
import shutil
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import yaml
from run_helpers import ROOT, TINY

EXAMPLE = ROOT / "example"
EXPERIMENTS = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
TOY = {
    "title": "toy",
    "question": "toy?",
    "settings": {"max_steps": 2, "model_config": TINY, "global_batch_size": 4, "val_batch_size": 4},
    "data": {
        "train": {"train_clean": {"records": 8}, "train_noisy": {"records": 8, "bad": 1}},
        "val": {"records": 8},
        "test": {"records": 4},
    },
    "arms": {"plain": {}, "halves": {"data": {"train": {"train_noisy": {"bad": 0.5}}}, "grid": {"alpha": [1]}}},
    "measures": ["weight/train_noisy"],
    "shows": [{"says": "falls", "arm": "plain", "measure": "weight/train_noisy", "at_most": 1}],
    "figure": {"kind": "curves", "source": "train_noisy"},
    "reading": "It follows that it runs.",
}


@pytest.fixture(scope="module")
def modules():
    """experiment, experiment_data, experiment_results; example/experiments/ is a folder of scripts, not a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXAMPLE / "experiments"), *sys.path])
        import experiment
        import experiment_data
        import experiment_results

        yield experiment, experiment_data, experiment_results


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_valid(modules, path: Path):
    """Its arms are valid settings and recipes, its figure and its claims speak of arms that it has."""
    content, arms = modules[0].read_experiment(path)
    names = {arm.name for arm in arms}
    assert len({arm.label for arm in arms}) == len(arms)
    assert {claim["arm"] for claim in content.get("shows", [])} | set(content["figure"].get("arms", [])) <= names
    for arm in arms:
        assert set(modules[1].bad_shares(arm.data)) >= set(arm.data.get("train", {}))


def test_what_a_run_imports_is_there_before_it(modules):
    """The processes of runs are forked from one that has imported these; a name that is gone would be passed over."""
    for name in modules[0].PRELOAD:
        importlib.import_module(name)


def test_what_is_wrong_is_said_at_once(modules, tmp_path: Path, capsys):
    parts = {"share": {"data": {"train": {"train_clean": {"share": 1}}}}, "whole": {"data": {"corruption": "words"}}}
    wrong = TOY | {"arms": {"a": {"lr_z": 1}} | parts}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(wrong, sort_keys=False))
    assert modules[0].main([str(tmp_path / "toy.yaml"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "a: lr_z: no such setting" in message and "train_clean: no such key 'share'" in message
    assert "whole: data: no such key 'corruption'" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_finished_run_is_not_made_again(modules, tmp_path: Path, monkeypatch):
    """Two arms of two steps; with one folder deleted, that run alone is made again, and comes out as it was."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as outside a clone
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY, sort_keys=False))
    argv = [str(tmp_path / "toy.yaml"), "--seeds", "1", "--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    assert modules[0].main(argv) == 0
    first = pd.read_csv(tmp_path / "results" / "toy.csv")
    assert list(first["arm"]) == ["plain", "halves"] and set(first["step"]) == {2} and set(first["status"]) == {"done"}
    assert (tmp_path / "results" / "toy.png").exists()
    assert set(pd.read_csv(tmp_path / "results" / "toy_curves.csv")["step"]) == {0, 1, 2}

    made = sorted((tmp_path / "out" / "toy" / "runs").glob("*/made.json"))
    times = {path: path.stat().st_mtime_ns for path in made}
    gone, kept = made
    shutil.rmtree(gone.parent)
    assert modules[0].main(argv) == 0
    assert kept.stat().st_mtime_ns == times[kept] and gone.stat().st_mtime_ns > times[gone]
    again = pd.read_csv(tmp_path / "results" / "toy.csv")
    pd.testing.assert_frame_equal(first.drop(columns=["cpu_seconds"]), again.drop(columns=["cpu_seconds"]))

    assert modules[2].page(tmp_path, tmp_path) == (tmp_path / "RESULTS.md").read_text()
    text = (tmp_path / "RESULTS.md").read_text()
    assert f"Met: falls: 1 of 1 runs ({first['weight/train_noisy'][0]:.4f}" in text and TOY["reading"] in text
    assert "commit unknown;" in text


@pytest.mark.slow
def test_an_arm_trains_on_what_another_learned(modules, tmp_path: Path, monkeypatch):
    """The same seed's weights, of a run that is made first although it is written last; an arm without any is named."""
    monkeypatch.chdir(ROOT)
    arms = {"takes": {"weights_of": "learns"}, "learns": {"lr_x": 0.5}}
    toy = {key: value for key, value in TOY.items() if key not in ("shows", "figure")} | {"arms": arms}
    toy["settings"] = TOY["settings"] | {"upper_every": 1}
    toy["figure"] = {"kind": "arms", "y": "test_loss_w"}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy, sort_keys=False))
    argv = [str(tmp_path / "toy.yaml"), "--seeds", "2", "--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    assert modules[0].main(argv) == 0
    found = {}
    for arm, seed in product(arms, (0, 1)):
        (folder,) = (tmp_path / "out" / "toy" / "runs").glob(f"{arm}-{seed}-*")
        found[arm, seed] = pd.read_csv(folder / "run" / "weights.csv")["weight"].tolist()
    assert found["takes", 0] == pytest.approx(found["learns", 0], rel=1e-12)
    assert found["takes", 1] == pytest.approx(found["learns", 1], rel=1e-12) != found["learns", 0]

    toy["arms"]["takes"]["weights_of"] = "takes"
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy, sort_keys=False))
    with pytest.raises(modules[0].ConfigError, match="takes: weights_of: 'takes' is not an arm that learns weights"):
        modules[0].read_experiment(tmp_path / "toy.yaml")


def test_parts_share_no_record_and_are_corrupted_as_told(modules, tmp_path: Path):
    recipe = {
        "train": {"train_a": {"records": 30, "bad": 0.2}, "train_b": {"records": 20, "tasks": ["plural", "rhyme"]}},
        "val": {"records": 20, "bad": 1, "corruption": "dot"},
        "test": {"records": 10},
    }
    folder = modules[1].make(recipe, 0, None, tmp_path)
    parts = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("train_a", "train_b", "val", "test")}
    asked = [(r["instruction"], r["input"]) for records in parts.values() for r in records]
    assert len(asked) == len(set(asked)) == 80
    assert sum(r["output"] == "" for r in parts["train_a"]) == sum(r["is_noisy"] for r in parts["train_a"]) == 6
    assert {r["task"] for r in parts["train_b"]} == {"plural", "rhyme"} and {r["output"] for r in parts["val"]} == {"."}
    mixed = json.loads((folder / "mixed" / "train_mixed.json").read_text())
    assert sorted(map(str, mixed)) == sorted(map(str, parts["train_a"] + parts["train_b"]))
    assert modules[1].make(recipe, 1, None, tmp_path) != folder


def test_a_control_marks_records_and_leaves_them(modules, tmp_path: Path):
    recipe = {"records": 100, "corruption": "none", "corruption_rate": 0.5}
    noisy = json.loads((modules[1].make(recipe, 0, None, tmp_path) / "train_noisy.json").read_text())
    assert len(noisy) == 40 and all(r["is_noisy"] and r["output"] for r in noisy)


def test_results_are_those_of_the_tables(modules):
    assert modules[2].page(EXAMPLE) == (EXAMPLE / "RESULTS.md").read_text(encoding="utf-8")


def test_every_table_has_its_figure_and_its_runs(modules):
    """A row for every arm of the YAML and every seed, as often as it says."""
    for path in EXPERIMENTS:
        table_path = EXAMPLE / "results" / f"{path.stem}.csv"
        if table_path.exists():
            table, (_, arms) = pd.read_csv(table_path), modules[0].read_experiment(path)
            assert table_path.with_suffix(".png").exists()
            assert len(table) == len(arms) * table["seed"].nunique(), path.stem
            assert set(table["arm"]) == {arm.name for arm in arms}
            assert set(modules[2].columns_of_grid(table)) == {key for arm in arms for key in arm.values}
