"""What report.html says of the run as a whole: its model, data and time, the verdict, and the command that exports."""

import datetime

import numpy as np

from bilevel.files import open_regular
from bilevel.monitor.words import duration, memory
from bilevel.run.commands import again, export_command
from bilevel.run.finished import FinishedRun, read_data
from bilevel.run.machine import read_machine
from bilevel.settings.written import changed
from bilevel.weights import two_groups
from bilevel.weights.removable import HARMFUL, known_harmful, on_records, on_sources

LONGEST = 300  # characters of a value


def about(run: FinishedRun) -> list[tuple[str, str]]:
    """Rows of the page's first table: (name, value)."""
    s, files = run.settings, read_data(run.folder)
    new = s.model_config or {}
    model = s.model_name_or_path or f"new {new.get('model_type')} from model_config"
    parts = {"training": files.train, "validation": files.val, "test": files.test}
    data = [
        f"{name} {sum(file.records for file in part):,} ({', '.join(file.stem for file in part)})"
        for name, part in parts.items()
        if part
    ]
    finished = datetime.datetime.fromtimestamp((run.folder / "weights.csv").stat().st_mtime).astimezone()
    rows = [("model", model), ("method", s.method), ("records", "; ".join(data))]
    rows += [("finished", f"{finished:%Y-%m-%d %H:%M %Z}{_cost(run)}")]
    hidden = {"train_data", "val_data", "test_data", "model_name_or_path", "model_config", "run_name", "output_dir"}
    given = {name: value for name, value in changed(s).items() if name not in hidden | {"method"}}
    rows += [("settings", ", ".join(f"{name}={value}" for name, value in given.items()) or "the defaults")]
    if machine := read_machine(run.folder):
        rows += [("machine", machine.hardware), ("version", machine.version)]
    same = again(s, run.folder, run.folder.with_name(f"{run.name}_again"))
    return [(name, value if len(value) <= LONGEST else value[:LONGEST] + " ...") for name, value in rows] + [
        ("the same again", same)
    ]


def _cost(run: FinishedRun) -> str:
    """Time and peak memory, from the last row of timing.csv; empty without the file."""
    try:
        with open_regular(run.folder / "timing.csv") as file:
            head, *_, last = file.read().decode("utf-8", "replace").splitlines()
        row = dict(zip(head.split(","), last.split(","), strict=True))
        return f", after {duration(float(row['seconds']))}, {memory(int(row['memory_mib']) << 20)} of memory"
    except (OSError, ValueError, KeyError):
        return ""


def verdict(run: FinishedRun) -> str:
    """The sentence that the page begins with."""
    if run.harmful_share is not None:
        share = np.concatenate(run.harmful_share)
        number, seen = int((share > HARMFUL).sum()), int(np.isfinite(share).sum())
        if not seen:
            return "nothing is known about the records: none was compared with trusted ones"
        if not number:
            return f"none of {seen:,} records is shown to be harmful"
        return f"{number:,} of {seen:,} records are called harmful: validation loses by them"
    if run.per_sample:
        c = np.concatenate(run.weights)
        return two_groups.verdict(c[np.isfinite(c)], run.settings.x_map == "softmax")
    if run.evidence is None:
        return "the weights were given, not learned"
    shown = [
        f"{file.stem} is {row['verdict']}"
        for file, row in zip(run.train, run.evidence.to_dict("records"), strict=True)
        if row["called_at"]
    ]
    if not shown:
        return f"none of {len(run.train)} sources is shown to differ from the others"
    rest = len(run.train) - len(shown)
    return ", ".join(shown) + (f"; for {rest} more, no difference is shown" if rest else "")


def suggested_export(run: FinishedRun) -> tuple[str, str]:
    """What can be written of the run, in words, and the command that does it."""
    if run.per_sample:
        c, share = np.concatenate(run.weights), run.harmful_share
        s, c = run.settings, c[np.isfinite(c)]
        harmful, differ, two = None, bool(c.min() < c.max()), False
        if share is not None:
            share = np.concatenate(share)
            harmful = known_harmful(s.x_optimizer, int((share > HARMFUL).sum()), np.isfinite(share).sum(), len(c))
        if not harmful and differ:
            two = two_groups.are_two(c, s.x_map == "softmax")
        return export_command(run.folder, on_records(s.learned and share is not None, harmful, differ, two))
    judged = [] if run.evidence is None else run.evidence["verdict"].tolist()
    means = [float(np.nanmean(c)) if np.isfinite(c).any() else 0.0 for c in run.weights]
    return export_command(run.folder, on_sources(judged, means, [int(np.isfinite(c).sum()) for c in run.weights]))
