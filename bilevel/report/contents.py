"""The data of report.html: facts, curves, sources and histogram of a finished run, and its records."""

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel.data.overlap import read_overlaps
from bilevel.data.records import read_rows
from bilevel.errors import UserError, plain
from bilevel.files import content_hash, open_regular
from bilevel.report.about import about, suggested_export, verdict
from bilevel.report.marks import noisy_records, shared_with_validation
from bilevel.report.records import RESPONSES, choose, equal_weights, order, records, turns_of
from bilevel.report.trained import trained_on
from bilevel.run.finished import FinishedRun, read_data
from bilevel.settings.run_length import steps_per_run
from bilevel.settings.written import dump
from bilevel.weights import two_groups

if TYPE_CHECKING:
    import pandas as pd

POINTS = 400  # per curve
NARROW = 0.1  # range of the weights' quantiles up to which the axis does not begin at 0
FLAT = 1e-12  # range of curves that say nothing
CURVES = 24  # number of sources with a curve
BINS = 60


def page_data(run: FinishedRun, most: int) -> dict[str, Any]:
    """The data of the page, ready for JSON, with about `most` records.

    order: the records in the order in which the page shows them first. turns: their texts in this order.
    """
    rows = [read_rows(source) for source in run.sources]
    files, noisy = read_data(run.folder), noisy_records(run, rows)
    shared = shared_with_validation(run, rows, files.val)
    sources = source_table(run)
    metrics = read_metrics(run, sources)
    chosen, selection = choose(run, most)
    kind, several = "sample" if run.per_sample else "source", "s" if len(rows) > 1 else ""
    turns = turns_of(rows, chosen)
    shown, first = records(run, {"noisy": noisy, "shared": shared}, chosen, turns), order(run, chosen)
    return {
        "id": f"{run.name} {content_hash(run.folder / 'weights.csv')[:16]}",
        "run": run.name,
        "subtitle": f"Weights per {kind}, {len(rows)} source{several}, seed {run.settings.seed}",
        "verdict": verdict(run),
        "about": about(run),
        "export": suggested_export(run),
        "facts": facts(run, metrics),
        "charts": charts(metrics, sources),
        "per_sample": run.per_sample,
        "histogram": histogram(run, noisy, metrics) if run.per_sample and not equal_weights(run) else None,
        "sources": sources,
        "overlaps": [[overlap.amount, *overlap.places] for overlap in read_overlaps(run.folder)],
        "selection": " ".join([selection, *gap_words(run)]),
        "files": [file.file for file in run.train],
        "records": shown,
        "order": first,
        "turns": [turns[k] for k in first],
        "responses": sorted(RESPONSES),
        "trained": trained_on(run),
        "settings": dump(run.settings),
        "files_read": "\n\n".join(
            f"{part}  {file.path}\n{file.records:,} records, sha256 {file.sha256}"
            for part in ("train", "val", "test")
            for file in getattr(files, part)
        ),
    }


def gap_words(run: FinishedRun) -> list[str]:
    """What the mean gaps of the records are, and how many records have none."""
    if run.mean_gap is None:
        return []
    without = int(sum((np.isnan(gap) & ~np.isnan(c)).sum() for gap, c in zip(run.mean_gap, run.weights, strict=True)))
    missing = f"; {without:,} have none: not read, or only while u and w were still the same" if without else ""
    return [
        "Mean gap: how much less validation gains by a record than by the others, in standard deviations; the largest "
        f"are the likeliest to harm{missing}."
    ]


