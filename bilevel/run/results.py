"""What a finished run leaves: weights.csv, weights.png and the closing summary."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bilevel.data.samples import Samples
from bilevel.errors import UserError
from bilevel.files import whole_file
from bilevel.weights.learned import CHUNK, SampleWeights, SourceWeights, parts
from bilevel.weights.statistics import QUANTILES, histogram, source_shares


def write_weights(
    path: Path, x: SourceWeights | SampleWeights, samples: Samples, scores: torch.Tensor | None = None
) -> None:
    """source,weight,samples per source (weight p_s); file,index,weight[,is_noisy] per sample (weight c_i, mean 1).

    A last column `score` where a baseline has given the samples scores (N,); per source it is their mean.
    """
    with whole_file(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        if isinstance(x, SourceWeights):
            table = {"source": samples.sources, "weight": x.p.numpy(), "samples": samples.sizes.numpy()}
            if scores is not None:
                sums = torch.bincount(samples.source_ids.long(), scores, minlength=len(samples.sources))
                table["score"] = (sums / samples.sizes).numpy()
            pd.DataFrame(table).to_csv(file, index=False)
        else:
            for part in parts(len(samples)):
                table = _places(samples, part).assign(weight=x.coefficients(part).numpy())
                if samples.is_noisy is not None:
                    table["is_noisy"] = samples.is_noisy[part]
                if scores is not None:
                    table["score"] = scores[part].numpy()
                table.to_csv(file, index=False, header=part.start == 0)


def read_start(x_init: str | Path, per_sample: bool, samples: Samples) -> torch.Tensor | None:
    """Weights to start from: p (S,) per source, c (N,) or None for all ones per sample.

    x_init is uniform, size, or a weights.csv written by a run on the same files.
    """
    if x_init in ("uniform", "size"):
        sizes = samples.sizes.double()
        start = torch.ones_like(sizes) if x_init == "uniform" else sizes
        return None if per_sample else start / start.sum()
    try:
        weights = _read_weights(x_init, per_sample, samples)
    except (OSError, ValueError) as error:
        raise UserError(f"x_init {x_init}: {error}") from None
    if not weights.isfinite().all() or (weights < 0).any() or weights.sum() <= 0:
        raise UserError(f"x_init {x_init}: weights must be numbers, none negative, not all zero")
    return weights.div_(weights.mean() if per_sample else weights.sum())


def _read_weights(path: str | Path, per_sample: bool, samples: Samples) -> torch.Tensor:
    """The column weight of a weights.csv (float64, NaN where there is no number) of these sources, or samples."""
    keys, n = (["file", "index"], len(samples)) if per_sample else (["source"], len(samples.sources))
    columns, rows, weights = [*keys, "weight"], 0, torch.empty(n, dtype=torch.float64)
    other = UserError(f"x_init {path} was made from other training files: its {', '.join(keys)} differ")
    dtype = {"source": str, "file": str}
    with pd.read_csv(path, dtype=dtype, keep_default_na=False, chunksize=CHUNK) as tables:
        for table in tables:
            if not set(columns) <= set(table.columns):
                found = ", ".join(table.columns)
                kind = "sample" if "index" in table.columns else "source" if "source" in table.columns else None
                remedy = f"; these are of a run with weights={kind}" if kind else ""
                raise UserError(f"x_init {path}: expected columns {', '.join(columns)}, found {found}{remedy}")
            part, rows = slice(rows, rows + len(table)), rows + len(table)
            if rows > n:
                raise other
            expected = _places(samples, part) if per_sample else {"source": samples.sources[part]}
            if not all(np.array_equal(table[key], expected[key]) for key in keys):
                raise other
            weights[part] = torch.tensor(pd.to_numeric(table["weight"], errors="coerce").to_numpy(dtype=float))
    if rows < n:
        raise other
    return weights


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
        noisy = samples.is_noisy
        groups = {"all records": None} if noisy is None else {"clean": ~noisy, "noisy": noisy}
        for label, among in groups.items():
            axes[1].stairs(*histogram(x, len(samples), 40, among), label=label, fill=True, alpha=0.6)
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
    shares = source_shares(x, samples.sizes)
    table = pd.DataFrame({"source": samples.sources, "samples": samples.sizes, "weight": shares})
    lines = ["", table.to_string(index=False, float_format="{:.4f}".format)]
    for source, share in zip(samples.sources, shares.tolist(), strict=True):
        if "noisy" in source:
            name = "w_noisy" if sum("noisy" in s for s in samples.sources) == 1 else f"w_noisy ({source})"
            lines.append(f"{name}: {share:.4f}")
    if isinstance(x, SampleWeights) and samples.is_noisy is not None:
        total = sum(float(x.coefficients(part).numpy()[samples.is_noisy[part]].sum()) for part in parts(len(samples)))
        mean = total / samples.is_noisy.sum()
        lines.append(f"mean weight of noisy records: {mean:.4f} (of all records: 1)")
    if "roc_auc" in last_row:
        lines.append("ROC area {roc_auc:.4f}; precision {precision:.3f}, recall {recall:.3f}".format(**last_row))
    if "test_loss_w" in last_row:
        losses = (f"{name} {last_row[f'test_loss_{name}']:.4f}" for name in "wu" if f"test_loss_{name}" in last_row)
        lines.append("test loss per token: " + ", ".join(losses))
    names = ("metrics.csv", "weights.csv", "weights.png", "report.html", "model")
    lines.append("in " + str(folder) + ": " + ", ".join(name for name in names if (folder / name).exists()))
    return "\n".join(lines)


def _places(samples: Samples, part: slice) -> pd.DataFrame:
    """file and index of this part of the samples: where their records stand."""
    names = np.array([file.name for file in samples.files], dtype=object)
    sources = samples.sources_of(torch.arange(part.start, part.stop))
    return pd.DataFrame({"file": names[sources], "index": samples.records(part)})
