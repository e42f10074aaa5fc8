#!/usr/bin/env python
"""Draw an experiment's figure from its table, with seeds as bands or dots and labels at the ends of lines.

    python example/experiments/plot_experiment.py configs/experiments/a_two_time_scales.yaml

`figure` in the YAML file chooses the kind. Every kind accepts title, x_label and y_label:

    {kind: curves, source: train_noisy, arms: [...]}        weight of the source over steps, a line per arm
    {kind: lines, x: corruption_rate, y: roc_auc, by: corruption}    a measure over the values of a grid
    {kind: panels, y: weight/train_noisy}                    the same, a panel per arm that has a grid of one setting
    {kind: sources, arms: [...]}                             final weight of each source, a dot per seed
    {kind: arms, y: roc_auc, x_limits: [0, 1]}               a measure of each arm, a dot per seed
"""

import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLE))

import pandas as pd  # noqa: E402
import yaml  # noqa: E402
from experiment_results import columns_of_grid, title  # noqa: E402
from matplotlib import rc_context  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from plot_demo import COLOURS, LOOK, MARKERS  # noqa: E402


def draw(spec: dict, table: Path) -> None:
    """Draw the figure and save it beside the table, under the same name."""
    kinds = {"curves": curves, "lines": lines, "panels": panels, "sources": sources, "arms": arms}
    with rc_context(LOOK):
        figure = kinds[spec["kind"]](spec, table)
        figure.suptitle(spec.get("title", ""), fontsize=11)
        figure.savefig(table.with_suffix(".png"), dpi=150)


def band(axes: Axes, rows: pd.DataFrame, x: str, y: str, number: int, label: str) -> None:
    """Draw the median over the seeds as a line, the range as a band, and the label at the end of the line."""
    found = rows.groupby(x)[y].agg(["min", "median", "max"]).dropna()
    if found.empty:
        return
    colour = COLOURS[number % len(COLOURS)]
    marker = MARKERS[number % len(MARKERS)] if len(found) < 12 else None
    axes.fill_between(found.index, found["min"], found["max"], color=colour, alpha=0.18, linewidth=0)
    axes.plot(found.index, found["median"], color=colour, marker=marker, markersize=4.5, linewidth=1.8)
    end = (found.index[-1], found["median"].iloc[-1])
    axes.annotate(label, end, xytext=(6, 0), textcoords="offset points", va="center", color=colour, fontsize=9)


def spread_labels(axes: Axes) -> None:
    """Move overlapping labels apart, keeping their order. Call it when the axes have their final limits."""
    texts = [text for text in axes.texts if text.get_text()]
    height = 11.5
    place = {text: axes.transData.transform(text.xy)[1] * 72 / axes.figure.dpi for text in texts}
    below = -1e9
    wanted = {}
    for text in sorted(texts, key=place.get):
        wanted[text] = below = max(place[text], below + height)
    shift = sum(wanted[t] - place[t] for t in texts) / max(1, len(texts))
    for text in texts:
        text.set_position((6, wanted[text] - place[text] - shift))


def finish(axes: Axes, spec: dict, x_label: str, y_label: str) -> None:
    axes.set_xlabel(spec.get("x_label", x_label))
    axes.set_ylabel(spec.get("y_label", y_label))
    if spec.get("log_x"):
        axes.set_xscale("log")
    if spec.get("log_y"):
        axes.set_yscale("log")
    if "limits" in spec:
        axes.set_ylim(*spec["limits"])
    if "line" in spec:
        axes.axhline(spec["line"], color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.grid(color="0.9", linewidth=0.8)


def new_figure(
    columns: int = 1, rows: int = 1, width: float = 6.6, height: float = 3.8, share_x: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=share_x).flat)


def chosen(table: pd.DataFrame, spec: dict) -> pd.DataFrame:
    return table[table["arm"].isin(spec["arms"])] if "arms" in spec else table


