#!/usr/bin/env python
"""Draw the weight of the noisy source over the iterations, one curve per run.

    python example/plot_demo.py                     F2SA.csv -> GPT2_demo.png, both in the folder of this script
    python example/plot_demo.py wandb_export.csv    -> wandb_export.png beside the CSV
    python example/plot_demo.py outputs/*/metrics.csv --out weights.png
    python example/plot_demo.py F2SA.csv --source train_clean

It reads two kinds of CSV files, which can be mixed:
  - exports from wandb's web page: a step column, then for each run `RUN - KEY`, `RUN - KEY__MIN` and `RUN - KEY__MAX`.
    The last two are bounds and are not drawn. KEY is `weight/SOURCE` or `samp prob.FILE`.
  - metrics.csv of a run: `step`, then `weight/SOURCE`. The run is named after its folder.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

HERE = Path(__file__).resolve().parent
# The run name ends at the last " - " before a key, because run names and folders may contain " - ".
WEIGHT_COLUMN = re.compile(r"(?:(?P<run>.*) - )?(?:weight/|samp prob\.)(?P<file>.+)")
BOUNDS = ("__MIN", "__MAX")
PICTURES = (".png", ".pdf", ".svg")

# Okabe-Ito colours, without yellow, which is hard to see on white. With 5 dash patterns they give 35 different lines;
# in black and white, dashes and markers do the same.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.6, 1.2, 1.6)), (0, (9, 3)))
MARKERS = "osD^vPX"
MARKS_PER_CURVE = 8
LOOK = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 9,
}


class Curve(NamedTuple):
    """The weight of one source in one run. points is indexed by step and has no NaN."""

    run: str
    source: str
    points: pd.Series


def source_name(file: str) -> str:
    """The stem of the file, without its folders: noisy/train_clean.json is the source train_clean."""
    return re.sub(r"\.jsonl?$", "", re.split(r"[/\\]", file)[-1])


def read_cells(path: Path) -> tuple[list[str], pd.DataFrame]:
    """Column names, and cells as text. The header is read as a row, because pandas would rename duplicates in it."""
    try:
        table = pd.read_csv(path, header=None, dtype=str, encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # from pandas (empty file, uneven rows) or the decoder
        raise ValueError(f"{path}: not a CSV ({str(error).strip()})") from None
    if table.shape[1] < 2:
        raise ValueError(f"{path}: not a CSV file with at least two columns")
    return table.iloc[0].fillna("").tolist(), table.iloc[1:]


def numbers(path: Path, name: str, cells: pd.Series) -> pd.Series:
    """The cells of a column as floats; empty cells become NaN. Raises ValueError."""
    try:
        values = cells.astype(float)
    except ValueError as error:
        raise ValueError(f"{path}: column {name!r}: {error}") from None
    if values.abs().max() == float("inf"):
        raise ValueError(f"{path}: column {name!r} has an infinite value")
    return values


def read_curves(path: Path) -> tuple[str, list[Curve]]:
    """The name of the step column, and the weight curves of all sources and runs in a CSV file. Raises ValueError."""
    names, cells = read_cells(path)
    if " - " in names[0] or WEIGHT_COLUMN.fullmatch(names[0]):
        raise ValueError(f"{path}: no step column: the first column is {names[0]!r}")
    try:
        step = numbers(path, names[0], cells[0])
    except ValueError as error:
        raise ValueError(f"{error}: no step column") from None
    curves = []
    for i, name in enumerate(names):
        match = WEIGHT_COLUMN.fullmatch(name)
        if match is None or (match["run"] is not None and name.endswith(BOUNDS)):
            continue
        points = pd.Series(numbers(path, name, cells[i]).to_numpy(), index=step.to_numpy())
        points = points[points.notna() & points.index.notna()].sort_index(kind="stable")
        if len(points):
            run = path.resolve().parent.name if match["run"] is None else match["run"]
            curves.append(Curve(run, source_name(match["file"]), points))
    if not curves:
        keys = {name.rpartition(" - ")[2] for name in names[1:] if not name.endswith(BOUNDS)}
        raise ValueError(
            f"{path}: no curve: there is no column `weight/SOURCE` or `samp prob.FILE` with values; keys found: "
            f"{', '.join(sorted(keys))}; export the panel of a weight, and choose its source with --source NAME"
        )
    return names[0], curves


def choose(path: Path, curves: list[Curve], source: str | None) -> list[Curve]:
    """The curves of a source; if source is None, of all sources with "noisy" in their names. Raises ValueError."""
    wanted = None if source is None else source_name(source)
    chosen = [c for c in curves if ("noisy" in c.source if wanted is None else c.source == wanted)]
    if not chosen:
        missing = 'no source with "noisy" in its name' if wanted is None else f"no source {wanted}"
        found = ", ".join(sorted({c.source for c in curves}))
        raise ValueError(f"{path}: no curve: {missing}; found: {found}; choose one of them with --source NAME")
    return chosen


def labels(curves: list[Curve]) -> list[str]:
    """A label per curve: `run`, or `run: source` if the run has several curves; duplicates get ` (2)`."""
    sources: dict[str, set[str]] = {}
    for curve in curves:
        sources.setdefault(curve.run, set()).add(curve.source)
    result: list[str] = []
    for run, source, _ in curves:
        plain = label = f"{run}: {source}" if len(sources[run]) > 1 else run
        count = 1
        while label in result:
            count += 1
            label = f"{plain} ({count})"
        result.append(label)
    return result


def load(paths: list[Path], source: str | None) -> tuple[str, dict[str, pd.Series]]:
    """The label of the x axis, and the points of each curve by label. Raises ValueError."""
    curves, axes = [], set()
    for path in paths:
        step_name, found = read_curves(path)
        curves += choose(path, found, source)
        axes.add("Iterations" if step_name.lower().endswith("step") else step_name)
    if len(axes) > 1:
        raise ValueError(f"the CSV files have different units ({', '.join(sorted(axes))}): draw them separately")
    return axes.pop(), dict(zip(labels(curves), (c.points for c in curves), strict=True))


def draw(curves: dict[str, pd.Series], x_label: str, source: str | None) -> Figure:
    """Draw a line per curve, with markers at a few points, and the legend below the axes."""
    columns = 1 if max(map(len, curves)) > 28 else 2
    height = 3.6 + 0.2 * -(-len(curves) // columns)
    with rc_context(LOOK):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
        lines = []
        for i, points in enumerate(curves.values()):
            every = max(1, len(points) // MARKS_PER_CURVE)
            first = every * (i % 4) // 4  # curves that coincide show their markers side by side
            lines += axes.plot(
                points.index,
                points.to_numpy(),
                color=COLOURS[i % len(COLOURS)],
                linestyle=DASHES[i % len(DASHES)],
                marker=MARKERS[i % len(MARKERS)],
                markevery=(first, every),
                markersize=4.5,
                linewidth=1.8,
                clip_on=False,  # lines at weight 0, on the axis, are drawn in full
                zorder=3,
            )
        highest = max(points.max() for points in curves.values())
        lowest = min(points.min() for points in curves.values())
        axes.set_ylim(min(0, lowest), 1.08 * highest if highest > 0 else 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=x_label == "Iterations", min_n_ticks=1))
        axes.grid(color="0.88", linewidth=0.8)
        name = "the noisy source" if source is None else f"the source {source_name(source)}"
        axes.set_title(f"Learned weight of {name} during fine-tuning", parse_math=False)
        axes.set_xlabel(x_label, parse_math=False)
        axes.set_ylabel(r"$w_{\mathrm{noisy}}$" if source is None else "Weight", fontsize=11)
        legend = figure.legend(
            lines, list(curves), loc="outside lower center", ncols=columns, frameon=False, handlelength=3.6
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # run names may contain a dollar sign
    return figure


def main() -> None:
    """Read the CSV files, draw and save the figure. Mistakes of the user give one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "csv", nargs="*", type=Path, help="wandb exports or metrics.csv files [F2SA.csv in the folder of this script]"
    )
    parser.add_argument(
        "--out", type=Path, help="figure to write, overwritten if it exists [name of the first CSV file with .png]"
    )
    parser.add_argument("--source", help='source to draw [all sources with "noisy" in their names]')
    args = parser.parse_args()
    paths = args.csv or [HERE / "F2SA.csv"]
    out = args.out or (paths[0].with_suffix(".png") if args.csv else HERE / "GPT2_demo.png")
    try:
        if out.suffix.lower() not in PICTURES:
            raise ValueError(f"--out {out}: the name must end in {', '.join(PICTURES)}")
        x_label, curves = load(paths, args.source)
        draw(curves, x_label, args.source).savefig(out, dpi=200, bbox_inches="tight")
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    print(out)


if __name__ == "__main__":
    main()
