"""bilevel/compare/command.py: a small comparison from its start to its table, stopped on the way, and what is
refused."""

import math
import os
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import yaml
from run_helpers import SHIPPED, dump, emptied, finished_run, settings

import train_bilevel
from bilevel.compare import command as compare
from bilevel.compare import runs as compare_runs
from bilevel.compare import table as compared
from bilevel.run.state import Run


@pytest.fixture(autouse=True)
def quiet(no_old_log: None) -> None:
    pass


def command(data: Path, tmp_path: Path, *more: str, **changes) -> list[str]:
    changes = {"train_data": [str(data / "mixed" / "train_mixed.json")], "weights": "sample", "max_steps": 4} | changes
    config = settings(data, tmp_path / "base", **changes)[1]
    values = {key: value for key, value in yaml.safe_load(Path(config).read_text()).items() if key != "output_dir"}
    Path(config).write_text(yaml.safe_dump(values))
    return [config, "--out", str(tmp_path / "out"), "--max_new_tokens", "4", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_stopped(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """SIGTERM in the second method's retraining; the first method's runs stay as they are."""
    line, one_step, steps = command(data, tmp_path, "--methods", "uniform,oracle", "--seeds", "1"), [], []
    one_step = train_bilevel.one_step

    def ended(run: Run) -> int:
        steps.append(run.settings.run_folder)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step(run)

    with mock.patch.object(train_bilevel, "one_step", ended):
        assert compare.main(line) == 143
    out = tmp_path / "out"
    assert steps[-1] == out / "oracle-seed0" / "training" and not (out / "compare.csv").exists()
    before = contents(out / "uniform-seed0") | contents(out / "oracle-seed0" / "scoring")
    assert len(pd.read_csv(out / "results.csv")) == 1
    said = capsys.readouterr().out
    assert "4 runs to come, for 2 of 2 pairs of method and seed" in said
    assert "--- run 1 of 4: uniform, seed 0, finding the weights ---" in said
    assert "--- run 4 of 4: oracle, seed 0, training on the weights (about " in said
    assert "python -m bilevel.export" not in said  # what comes after a single run does not come after these

    steps.clear()
    with mock.patch.object(train_bilevel, "one_step", lambda run: steps.append(run.step) or one_step(run)):
        assert compare.main(line) == 0
    assert len(steps) == 1
    said = capsys.readouterr().out
    assert "1 run to come, for 1 of 2 pairs" in said and "--- run 1 of 1: oracle, seed 0, training" in said
    table = said[said.index("\ntrained models, the only seed:") :].splitlines()
    assert len(table) > 5 and max(map(len, table[:5])) <= 80
    assert contents(out / "uniform-seed0") | contents(out / "oracle-seed0" / "scoring") == before

    rows = pd.read_csv(out / "results.csv")
    assert rows["method"].tolist() == ["uniform", "oracle"] and list(rows)[2:] == list(compared.RESULTS)
    assert rows["roc_auc"].tolist() == rows["clean_share"].tolist() == [0.5, 1.0] and rows.drop(
        columns="method"
    ).notna().all(axis=None)
    scoring = yaml.safe_load((out / "oracle-seed0" / "scoring" / "config.yaml").read_text())
    assert scoring["test_data"] == [] and scoring["save_model"] == "none"  # what finds weights sees no test data
    metrics = pd.read_csv(out / "oracle-seed0" / "training" / "metrics.csv")
    assert rows["test_loss"][1] == pytest.approx(metrics["test_loss_w"].iloc[-1], rel=1e-6)
    table = pd.read_csv(out / "compare.csv", index_col="method")
    difference = rows["test_loss"][1] - rows["test_loss"][0]
    assert table["test_loss_to_uniform"].tolist() == pytest.approx([0, difference])
    assert "| oracle | " in (out / "compare.md").read_text() and (out / "compare.png").exists()

    with mock.patch.object(train_bilevel, "main", side_effect=AssertionError("nothing is left to run")):
        assert compare.main(line) == 0


@pytest.mark.slow
def test_weights_may_be_found_in_fewer_steps(data: Path, tmp_path: Path):
    line = command(data, tmp_path, "--methods", "f2sa,uniform", "--seeds", "1", "--scoring_steps", "2")
    assert compare.main(line) == 0
    f2sa = tmp_path / "out" / "f2sa-seed0"
    steps = {part: pd.read_csv(f2sa / part / "metrics.csv")["step"].iloc[-1] for part in ("scoring", "training")}
    assert steps == {"scoring": 2, "training": 4}
    rows = pd.read_csv(tmp_path / "out" / "results.csv").set_index("method")
    assert rows.loc["uniform", "training_gflop"] == pytest.approx(rows.loc["f2sa", "training_gflop"], rel=0.2)
    assert compare.main([*line[:-1], "3"]) == 2


@pytest.mark.slow
def test_the_best_of_f2sas_records_count_alike(data: Path, tmp_path: Path):
    """The scoring run is that of f2sa, which is made where it is not there yet and then used by both."""
    line = command(data, tmp_path, "--methods", "f2sa_kept,f2sa", "--seeds", "1", "--keep", "0.25", "--lr_x", "0.1")
    folders, one_step = [], train_bilevel.one_step

    def seen(run: Run) -> int:
        folders.append(run.settings.run_folder.relative_to(tmp_path / "out").as_posix())
        return one_step(run)

    with mock.patch.object(train_bilevel, "one_step", seen):
        assert compare.main(line) == 0
    assert folders == [
        *["f2sa-seed0/scoring"] * 4,
        *["f2sa_kept-seed0/training"] * 4,
        *["f2sa-seed0/training"] * 4,
    ]
    table = pd.read_csv(tmp_path / "out" / "f2sa-seed0" / "scoring" / "weights.csv")
    learned, clean = table["weight"], ~table["is_noisy"]
    fixed = pd.read_csv(tmp_path / "out" / "f2sa_kept-seed0" / "training" / "weights.csv")["weight"]
    n = len(learned)
    assert sorted(fixed) == pytest.approx([0.0] * (n - round(n / 4)) + [n / round(n / 4)] * round(n / 4), rel=1e-6)
    assert learned[fixed > 0].min() >= learned[fixed == 0].max()
    shares = pd.read_csv(tmp_path / "out" / "results.csv").set_index("method")["clean_share"]
    assert shares["f2sa"] == pytest.approx(learned[clean].sum() / learned.sum())
    assert shares["f2sa_kept"] == pytest.approx(clean[fixed > 0].mean())


@pytest.mark.slow
def test_the_copies_of_one_run_are_judged_as_they_are(data: Path, tmp_path: Path):
    """The run's own evaluation is the reference. Weights are those of f2sa, and there is one run of each."""
    line = command(data, tmp_path, "--methods", "f2sa_w,f2sa_u,f2sa", "--seeds", "1", "--lr_y", "1e-2")
    folders, one_step = [], train_bilevel.one_step

    def seen(run: Run) -> int:
        folders.append(run.settings.run_folder.parent.name)
        return one_step(run)

    with mock.patch.object(train_bilevel, "one_step", seen):
        assert compare.main(line) == 0
    assert folders == ["f2sa_w-seed0"] * 4 + ["f2sa_u-seed0"] * 4 + ["f2sa-seed0"] * 8
    found = pd.read_csv(tmp_path / "out" / "results.csv").set_index("method")
    own = pd.read_csv(tmp_path / "out" / "f2sa_w-seed0" / "training" / "metrics.csv").iloc[-1]
    assert found.loc["f2sa_w", "test_loss"] == pytest.approx(own["test_loss_w"], rel=1e-5)
    assert found.loc["f2sa_u", "test_loss"] == pytest.approx(own["test_loss_u"], rel=1e-5)
    assert own["test_loss_u"] != pytest.approx(own["test_loss_w"], rel=1e-4)
    assert all(found[name].nunique() == 1 for name in ("clean_share", "roc_auc", "scoring_gflop"))
    assert found["training_gflop"].gt(0).tolist() == [False, False, True]


@pytest.mark.parametrize("scored", [True, False])
def test_ranks_and_weights_are_set_against_what_is_known(tmp_path: Path, scored: bool):
    """The area is the share of pairs of a noisy and a clean record that are ranked rightly, ties half."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"file": "001.json", "index": range(40), "weight": np.repeat([0.0, 2.0], 20)})
    table["is_noisy"], score = rng.random(40) < 0.4, rng.integers(-3, 3, 40).astype(float)
    score[0] = -np.inf  # as of a perplexity that overflows
    row = compare.Row(tmp_path, "rho", 0)
    records = dump(tmp_path / "001.json", emptied(SHIPPED[:40]))
    finished_run(row.scoring, [records], table.assign(**{"score": score} if scored else {}))
    (row.scoring / "metrics.csv").write_text("step,roc_auc\n0,0.123\n")
    ranks = score if scored else table["weight"].to_numpy()
    pairs = [(a > b) + (a == b) / 2 for a in ranks[~table["is_noisy"]] for b in ranks[table["is_noisy"]]]
    found = compare.against_is_noisy(row)
    assert found["roc_auc"] == pytest.approx(np.mean(pairs))
    assert found["clean_share"] == pytest.approx((~table["is_noisy"][20:]).mean())
    table.drop(columns="is_noisy").to_csv(row.scoring / "weights.csv", index=False)
    found = compare.against_is_noisy(row)
    assert found["roc_auc"] == 0.123 and math.isnan(found["clean_share"])


def test_the_table_has_standard_errors_of_means_and_of_paired_differences():
    rows = pd.DataFrame(
        [
            {"method": method, "seed": seed, **dict.fromkeys(compared.RESULTS, 0.0), "test_loss": seed + better}
            for method, better in (("uniform", 0.0), ("rho", -0.5))
            for seed in range(3)
        ]
    )
    rows.loc[5, "test_loss"] += 0.3
    rows.loc[rows["method"] == "uniform", "exact_match"] = 0.25
    rows = pd.concat([rows, rows[rows["method"] == "rho"].assign(method="f2sa", test_loss=[0.0, 1.0, 2.0])])
    table = compared.summed_up(rows, ["rho", "uniform"])
    assert list(table.index) == ["rho", "uniform"]
    assert table["test_loss"].tolist() == pytest.approx([0.6, 1.0])
    assert table["test_loss_se"]["uniform"] == pytest.approx(1 / 3**0.5)
    assert table["test_loss_to_uniform"]["rho"] == pytest.approx(-0.4)
    assert table["test_loss_to_uniform_se"]["rho"] == pytest.approx(0.1)
    assert table["test_loss_to_f2sa"].tolist() == pytest.approx([-0.4, 0.0])
    assert table["exact_match_to_f2sa"].tolist() == pytest.approx([0.0, 0.25])
    assert "| rho | 0.6 ± " in compared.markdown(table, 3) and "-0.4 ± 0.1" in compared.markdown(table, 3)


def test_runs_are_counted_once_and_named_when_they_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """f2sa_kept uses the scoring run of f2sa; a run with weights.csv is finished."""
    rows = [compare.Row(tmp_path, method, seed) for seed in (0, 1) for method in ("f2sa", "f2sa_kept")]
    finished = rows[2].scoring
    finished.mkdir(parents=True)
    (finished / "weights.csv").write_text("")
    runs, begun = compare_runs.Runs(rows), []
    assert runs.folders == [rows[0].scoring, rows[0].training, rows[1].training, rows[2].training, rows[3].training]
    with mock.patch.object(compare_runs, "run", lambda line: begun.append(line) or 0):
        assert compare_runs.run_both(rows[0], runs, ["scoring"], ["training"]) == 0
        assert compare_runs.run_both(rows[2], runs, ["scoring"], ["training"]) == 0
    assert begun == [["scoring"], ["training"], ["training"]]
    said = capsys.readouterr().out.split("\n---")[1:]
    words = [" run 1 of 5: f2sa, seed 0, finding", " run 2 of 5: f2sa, seed 0, training", " run 4 of 5: f2sa, seed 1"]
    assert all(line.startswith(start) for line, start in zip(said, words, strict=True))
    assert "left" not in said[0] and "(about " in said[1]


@pytest.mark.parametrize("large", [1.0, 1.2345e100])
def test_the_screen_shows_what_matters_in_80_columns(large: float):
    rows = pd.DataFrame(
        [
            {"method": method, "seed": seed} | dict.fromkeys(compared.RESULTS, -large / (3 + seed + len(method)))
            for method in ("uniform", "influence")
            for seed in range(3)
        ]
    )
    rows["roc_auc"] = math.nan
    table = compared.summed_up(rows, ["uniform", "influence"])
    head, names, *lines = compared.for_screen(table, 3).splitlines()
    assert head == "trained models, means ± standard errors of 3 seeds:" and len(lines) == 2
    assert max(map(len, [names, *lines])) <= 80
    assert names.split("  ")[0] == "method" and "test loss" in names and "minus uniform's" in names
    assert ("clean share" in names) == (large == 1.0) and "ROC" not in names
    assert ("-0.0772 ± 0.0034" if large == 1.0 else "-9.534e+98 ± 4.2e+97") in lines[1]


def test_operations_that_are_not_known_are_left_out(tmp_path: Path):
    """Scoring takes none where there is nothing to score by, whatever the model."""
    known = dict.fromkeys(compared.RESULTS, 1.0) | {"training_gflop": math.nan, "seed": 0}
    rows = pd.DataFrame([known | {"method": m, "scoring_gflop": g} for m, g in (("uniform", 0.0), ("f2sa", math.nan))])
    table = compared.summed_up(rows, ["uniform", "f2sa"])
    text = compared.markdown(table, 1)
    assert "training_gflop" not in text and "| f2sa | 1 | 0 | 0 | 1 | 0 | 0 | 1 | 1 | - | 1 | 1 |" in text
    compared.draw(rows, table, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


def test_seconds_of_a_resumed_run_are_those_of_its_parts():
    assert compare.elapsed(pd.Series([0.5, 2.0, 5.0, 1.0, 4.0])) == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("more", "changes", "words"),
    [
        (["--methods", "uniform,best,fixed"], {}, "unknown: best, fixed; known: f2sa, uniform"),
        (["--seeds", "0"], {}, "--seeds 0: must be at least 1"),
        (["--max_new_tokens", "0"], {}, "--max_new_tokens 0: must be at least 1"),
        (["--scoring_steps", "0"], {}, "--scoring_steps 0: must be at least 1"),
        (["--method", "rho"], {}, "--method: remove it; compare sets it"),
        (["--lr_z", "1"], {}, "--lr_z: no such setting"),
        (["--methods", "oracle"], {"train_data": "test.json", "global_batch_size": 8}, "--methods oracle: no training"),
        (["--val_data", "none.json"], {}, "val_data: no file matches"),
        (
            ["--methods", "f2sa_kept"],
            {"weights": "source", "train_data": "train_*.json"},
            "--methods f2sa_kept selects single records",
        ),
        (["--methods", "influence"], {"lisa_layers": 1}, "remove lisa_layers"),
        ([], {"test_data": []}, "a comparison needs val_data"),
    ],
)
def test_what_cannot_be_is_refused(
    more: list[str], changes: dict, words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if "train_data" in changes:
        changes = changes | {"train_data": [str(data / changes["train_data"])]}
    assert compare.main(command(data, tmp_path, *more, **changes)) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_missing_config_and_another_folder_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert compare.main(["nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    line = command(data, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    assert compare.main(line) == 2
    assert "holds no comparison" in capsys.readouterr().err
    (tmp_path / "out" / "compare.yaml").write_text("lr_y: 5.0\n")
    assert compare.main(line) == 2
    assert "holds a comparison with other settings" in capsys.readouterr().err
