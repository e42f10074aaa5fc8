"""weights.png of a finished run: the curves of metrics.csv, how sure they are, and the final weights of the records."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from bilevel.data.samples import Samples
from bilevel.weights.fixed import Weights
from bilevel.weights.statistics import QUANTILES, histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BESIDE = 10  # sources; the bands of more would hide one another


def draw_weights(folder: Path, weights: Weights, samples: Samples) -> None:
    """Draw weights.png in a run's folder, which has metrics.csv.

    Per source: the weights over the steps and, where evidence is kept, the difference of each source to the others with
    its interval. Per record: quantiles of the weights over the steps and a histogram of the final ones.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    metrics = pd.read_csv(folder / "metrics.csv").set_index("step")
    two = weights.per_sample or weights.evidence is not None
    figure = Figure(figsize=(11 if two else 6.5, 4), layout="constrained")
    axes = list(figure.subplots(1, 1 + two, squeeze=False)[0])
    if weights.per_sample:
        _draw_quantiles(axes[0], metrics)
        _draw_histogram(axes[1], weights, samples)
    else:
        _draw_sources(axes[0], metrics, samples.sources)
        if weights.evidence is not None:
            _draw_verdicts(axes[0], metrics, weights.evidence.called_at.tolist(), samples.sources)
            _draw_differences(axes[1], metrics, samples.sources)
    axes[0].set_title(_plain(f"{folder.resolve().name}: learned weights"))
    for axis in axes[: 1 if weights.per_sample else 2]:
        axis.set_xlabel("model step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis in axes if weights.per_sample else axes[:1]:  # the differences have the colours of the weights
        axis.legend(ncols=1 + (len(axis.get_legend_handles_labels()[1]) > 8))
    figure.savefig(folder / "weights.png", dpi=150)


def _plain(name: str) -> str:
    """A name as it is, where matplotlib would read formulas."""
    return name.replace("$", r"\$")


def _draw_quantiles(axis: "Axes", metrics: pd.DataFrame) -> None:
    curves = {q: metrics[f"weight_q/{q}"].dropna() for q in QUANTILES}
    for low, high in zip(QUANTILES[: len(QUANTILES) // 2], QUANTILES[::-1], strict=False):
        words, inside = f"{high - low:.0%} of the records", (curves[low], curves[high])
        axis.fill_between(curves[low].index, *inside, color="C0", alpha=0.2, linewidth=0, label=words)
    axis.plot(curves[0.5].index, curves[0.5], color="C0", label="median")
    axis.set_ylabel("weight c of a record (mean 1)")


def _draw_histogram(axis: "Axes", weights: Weights, samples: Samples) -> None:
    noisy = samples.is_noisy
    groups = {"all records": None} if noisy is None else {"clean": ~noisy, "noisy": noisy}
    for label, among in groups.items():
        axis.stairs(*histogram(weights, len(samples), 40, among), label=label, fill=True, alpha=0.6)
    axis.set(xlabel="final weight c", ylabel="records", title="Final weights of the records")


def _line(number: int) -> dict[str, str]:
    """Colour and dashes of a source; ten colours, then the same ones dashed."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def _draw_sources(axis: "Axes", metrics: pd.DataFrame, sources: list[str]) -> None:
    curves = [metrics[f"weight/{source}"] for source in sources]
    for number, (source, curve) in enumerate(zip(sources, curves, strict=True)):
        axis.plot(curve.index, curve, label=_plain(source), zorder=3, **_line(number))
    top = min(1.02, max(3 / len(sources), 1.4 * max(curve.max() for curve in curves)))  # many have little each
    axis.set(ylabel="weight p of the source", ylim=(-0.02 * top, top))


def _draw_verdicts(axis: "Axes", metrics: pd.DataFrame, called_at: list[int], sources: list[str]) -> None:
    """Draw a grey band around a source's curve until a difference is shown, and a dot at the verdict."""
    for source, step in zip(sources, called_at, strict=True):
        curve = metrics[f"weight/{source}"]
        before = curve[curve.index <= step] if step else curve
        axis.plot(before.index, before, color="0.85", linewidth=9, solid_capstyle="butt", zorder=1)
        if step and len(before):
            axis.plot(before.index[-1:], before[-1:], "o", color="0.2", markersize=5, zorder=4)
    axis.plot([], [], color="0.85", linewidth=9, label="no difference shown")


def _draw_differences(axis: "Axes", metrics: pd.DataFrame, sources: list[str]) -> None:
    """Draw each source's difference to the others and its 95 % interval, in the colours of the weights.

    The first steps are wider than all that follows, so the axis is fitted to the later half.
    """
    bands, ends = len(sources) <= BESIDE, [0.0]
    for number, source in enumerate(sources):
        rows = metrics[[f"difference/{source}", f"interval/{source}"]].dropna()
        difference, half = rows.iloc[:, 0], rows.iloc[:, 1] * bands
        axis.plot(rows.index, difference, zorder=3, **_line(number))
        if bands:
            axis.fill_between(rows.index, difference - half, difference + half, color=f"C{number}", alpha=0.15, lw=0)
        later = slice(len(rows) // 2, None)
        ends += [*(difference - half)[later], *(difference + half)[later]]
    axis.axhline(0, color="0.2", linewidth=1)
    room = 0.05 * (max(ends) - min(ends)) or 1
    axis.set_ylim(min(ends) - room, max(ends) + room)
    words = "; bands: 95 % at all steps" if bands else ""
    axis.set(ylabel="difference of gaps (above 0: worse)", title=f"Each source beside the others{words}")