def source_table(run: FinishedRun) -> list[dict[str, Any]]:
    """Per source: records, share of the samples, learned share of the weights, mean weight, and number of its curve.

    The learned share is proportional to samples times mean record weight, also if texts were cut into several samples.
    Of a run with evidence also its verdict, with the step, and the difference to the other sources with its interval.
    """
    before = np.array([file.samples for file in run.train], dtype=float)
    before /= before.sum()
    means = np.array([np.nanmean(c) if np.isfinite(c).any() else 0.0 for c in run.weights])
    shares = before * means / (before * means).sum()
    curved = np.argsort(-np.abs(shares - before), kind="stable")[:CURVES]
    numbers = {k: number for number, k in enumerate(sorted(curved.tolist()))}
    known = [{}] * len(run.train) if run.evidence is None else [_judged(row) for row in run.evidence.to_dict("records")]
    return [
        {
            "name": file.stem,
            "records": file.records,
            "before": before[k],
            "share": shares[k],
            "weight": means[k],
            "curve": numbers.get(k),
            **known[k],
        }
        for k, file in enumerate(run.train)
    ]


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    """The evidence on a source as the page shows it; numbers that are not finite are null."""
    numbers = {name: float(row[name]) if row[name] != "" else math.nan for name in ("difference", "low", "high")}
    found: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return found | {"verdict": row["verdict"], "called_at": int(row["called_at"]) if row["called_at"] != "" else None}


def facts(run: FinishedRun, metrics: "pd.DataFrame") -> list[tuple[str, str, str]]:
    """The key figures of the run: (name, value, note)."""
    c = np.concatenate([weights[np.isfinite(weights)] for weights in run.weights])
    unread, cut = run.without_weight()
    notes = [f"{unread:,} more were not read"] * (unread > 0) + [f"{cut:,} more were dropped as too long"] * (cut > 0)
    found = [("records", f"{len(c):,}", "; ".join(notes))]
    if run.per_sample:
        found.append(
            ("effective number", f"{c.sum() ** 2 / (c**2).sum():,.0f}", "records of equal weight: (Σc)² / Σc²")
        )
    if len(metrics):
        s, last = run.settings, metrics.index[-1]
        samples = sum(file.samples for file in [*run.train, *(run.val if s.val_in_training else [])])
        planned = steps_per_run(samples, s.global_batch_size, s.epochs, s.max_steps)
        early = f"ended early: {planned:,} were planned" if s.copies and last < planned else ""
        found.append(("steps", f"{last:,}", early))
    if len(test := evaluated(metrics, "test_loss_w")):
        found.append(("test loss", f"{test.iloc[-1]:.3f}", f"{test.iloc[0]:.3f} at the start; nats per token"))
    if len(area := evaluated(metrics, "roc_auc")):
        last = metrics.loc[area.index[-1]]
        note = f"precision {last['precision']:.3f}, recall {last['recall']:.3f}" if run.per_sample else "of 1 - weight"
        found.append(("ROC area", f"{last['roc_auc']:.3f}", note))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Curves and histogram


_QUANTILE = re.compile(r"weight_q/0\.[0-9]+")
NOISE = {"roc_auc", "threshold", "precision", "recall"}  # columns of metrics.csv that come together


