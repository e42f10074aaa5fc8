#!/usr/bin/env python
"""Write settings.md and metrics.md from the help texts in the code.

    python docs/generate.py

tests/test_docs.py fails while a page differs from what this writes.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bilevel.monitor.metrics import METRICS  # noqa: E402
from bilevel.settings.fields import FIELDS, meaning  # noqa: E402

MADE = "<!-- written by `python docs/generate.py` from the code's help texts: change them there -->"
SETTINGS = """\
# Settings

Every setting of a run, its default and its meaning. A setting has one name everywhere: key of the YAML file
(`--config`), flag of `train_bilevel.py`, environment variable of `run_F2SA.sh`. The command line wins over the file.
`python train_bilevel.py --help` prints the same texts; [choosing-settings.md](choosing-settings.md) says how to choose.
"""
METRICS_HEAD = """\
# Metrics

Every column of a run's `metrics.csv`, in order. Losses are cross-entropies in nats. A step's losses and gradient norms
are those before the step. A run writes only the columns that it can fill, and leaves a cell empty at the steps that
do not compute it. `timing.csv` has the same steps and what depends on the machine: `seconds` of work so far,
`seconds_per_step` since the last row without evaluations, `tokens_per_second` since the last row, `memory_mib` (peak of
this process: GPU memory if there is a GPU, otherwise resident memory), and `gflop` (all passes so far except
evaluations). wandb gets the same names, with `timing/` in front of the columns of timing.csv.
"""


def default(name: str) -> str:
    """The default as YAML writes it; `required` if there is none."""
    field = FIELDS[name]
    if field.is_required():
        return "required"
    return "null" if field.default is None else str(field.default).lower()


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def settings_page() -> str:
    groups: dict[str, list[str]] = {}
    for name, field in FIELDS.items():
        groups.setdefault(field.json_schema_extra["group"], []).append(name)
    lines = [MADE, "", SETTINGS]
    for group, names in groups.items():
        lines += [f"## {group[0].upper()}{group[1:]}", "", "| setting | default | meaning |", "|---|---|---|"]
        lines += [f"| `{name}` | {default(name)} | {cell(meaning(name))} |" for name in names] + [""]
    return "\n".join(lines)


def metrics_page() -> str:
    rows = [f"| `{name}` | {cell(words)} |" for name, words in METRICS.items()]
    return "\n".join([MADE, "", METRICS_HEAD, "| column | meaning |", "|---|---|", *rows, ""])


PAGES = {"settings.md": settings_page, "metrics.md": metrics_page}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (HERE / page).write_text(text(), encoding="utf-8")
        print(f"wrote {HERE / page}")
