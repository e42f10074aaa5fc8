"""The commands that come after a finished run, ready to copy: see it, export, retrain, evaluate, or go on learning."""

import math
import shlex
from pathlib import Path

import numpy as np

from bilevel.run.commands import again, export_command, quoted
from bilevel.run.state import Run
from bilevel.settings.fields import Settings
from bilevel.weights.chunks import chunks
from bilevel.weights.removable import Advice, known_harmful, on_records, on_sources
from bilevel.weights.shares import record_weights
from bilevel.weights.statistics import bounds
from bilevel.weights.two_groups import are_two

ROOT = Path(__file__).parents[2]  # where the commands are typed
LONGER = 10  # times the steps of this run: a longer one is not proposed
UNREAD = 0.1  # share of records that were not compared, from which reading all of them is proposed


def next_commands(run: Run) -> list[str]:
    """Lines of comments and commands for a finished run, as they are typed in the repository's folder."""
    s, here = run.settings, Path.cwd() == ROOT
    folder = s.run_folder if here else s.run_folder.absolute()
    found = [] if here else [("the commands belong into this folder", f"cd {shlex.quote(str(ROOT))}")]
    found.append(
        (
            "see the weights and the records",
            f"python -m webbrowser {(s.run_folder / 'report.html').absolute().as_uri()}",
        )
    )
    if run.settings.learned or run.scores is not None:
        advice = _advice(run)
        if advice.kind == "wait":
            found.append(_longer(run, folder))
        else:
            found += [export_command(folder, advice), ("train a model on these weights", _retrain(s, folder))]
            folder = _beside(folder, "retrained")
    if s.test_data and (folder != s.run_folder or s.save_model != "none"):
        found.append(("test loss and right answers of its model", f"python -m bilevel.evaluate {quoted(folder)}"))
    return [line for words, command in found for line in (f"# {words}", command) if line]


def _advice(run: Run) -> Advice:
    if run.per_sample:
        low, high = bounds(run.weights, len(run.train))
        learned, harmful, two = run.settings.learned, None, False
        if learned and (harm := run.weights.records.harm()).trusted:
            harmful = known_harmful(run.settings.x_optimizer, harm.number, harm.seen, len(run.train))
        if not harmful and low < high:
            two = are_two(_all(run), run.settings.x_map == "softmax")
        return on_records(learned, harmful, low < high, two)
    if not run.settings.learned:
        return on_sources([], [], [])
    weights = record_weights(run.weights.p, run.train.sizes).tolist()
    verdicts = [found.verdict for found in run.weights.evidence.findings(run.weights.x)]
    return on_sources(verdicts, weights, run.train.sizes.tolist())


def _all(run: Run) -> np.ndarray:
    return np.concatenate([run.weights.coefficients(part).numpy() for part in chunks(len(run.train))])


def _longer(run: Run, folder: Path) -> tuple[str, str]:
    """Where nothing is shown: what may show more, and the command of such a run, empty if there is none."""
    flags, words = _for_records(run) if run.per_sample else _for_sources(run)
    if not flags:
        return f"nothing is shown, so there is no reason to leave anything out: {words}", ""
    longer = again(run.settings, folder, _beside(folder, "longer"))
    return f"nothing is shown yet: {words}", f"{longer} {flags}"


def _for_sources(run: Run) -> tuple[str, str]:
    """Flags of a run that is likely to reach a verdict, empty if that is too far off; and what to do, in words."""
    most = min(found.steps_most for found in run.weights.evidence.findings(run.weights.x))
    steps = max(run.step + most, run.settings.x_warmup_steps + 1, run.settings.max_steps or 0)
    if steps > LONGER * run.step:
        return "", f"the sources are about equally good, or it takes over {LONGER} times these steps to tell them apart"
    digits = 10 ** max(0, len(f"{steps:.0f}") - 2)
    return f"--max_steps {math.ceil(steps / digits) * digits}", "a longer run tells whether the sources differ"


def _for_records(run: Run) -> tuple[str, str]:
    """Flags of a run that compares every record, empty if this one did; and what to do, in words."""
    n, harm = len(run.train), run.weights.records.harm()
    if "u" not in run.copies:
        return "", f"method={run.settings.method} compares no record with trusted ones"
    if not run.weights.optimizer.sets_all:
        rule = run.settings.x_optimizer
        return "--x_optimizer auto", f"{rule} compares records of the first steps only, and auto compares all"
    if not harm.trusted:
        return "", "no trusted record was left to compare with; give more than val_batch_size, or make that smaller"
    if harm.seen >= (1 - UNREAD) * n:
        return "", f"with more than {harm.trusted} trusted ones to compare with, smaller differences would show"
    steps = math.ceil(1.1 * n / run.settings.global_batch_size) + run.step - _useful(run)
    steps = max(steps, run.settings.x_warmup_steps + 1, run.settings.max_steps or 0)
    words = f"only {harm.seen:,} of {n:,} records were compared with trusted ones; this run reads all"
    return f"--max_steps {steps}", words


def _useful(run: Run) -> int:
    """Steps whose records were compared: not the first ones, in which u and w are the same."""
    return min(run.step, math.ceil(run.weights.records.harm().seen / run.settings.global_batch_size))


def _retrain(settings: Settings, folder: Path) -> str:
    model = "" if settings.save_model == "w" else " --save_model w"
    other = _beside(folder, "retrained")
    return f"{again(settings, folder, other)} --method fixed --x_init {quoted(folder)}{model}"


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}_{what}")