def read_metrics(run: FinishedRun, sources: list[dict[str, Any]]) -> "pd.DataFrame":
    """The columns of metrics.csv that the page shows, indexed by step; empty without the file. Raises UserError."""
    import pandas as pd

    path = run.folder / "metrics.csv"
    weights = {f"weight/{source['name']}" for source in sources if source["curve"] is not None}
    wanted = {"step", "test_loss_w", "test_loss_u"} | NOISE | weights
    try:
        with open_regular(path) as file:
            table = pd.read_csv(file, usecols=lambda name: name in wanted or _QUANTILE.fullmatch(name))
        steps = table["step"] if "step" in table else pd.Series([0.5])
        if len(steps) and not (pd.api.types.is_integer_dtype(steps) and steps.is_unique):
            raise ValueError("its column step does not hold a number for each row")
        if missing := NOISE - set(table) if NOISE & set(table) else None:
            raise ValueError(f"it has no column {min(missing)}")
        return table.set_index("step").astype(float)
    except FileNotFoundError:
        return pd.DataFrame()
    except (OSError, ValueError, OverflowError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{path} is not what a run writes: {plain(words, 300)}; put it back, or remove it") from None


def evaluated(metrics: "pd.DataFrame", name: str) -> "pd.Series":
    """The non-empty values of a column; empty if the run does not have the column."""
    return metrics[name].dropna() if name in metrics else metrics.index.to_series()[:0]


def charts(metrics: "pd.DataFrame", sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts with title, steps x, and series (values or None).

    bands are pairs of series, filled in between; called has the step of a source's verdict.
    """
    shown = {f"weight/{s['name']}": s["name"] for s in sources if s["curve"] is not None}
    called = {s["name"]: s["called_at"] for s in sources if s.get("called_at") is not None}
    left_out = len(sources) - len(shown)
    note = f"the {len(shown)} of {len(sources)} sources that moved most" if left_out else ""
    levels = [name for name in metrics if name.startswith("weight_q/")][::-1]
    quantiles = {name: _quantile_name(float(name.split("/")[1])) for name in levels}
    bands = [[k, len(levels) - 1 - k] for k in range(len(levels) // 2)]
    spread = metrics[levels].max().max() - metrics[levels].min().min() if levels else 0.0
    zero = 0 if spread > NARROW else None  # weights that have hardly moved fill their panel
    losses = {"test_loss_w": "w", "test_loss_u": "u"}
    found = [
        _chart(metrics, shown if len(sources) > 1 else {}, "Shares of the sources", note, low=0, high=1, called=called),
        _chart(metrics, quantiles, "Weights of the records", "quantiles; the mean is 1", low=zero, bands=bands),
        _chart(metrics, losses, "Test loss", "nats per token; w is trained with validation data, u without"),
        _chart(metrics, {"roc_auc": "area"}, "ROC area", "how well low weights identify noisy records", high=1),
    ]
    return [chart for chart in found if chart]


def _quantile_name(q: float) -> str:
    return "median" if q == 0.5 else f"{q:.0%} below"


def _chart(metrics: "pd.DataFrame", names: dict[str, str], title: str, note: str, **more) -> dict[str, Any] | None:
    """A chart of these columns (column: shown name) at up to POINTS steps; None without data or if none changes."""
    table = metrics[[name for name in names if name in metrics]].dropna(how="all")
    if table.empty or (len(table) > 1 and (table.max() - table.min()).max() <= FLAT):
        return None
    table = table.iloc[np.unique(np.linspace(0, len(table) - 1, POINTS).round().astype(int))]
    series = [
        {"name": names[name], "y": [float(f"{v:.5g}") if np.isfinite(v) else None for v in table[name]]}
        for name in table
    ]
    defaults = {"low": None, "high": None, "bands": None, "called": {}}
    return {"title": title, "note": note, "x": table.index.tolist(), "series": series} | defaults | more


def histogram(run: FinishedRun, noisy: list[np.ndarray] | None, metrics: "pd.DataFrame") -> dict[str, Any]:
    """Histogram of all records' weights, with clean and noisy records counted separately if they are known."""
    c = np.concatenate(run.weights)
    seen = np.isfinite(c)
    groups = {"records": seen}
    if noisy is not None:
        known = np.concatenate(noisy)
        groups = {"clean": seen & ~known, "noisy": seen & known}
    edges = np.histogram_bin_edges(c[seen], BINS)
    counted = [{"name": name, "counts": np.histogram(c[of], edges)[0].tolist()} for name, of in groups.items()]
    shown = [value for value in evaluated(metrics, "threshold").tolist()[-1:] if math.isfinite(value)]
    if not shown and (found := two_groups.split(c[seen], run.settings.x_map == "softmax")):
        shown = [found.threshold]  # nobody knows which records are noisy
    below = int((c[seen] < shown[0]).sum()) if shown else 0
    sides = [below, int(seen.sum()) - below]
    return {"edges": edges.tolist(), "groups": counted, "threshold": shown[0] if shown else None, "sides": sides}
