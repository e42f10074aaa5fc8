"""Turn the runs of an experiment into its table, its curves and its section of RESULTS.md.

    python example/experiments/experiment_results.py            rewrites RESULTS.md from example/results/*.csv

<name>.csv has a row per run: arm, its grid values, seed, status, and these measurements:

    step                number of steps
    weight/<source>     final share of the source in the weights
    bad_weight          per-sample runs: mean c_i of the corrupted records (the mean of all records is 1)
    lead                weight of the first source divided by the largest other weight
    spearman            rank correlation of the sources' weights with their fraction of clean records
    roc_auc, test_loss_w, test_loss_u       as in metrics.csv, at the last step
    commit, machine, cpu_seconds

<name>_curves.csv has the weight of every source of every run at about 40 steps.
"""

import json
import sys
from pathlib import Path

import pandas as pd
import yaml
from experiment_data import bad_shares

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent
EXPERIMENTS = EXAMPLE.parent / "configs" / "experiments"
CURVE_POINTS = 40
NAMES = {
    "roc_auc": "ROC area",
    "test_loss_w": "test loss",
    "bad_weight": "mean c of bad records",
    "spearman": "Spearman",
}


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def row_of(arm, seed: int, folder: Path) -> dict:
    """The table row of a finished run."""
    made = json.loads((folder / "made.json").read_text())
    metrics = pd.read_csv(folder / "run" / "metrics.csv")
    last = metrics.iloc[-1]
    weights = {key: last[key] for key in metrics if key.startswith("weight/")}
    row = {"arm": arm.name} | arm.values | {"seed": seed, "status": made.pop("status"), "step": int(last["step"])}
    row |= weights
    if len(weights) > 1:
        first, *others = weights.values()
        row["lead"] = first / max(others)
    shares = bad_shares(arm.data)
    if weights and len(set(shares.values())) > 2:
        quality = [-shares[key.removeprefix("weight/")] for key in weights]
        row["spearman"] = pd.Series(weights.values()).corr(pd.Series(quality), method="spearman")
    per_record = folder / "run" / "weights.csv"
    if arm.settings.get("weights") == "sample" and per_record.exists():
        table = pd.read_csv(per_record)
        row["bad_weight"] = table.loc[table["is_noisy"], "weight"].mean()
    for key in ("roc_auc", "test_loss_w", "test_loss_u"):
        if key in metrics and metrics[key].notna().any():
            row[key] = last[key]
    return row | made