def curves(spec: dict, path: Path) -> Figure:
    table = pd.read_csv(path.with_name(f"{path.stem}_curves.csv"))
    grid = columns_of_grid(table)
    table = chosen(table[table["source"] == spec["source"]], spec)
    figure, (axes,) = new_figure()
    for i, (key, rows) in enumerate(table.groupby(["arm", *grid], sort=False, dropna=False)):
        band(axes, rows, "step", "weight", i, " ".join(str(part) for part in key if not pd.isna(part)))
    name = spec["source"].removeprefix("train_")
    finish(axes, spec, "step", f"weight of the {name} source")
    figure.get_layout_engine().execute(figure)
    spread_labels(axes)
    return figure


def lines(spec: dict, path: Path) -> Figure:
    table = chosen(pd.read_csv(path), spec)
    figure, (axes,) = new_figure()
    for i, (key, rows) in enumerate(table.dropna(subset=[spec["x"]]).groupby(spec.get("by", "arm"), sort=False)):
        band(axes, rows, spec["x"], spec["y"], i, str(key))
    finish(axes, spec, spec["x"], title(spec["y"]))
    figure.get_layout_engine().execute(figure)
    spread_labels(axes)
    return figure


def panels(spec: dict, path: Path) -> Figure:
    table = chosen(pd.read_csv(path), spec)
    keys = [key for key in columns_of_grid(table) if table[key].notna().any()]
    wide = 4
    figure, axes = new_figure(wide, -(-len(keys) // wide), 9.6, 2.5 * -(-len(keys) // wide))
    for axis, key in zip(axes, keys, strict=False):
        rows = table[table[key].notna()]
        numbers = pd.api.types.is_numeric_dtype(rows[key])
        log = numbers and rows[key].max() > 8 * rows[key].min() > 0
        rows = rows if numbers else rows.assign(**{key: rows[key].astype(str)})
        band(axis, rows, key, spec["y"], 0, "")
        finish(axis, spec | {"log_x": log}, key, title(spec["y"]))
        axis.label_outer(remove_inner_ticks=False) if axis is not axes[0] else None
        axis.set_xlabel(key)
        values = sorted(rows[key].unique())
        axis.set_xticks(values, [f"{value:g}" if numbers else value for value in values])
        axis.minorticks_off()
        axis.tick_params(labelbottom=True)
    for axis in axes[len(keys) :]:
        axis.remove()
    return figure


def sources(spec: dict, path: Path) -> Figure:
    table = pd.read_csv(path)
    arms = spec.get("arms", list(table["arm"].unique()))
    keys = [key for key in table if key.startswith("weight/")]
    figure, axes = new_figure(len(arms), width=max(6.6, 3.4 * len(arms)), height=1.6 + 0.24 * len(keys), share_x=True)
    for axis, arm in zip(axes, arms, strict=True):
        rows = table[table["arm"] == arm]
        for i, key in enumerate(reversed(keys)):
            axis.plot(rows[key], [i] * len(rows), "o", color=COLOURS[0], alpha=0.6, markersize=6)
        names = [key.removeprefix("weight/train_").lstrip("0") or "0" for key in reversed(keys)]
        axis.set_yticks(range(len(keys)), names)
        axis.set_title(arm)
        finish(axis, spec, "final weight of the source", "")
        axis.label_outer()
        axis.axvline(1 / len(keys), color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    return figure


def arms(spec: dict, path: Path) -> Figure:
    table = chosen(pd.read_csv(path), spec)
    names = list(table["arm"].unique())
    figure, (axes,) = new_figure(height=1.4 + 0.4 * len(names))
    for i, name in enumerate(reversed(names)):
        values = table.loc[table["arm"] == name, spec["y"]]
        axes.plot(values, [i] * len(values), "o", color=COLOURS[0], alpha=0.6, markersize=7)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_ylim(-0.6, len(names) - 0.4)
    if "x_limits" in spec:
        axes.set_xlim(*spec["x_limits"])
    finish(axes, spec, title(spec["y"]), "")
    return figure


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        config = Path(argument)
        picture = yaml.safe_load(config.read_text(encoding="utf-8"))["figure"]
        draw(picture, EXAMPLE / "results" / f"{config.stem}.csv")
