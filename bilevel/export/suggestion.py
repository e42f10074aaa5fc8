"""Which records to keep if the user gives neither a share nor a threshold: what the run itself suggests.

Per source, the verdicts decide (bilevel.weights.evidence). A source is left out if it is worse than the others, and its
records count at most a tenth as much as the mean record. A source that is worse but keeps more weight is needed in
part. Per record, those go that are called harmful (bilevel.weights.record_evidence). Where no record is, two-means on
the weights finds a threshold, and a histogram tells whether there are two groups.
"""

import numpy as np

from bilevel.errors import UserError, first
from bilevel.export.selection import DROP, KEEP, at_least
from bilevel.run.finished import FinishedRun
from bilevel.weights.removable import HARMFUL, LITTLE, can_go, known_harmful
from bilevel.weights.two_groups import split


def suggested(run: FinishedRun, marks: np.ndarray) -> tuple[np.ndarray, str]:
    """Counts (N,) 0 and 1, and a description of the selection. Raises UserError if nothing can be suggested."""
    return _by_group(run, marks) if run.per_sample else _by_verdict(run, marks)


def doubt(run: FinishedRun) -> str:
    """A line that says so if nothing is shown of these weights, so that a choice by them means nothing."""
    if not run.per_sample and run.evidence is not None and not run.evidence["verdict"].isin(["worse", "better"]).any():
        return (
            "\nWARNING: no source is shown to differ from the others: the weights differ by chance or by the sources' "
            "sizes, and so does this choice; a longer run may show a difference"
        )
    if run.per_sample and run.harmful_share is not None and not (np.concatenate(run.harmful_share) > HARMFUL).any():
        c = np.concatenate(run.weights)
        if np.nanmin(c) == np.nanmax(c):
            return "\nWARNING: no record is shown to be harmful, and all weights are equal: this choice is by chance"
        return (
            "\nWARNING: no record is shown to be harmful: look at those with the lowest weights (report.html) before "
            "you leave any out"
        )
    return ""


def _by_verdict(run: FinishedRun, marks: np.ndarray) -> tuple[np.ndarray, str]:
    remedy = (
        "--all writes all records; --keep SHARE and --threshold T choose by the weights, and --sample N draws records "
        "in proportion to them"
    )
    if run.evidence is None:
        raise UserError(
            f"{run.folder}: its weights.csv has no verdicts, because the weights were not learned or an earlier "
            f"version learned them, so no source can be left out for a reason; {remedy}"
        )
    kept, left_out, others = [], [], []
    for number, row in enumerate(run.evidence.to_dict("records")):
        weight = float(np.nanmean(run.weights[number]))
        out = can_go(row["verdict"], weight)
        kept.append(run.was_read(number) & (not out))
        when = f"verdict at step {row['called_at']}, " if row["called_at"] else ""
        words = f"{run.train[number].stem}: {row['verdict']} ({when}weight of a record {weight:.3g})"
        (left_out if out else others).append(words)
    if not left_out:
        known = "; ".join(first(others, 10))
        raise UserError(
            f"{run.folder}: no source is both shown to be worse and nearly without weight (at most {LITTLE:g} of the "
            f"mean record), so none is left out ({known}); {remedy}"
        )
    kept = np.concatenate(kept)
    counts = ((marks == KEEP) | kept & (marks != DROP)).astype(np.int64)
    return counts, f"left out by the verdicts: {'; '.join(left_out)}\nkept: {'; '.join(others)}"


def _by_group(run: FinishedRun, marks: np.ndarray) -> tuple[np.ndarray, str]:
    c = np.concatenate(run.weights)
    compared = _compared(run)
    if compared is not None and (out := compared > HARMFUL).any():
        unknown = (np.isnan(compared) & ~np.isnan(c)).sum()
        counts = ((marks == KEEP) | ~np.isnan(c) & ~out & (marks != DROP)).astype(np.int64)
        words = f"left out: {out.sum():,} records called harmful; about {(1 - compared[out]).sum():,.0f} may be sound"
        return counts, words + (f"; kept: {unknown:,} that were not compared" if unknown else "")
    logarithm = run.settings.x_map == "softmax"
    found = split(c[~np.isnan(c)], logarithm)
    if found is None:
        raise UserError(
            f"{run.folder}: all weights are equal, so there is no reason to leave any record out; --all writes all"
        )
    if compared is not None and not found.convincing:
        raise UserError(
            f"{run.folder}: no record is shown to be harmful, and the weights form no two groups ({found.reason}), so "
            "none is left out; --all writes all records, and --keep SHARE or --threshold T choose by the weights"
        )
    groups = zip(("below", "above"), found.sizes, found.means, strict=True)
    words = f"two-means on {'log c' if logarithm else 'c'} suggests the threshold {found.threshold:.4g}: " + ", ".join(
        f"{size:,} records {where} (mean weight {mean:.4g})" for where, size, mean in groups
    )
    doubt = (
        ""
        if found.convincing
        else "WARNING: the weights do not form two separate groups; look at the records before you use them: "
    )
    unshown = "" if compared is None else "\nWARNING: no record is shown to be harmful; look at the records first"
    return at_least(c, marks, found.threshold), f"{words}\n{doubt}{found.reason}{unshown}"


def _compared(run: FinishedRun) -> np.ndarray | None:
    """The records' probabilities of harm, (N,); None if the run has none, or they are no reason (`known_harmful`)."""
    if run.harmful_share is None:
        return None
    share, c = np.concatenate(run.harmful_share), np.concatenate(run.weights)
    known = known_harmful(run.settings.x_optimizer, 0, int(np.isfinite(share).sum()), int(np.isfinite(c).sum()))
    return None if known is None else share
