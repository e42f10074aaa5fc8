"""What a finished run leaves: weights.csv, weights.png and the closing summary."""

from pathlib import Path

import pandas as pd
import torch

from bilevel.config import UserError
from bilevel.data import Samples
from bilevel.evaluate import source_shares
from bilevel.metrics import QUANTILES
from bilevel.weights import SampleWeights, SourceWeights


def write_weights(path: Path, x: SourceWeights | SampleWeights, samples: Samples) -> None:
    """source,weight,samples per source (weight p_s); file,index,weight[,is_noisy] per sample (weight c_i, mean 1)."""
    if isinstance(x, SourceWeights):
        table = {
            "source": samples.sources,
            "weight": x.p.numpy(),
            "samples": samples.source_ids.bincount().numpy(),
        }
    else:
        table = _places(samples) | {"weight": x.coefficients(samples.all_ids).numpy()}
        if samples.is_noisy is not None:
            table["is_noisy"] = samples.is_noisy
    beside = path.with_name(path.name + ".new")  # whole or absent
    pd.DataFrame(table).to_csv(beside, index=False)
    beside.replace(path)


def read_start(x_init: str, per_sample: bool, samples: Samples) -> torch.Tensor | None:
    """Weights to start from: p (S,) per source, c (N,) or None for all ones per sample.

    x_init is uniform, size, or a weights.csv written by a run on the same files.
    """
    if x_init in ("uniform", "size"):
        sizes = samples.source_ids.bincount().double()
        start = torch.ones_like(sizes) if x_init == "uniform" else sizes
        return None if per_sample else start / start.sum()
    try:
        table = pd.read_csv(x_init, dtype={"source": str, "file": str}, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"x_init {x_init}: {error}") from None
    keys = _places(samples) if per_sample else {"source": samples.sources}
    columns = [*keys, "weight"]
    if not set(columns) <= set(table.columns):
        raise UserError(f"x_init {x_init}: expected columns {', '.join(columns)}, found {', '.join(table.columns)}")
    if any(list(table[key]) != list(values) for key, values in keys.items()):
        raise UserError(f"x_init {x_init} was made from other training files: its {', '.join(keys)} differ")
    weights = torch.tensor(pd.to_numeric(table["weight"], errors="coerce").to_numpy(dtype=float))
    if not weights.isfinite().all() or (weights < 0).any() or weights.sum() <= 0:
        raise UserError(f"x_init {x_init}: weights must be numbers, none negative, not all zero")
    return weights / (weights.mean() if per_sample else weights.sum())


def draw_weights(folder: Path, x: SourceWeights | SampleWeights, samples: Samples) -> None:
    """weights.png: the curves in metrics.csv, and for per-sample runs the final weights' histogram."""
    from matplotlib.figure import Figure

    metrics = pd.read_csv(folder / "metrics.csv").set_index("step")
    per_sample = isinstance(x, SampleWeights)
    figure = Figure(figsize=(11 if per_sample else 6.5, 4), layout="constrained")
    axes = figure.subplots(1, 2) if per_sample else [figure.subplots()]
    if per_sample:
        for q in QUANTILES:
            curve = metrics[f"weight_q/{q}"].dropna()
            axes[0].plot(curve.index, curve, label=f"{q:.0%} of the records below")
        axes[0].set(ylabel="weight c of a record (mean 1)")
        c = x.coefficients(samples.all_ids).numpy()
        noisy = samples.is_noisy
        groups = {"all records": c} if noisy is None else {"clean": c[~noisy], "noisy": c[noisy]}
        axes[1].hist(list(groups.values()), bins=40, label=list(groups), histtype="stepfilled", alpha=0.6)
        axes[1].set(xlabel="final weight c", ylabel="records", title="Final weights of the records")
    else:
        for source in samples.sources:
            axes[0].plot(metrics.index, metrics[f"weight/{source}"], label=source.replace("$", r"\$"))
        axes[0].set(ylabel="weight p of the source", ylim=(-0.02, 1.02))
    axes[0].set(xlabel="step", title="Learned weights")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(folder / "weights.png", dpi=150)


def summary(folder: Path, x: SourceWeights | SampleWeights, samples: Samples, last_row: dict[str, float]) -> str:
    """The closing words of a run: weights, test losses, where things are."""
    shares, sizes = source_shares(x, samples), samples.source_ids.bincount()
    table = pd.DataFrame({"source": samples.sources, "samples": sizes, "weight": shares})
    lines = ["", table.to_string(index=False, float_format="{:.4f}".format)]
    for source, share in zip(samples.sources, shares.tolist(), strict=True):
        if "noisy" in source:
            name = "w_noisy" if sum("noisy" in s for s in samples.sources) == 1 else f"w_noisy ({source})"
            lines.append(f"{name}: {share:.4f}")
    if isinstance(x, SampleWeights) and samples.is_noisy is not None:
        c = x.coefficients(samples.all_ids).numpy()
        lines.append(f"mean weight of noisy records: {c[samples.is_noisy].mean():.4f} (of all records: 1)")
    if "roc_auc" in last_row:
        lines.append("ROC area {roc_auc:.4f}; precision {precision:.3f}, recall {recall:.3f}".format(**last_row))
    if "test_loss_w" in last_row:
        lines.append("test loss per token: w {test_loss_w:.4f}, u {test_loss_u:.4f}".format(**last_row))
    names = ("metrics.csv", "weights.csv", "weights.png", "model")
    lines.append("in " + str(folder) + ": " + ", ".join(name for name in names if (folder / name).exists()))
    return "\n".join(lines)


def _places(samples: Samples) -> dict[str, list]:
    """file and index of every sample: where its record stands."""
    files = [samples.files[source].name for source in samples.source_ids.tolist()]
    return {"file": files, "index": samples.record_index.tolist()}
