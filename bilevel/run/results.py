"""Results of a finished run beside weights.csv: weights.png and the closing summary."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from bilevel.data.samples import Samples
from bilevel.monitor import findings, record_words
from bilevel.run.state import Row, Run
from bilevel.weights.chunks import chunks
from bilevel.weights.fixed import Weights
from bilevel.weights.statistics import QUANTILES, histogram, source_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_weights(folder: Path, weights: Weights, samples: Samples) -> None:
    """Draw weights.png: the curves of metrics.csv and, for per-sample runs, a histogram of the final weights."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    metrics = pd.read_csv(folder / "metrics.csv").set_index("step")
    figure = Figure(figsize=(11 if weights.per_sample else 6.5, 4), layout="constrained")
    axes = figure.subplots(1, 2) if weights.per_sample else [figure.subplots()]
    if weights.per_sample:
        curves = {q: metrics[f"weight_q/{q}"].dropna() for q in QUANTILES}
        for low, high in zip(QUANTILES[: len(QUANTILES) // 2], QUANTILES[::-1], strict=False):
            words, inside = f"{high - low:.0%} of the records", (curves[low], curves[high])
            axes[0].fill_between(curves[low].index, *inside, color="C0", alpha=0.2, linewidth=0, label=words)
        axes[0].plot(curves[0.5].index, curves[0.5], color="C0", label="median")
        axes[0].set(ylabel="weight c of a record (mean 1)")
        noisy = samples.is_noisy
        groups = {"all records": None} if noisy is None else {"clean": ~noisy, "noisy": noisy}
        for label, among in groups.items():
            axes[1].stairs(*histogram(weights, len(samples), 40, among), label=label, fill=True, alpha=0.6)
        axes[1].set(xlabel="final weight c", ylabel="records", title="Final weights of the records")
    else:
        for source in samples.sources:
            axes[0].plot(metrics.index, metrics[f"weight/{source}"], label=source.replace("$", r"\$"), zorder=3)
        if weights.evidence is not None:
            _draw_evidence(axes[0], metrics, weights.evidence.called_at.tolist(), samples.sources)
        axes[0].set(ylabel="weight p of the source", ylim=(-0.02, 1.02))
    axes[0].set(xlabel="model step", title=f"{folder.resolve().name}: learned weights".replace("$", r"\$"))
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(folder / "weights.png", dpi=150)


def _draw_evidence(axis: "Axes", metrics: pd.DataFrame, called_at: list[int], sources: list[str]) -> None:
    """Draw a grey band around a source's curve until a difference is shown, and a dot at the verdict."""
    for source, step in zip(sources, called_at, strict=True):
        curve = metrics[f"weight/{source}"]
        before = curve[curve.index <= step] if step else curve
        axis.plot(before.index, before, color="0.85", linewidth=9, solid_capstyle="butt", zorder=1)
        if step and len(before):
            axis.plot(before.index[-1:], before[-1:], "o", color="0.2", markersize=5, zorder=4)
    axis.plot([], [], color="0.85", linewidth=9, label="no difference shown")


def summary(run: Run, last_row: Row) -> str:
    """The closing lines of a run: weights and what is known about them, test losses, and which files it wrote.

    last_row: the last row of metrics.csv.
    """
    folder, weights, samples = run.settings.run_folder, run.weights, run.train
    shares = source_shares(weights, samples.sizes)
    table = pd.DataFrame({"source": samples.sources, "samples": samples.sizes, "weight": shares})
    lines = ["", table.to_string(index=False, float_format="{:.4f}".format)]
    if found := findings.lines(weights, samples.sources):
        lines += ["", *found, findings.closing(weights, samples.sources), ""]
    if run.settings.learned and weights.per_sample:
        lines += ["", *record_words.lines(weights, samples), ""]
    for source, share in zip(samples.sources, shares.tolist(), strict=True):
        if "noisy" in source:
            name = "w_noisy" if sum("noisy" in s for s in samples.sources) == 1 else f"w_noisy ({source})"
            lines.append(f"{name}: {share:.4f}")
    if weights.per_sample and samples.is_noisy is not None:
        noisy = samples.is_noisy
        total = sum(float(weights.coefficients(part).numpy()[noisy[part]].sum()) for part in chunks(len(samples)))
        mean = total / noisy.sum()
        lines.append(f"mean weight of noisy records: {mean:.4f} (of all records: 1)")
    if "roc_auc" in last_row:
        lines.append("ROC area {roc_auc:.4f}; precision {precision:.3f}, recall {recall:.3f}".format(**last_row))
    if "test_loss_w" in last_row:
        losses = (f"{name} {last_row[f'test_loss_{name}']:.4f}" for name in "wu" if f"test_loss_{name}" in last_row)
        lines.append("test loss per token: " + ", ".join(losses))
    names = ("metrics.csv", "weights.csv", "weights.png", "report.html", "model")
    lines.append("in " + str(folder) + ": " + ", ".join(name for name in names if (folder / name).exists()))
    return "\n".join(lines)
