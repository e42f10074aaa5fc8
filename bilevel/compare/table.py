"""Results of a comparison: columns, means over seeds, Markdown table and figure."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported in the functions that use it, so that mistakes are answered at once
    import pandas as pd

# Columns of results.csv after method and seed, with their meaning.
RESULTS = {
    "test_loss": "test loss per token of the trained model",
    "exact_match": "fraction of correct test answers",
    "roc_auc": "ROC area of the scores or weights, if noise is known",
    "clean_share": "share of the total weight on clean records",
    "scoring_gflop": "GFLOP until the weights are known",
    "training_gflop": "GFLOP of the retraining",
    "scoring_seconds": "seconds until the weights are known",
    "training_seconds": "seconds of the retraining",
}
JUDGED = ("test_loss", "exact_match")  # also reported as differences, seed by seed, to each method in BESIDE
BESIDE = ("uniform", "f2sa")

WIDTH = 80  # of a terminal
SCREEN = {  # column of the summary -> its head on the screen, the most important first
    "test_loss": "test loss",
    "test_loss_to_uniform": "minus uniform's",
    "exact_match": "right answers",
    "clean_share": "clean share",
    "roc_auc": "ROC area",
}


def summed_up(rows: "pd.DataFrame", methods: list[str]) -> "pd.DataFrame":
    """A row per method: mean and standard error over seeds of each result and of its differences, paired by seed."""
    import pandas as pd

    rows, columns = rows.reindex(columns=["method", "seed", *RESULTS]), {}
    for name in RESULTS:
        by_method = rows.pivot(index="seed", columns="method", values=name)
        columns[name], columns[f"{name}_se"] = by_method.mean(), by_method.sem()
        for other in BESIDE if name in JUDGED else ():
            if other in by_method:
                difference = by_method.sub(by_method[other], axis=0)
                columns[f"{name}_to_{other}"], columns[f"{name}_to_{other}_se"] = difference.mean(), difference.sem()
    return pd.DataFrame(columns).loc[methods]


def markdown(table: "pd.DataFrame", seeds: int) -> str:
    """The table as Markdown, with mean ± standard error in each cell."""
    names = [name for name in table if not name.endswith("_se") and table[name].notna().any()]
    lines = [f"Means ± standard errors; seeds: {seeds}; to_uniform, to_f2sa: differences, paired by seed.", ""]
    lines += ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method, row in table.iterrows():
        cells = [_with_error(row[name], row[f"{name}_se"]) for name in names]  # no error if there is only one seed
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def for_screen(table: "pd.DataFrame", seeds: int) -> str:
    """What matters of the table as text of at most WIDTH columns; the last of SCREEN are left out if it takes more."""
    heads, columns = ["method"], [list(table.index)]
    for name, head in SCREEN.items():
        if name in table and table[name].notna().any():
            heads.append(head)
            columns.append([*map(_rounded, table[name], table[f"{name}_se"])])
    widths = [max(map(len, [head, *column])) for head, column in zip(heads, columns, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths.pop()
    lines = [heads, *zip(*columns, strict=True)]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    means = "the only seed" if seeds == 1 else f"means ± standard errors of {seeds} seeds"
    return "\n".join([f"trained models, {means}:", *rows])


def _with_error(value: float, error: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4g}" if math.isnan(error) else f"{value:.4g} ± {error:.2g}"


def _rounded(value: float, error: float) -> str:
    """A value to the decimals that its error leaves: two figures of the error."""
    if not 1e-4 <= error < 10:
        return _with_error(value, error)
    decimals = 1 - math.floor(math.log10(error))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def in_words(row: dict[str, float]) -> str:
    """What matters of one method with one seed."""
    names = [name for name in SCREEN if name in row and not math.isnan(row[name])]
    return ", ".join(f"{SCREEN[name]} {row[name]:.4g}" for name in names)


def draw(rows: "pd.DataFrame", table: "pd.DataFrame", path: Path) -> None:
    """Draw the main results: per method a bar with its standard error, per seed a point."""
    from matplotlib.figure import Figure

    names = [name for name in (*JUDGED, "clean_share", "scoring_gflop") if table[name].notna().any()]
    figure = Figure(figsize=(3.4 * len(names), 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.bar(table.index, table[name], yerr=table[f"{name}_se"].fillna(0), color="tab:blue", alpha=0.6, capsize=3)
        points = rows[rows["method"].isin(table.index)]
        axis.plot(points["method"], points[name], "o", color="black", markersize=3)
        axis.set_ylim(bottom=0)
        if name == "test_loss":  # the axis need not start at 0, because differences matter
            low, high = points[name].min(), points[name].max()
            axis.set_ylim(low - 0.3 * (high - low) - 0.01, high + 0.1 * (high - low) + 0.01)
        axis.set(ylabel=RESULTS[name].split(",")[0].removesuffix(" of the trained model"))
        axis.tick_params(axis="x", rotation=60)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
