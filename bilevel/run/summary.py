"""The closing summary of a finished run."""

import math

import pandas as pd

from bilevel.monitor import findings, record_words
from bilevel.run.state import Row, Run
from bilevel.weights.chunks import chunks
from bilevel.weights.statistics import source_shares

WORSE = 0.01  # nats per token


def summary(run: Run, last_row: Row) -> str:
    """The closing lines of a run: weights and what is known about them, test losses, and which files it wrote.

    last_row: the last row of metrics.csv.
    """
    folder, weights, samples = run.settings.run_folder, run.weights, run.train
    shares = source_shares(weights, samples.sizes)
    table = pd.DataFrame({"source": samples.sources, "samples": samples.sizes, "weight": shares})
    several = len(samples.sources) > 1  # one source has all the weight
    lines = ["", table.to_string(index=False, float_format="{:.4f}".format)] if several else []
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
        lines.append("test loss per token: " + ", ".join(losses) + _worse(last_row, run.settings.save_model))
    names = ("metrics.csv", "weights.csv", "weights.png", "report.html", "model")
    lines.append("in " + str(folder) + ": " + ", ".join(name for name in names if (folder / name).exists()))
    return "\n".join(lines)


def _worse(row: Row, saved: str) -> str:
    """What to do where w has become worse on the test records than u, which has read no validation record."""
    apart = row["test_loss_w"] - row.get("test_loss_u", math.inf)
    if not apart > WORSE:
        return ""
    what = "w, the saved one, is" if saved == "w" else "w is"
    return f" ({what} worse: it may have learned the validation records by heart; try save_model=u, or retrain)"