def curves_of(arm, seed: int, folder: Path) -> pd.DataFrame:
    """The run's weights at about CURVE_POINTS steps and the last one: arm, grid values, seed, step, source, weight."""
    metrics = pd.read_csv(folder / "run" / "metrics.csv").set_index("step")
    metrics = metrics[[key for key in metrics if key.startswith("weight/")]]
    metrics.columns = metrics.columns.str.removeprefix("weight/")
    every = max(1, (len(metrics) - 1) // CURVE_POINTS)
    thinned = metrics[(metrics.index % every == 0) | (metrics.index == metrics.index[-1])]
    long = thinned.reset_index().melt("step", var_name="source", value_name="weight")
    return pd.DataFrame([{"arm": arm.name} | arm.values | {"seed": seed}]).merge(long, how="cross")


def write_results(results: Path, config: Path, runs: list, folders: list[Path]) -> None:
    """Write the table, curves and figure of the finished runs under results, and RESULTS.md."""
    from plot_experiment import draw

    done = [(arm, seed, folder) for (arm, seed), folder in zip(runs, folders, strict=True) if finished(folder)]
    if len(done) < len(runs):
        print(f"{config.stem}: {len(runs) - len(done)} unfinished runs are left out of the results", file=sys.stderr)
    if not done:
        return
    tables = results / "results"
    tables.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([row_of(*each) for each in done])
    begins = ["arm", *dict.fromkeys(key for arm, *_ in done for key in arm.values), "seed"]
    ends = ["commit", "machine", "cpu_seconds"]
    table = table[begins + [key for key in table if key not in begins + ends] + ends]
    table.to_csv(tables / f"{config.stem}.csv", index=False, float_format="%.6g")
    curves = pd.concat([curves_of(*each) for each in done])
    if len(curves):
        curves.to_csv(tables / f"{config.stem}_curves.csv", index=False, float_format="%.5g")
    experiment = yaml.safe_load(config.read_text(encoding="utf-8"))
    draw(experiment["figure"], tables / f"{config.stem}.csv")
    (results / "RESULTS.md").write_text(page(results, config.parent), encoding="utf-8")


def finished(folder: Path) -> bool:
    return (folder / "made.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# RESULTS.md


def page(results: Path, experiments: Path = EXPERIMENTS) -> str:
    """Text of RESULTS.md: a section for each experiment that has a table, ordered by name."""
    sections = [
        section(yaml.safe_load(config.read_text(encoding="utf-8")), config.stem, results / "results")
        for config in sorted(experiments.glob("*.yaml"))
        if (results / "results" / f"{config.stem}.csv").exists()
    ]
    return (HERE / "results_head.md").read_text(encoding="utf-8") + "".join(sections)


def section(experiment: dict, name: str, tables: Path) -> str:
    """An experiment's section: question, command, figure, measurements, verdicts on its claims, conclusion."""
    table = pd.read_csv(tables / f"{name}.csv", dtype={"commit": str})  # "12e4567" is not a number
    seeds, minutes = table["seed"].nunique(), table["cpu_seconds"].sum() / 60
    source = " --source alpaca_data.json" if experiment.get("source") else ""
    lines = [f"\n## {experiment['title']}\n", experiment["question"].strip() + "\n"]
    first = f" --first_seed {table['seed'].min()}" if table["seed"].min() else ""
    command = f"python example/experiments/experiment.py configs/experiments/{name}.yaml --seeds {seeds}{first}{source}"
    lines += [f"```bash\n{command}\n```\n"]
    lines += [
        f"{len(table)} runs, {minutes:.0f} CPU minutes in all, the longest {table['cpu_seconds'].max():.0f} s; "
        f"commit {', '.join(sorted(table['commit'].unique()))}; {'; '.join(table['machine'].unique())}.\n"
    ]
    if stopped := (table["status"] != "done").sum():
        lines += [f"{stopped} of the runs stopped or crashed before their last step; the table has their last state.\n"]
    lines += [f"![{experiment['title']}](results/{name}.png)\n", summary(experiment, table) + "\n"]
    lines += [f"- {verdict(table, claim)}" for claim in experiment.get("shows", [])]
    lines += ["", experiment["reading"].strip(), ""] if "reading" in experiment else [""]
    return "\n".join(lines)


def columns_of_grid(table: pd.DataFrame) -> list[str]:
    """The grid columns: those between arm and seed."""
    return list(table.columns[1 : table.columns.get_loc("seed")])


def summary(experiment: dict, table: pd.DataFrame) -> str:
    """Markdown table with a row per arm and grid value: median and range over the seeds of every measure."""
    grid = columns_of_grid(table)
    measures = [measure for measure in experiment["measures"] if measure in table]
    heads = ["arm", *grid, *(title(measure) for measure in measures)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for key, rows in table.groupby(["arm", *grid], sort=False, dropna=False):
        cells = ["" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else f"{value}" for value in key]
        cells += [spread(rows[measure].dropna()) for measure in measures]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: pd.Series) -> str:
    """The text `median (smallest to largest)`."""
    if values.empty:
        return ""
    low, middle, high = (f"{value:.4f}" for value in (values.min(), values.median(), values.max()))
    return middle if low == high else f"{middle} ({low} to {high})"


def title(measure: str) -> str:
    return NAMES.get(measure, measure.removeprefix("weight/train_") + " weight" if "/" in measure else measure)


def verdict(table: pd.DataFrame, claim: dict) -> str:
    """How many runs meet a claim of the YAML file, {says, measure, at_least | at_most, arm, where}."""
    rows = table[table["arm"] == claim["arm"]]
    for column, values in claim.get("where", {}).items():
        rows = rows[rows[column].isin(values)]
    measured = rows[claim["measure"]]
    met = measured >= claim["at_least"] if "at_least" in claim else measured <= claim["at_most"]
    ends = f"{measured.min():.4f} to {measured.max():.4f}"
    return f"{'Met' if met.all() else 'NOT met'}: {claim['says']}: {met.sum()} of {len(met)} runs ({ends})."


if __name__ == "__main__":
    (EXAMPLE / "RESULTS.md").write_text(page(EXAMPLE), encoding="utf-8")
