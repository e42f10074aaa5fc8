"""The commands that come after a finished run, ready to copy: see it, export, retrain, evaluate."""

import shlex
from pathlib import Path

from bilevel.run.commands import again, export_command, quoted
from bilevel.run.state import Run
from bilevel.settings.fields import Settings
from bilevel.weights.removable import can_go, worth_drawing
from bilevel.weights.shares import record_weights
from bilevel.weights.statistics import bounds

ROOT = Path(__file__).parents[2]  # where the commands are typed


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
        found += [_export(run, folder), ("train a model on these weights", _retrain(s, folder))]
        folder = _retrained(folder)
    if s.test_data and (folder != s.run_folder or s.save_model != "none"):
        found.append(("test loss and right answers of that model", f"python -m bilevel.evaluate {quoted(folder)}"))
    return [line for words, command in found for line in (f"# {words}", command)]


def _export(run: Run, folder: Path) -> tuple[str, str]:
    """The command that writes the cleaned data: as the run decides, or all records if nothing is to be left out."""
    low, high = bounds(run.weights, len(run.train))
    if run.per_sample and low < high:
        return "write the records without those to be left out", export_command(folder, leaves_out=True)
    if run.settings.learned and not run.per_sample:
        weights = record_weights(run.weights.p, run.train.sizes).tolist()
        verdicts = [found.verdict for found in run.weights.evidence.findings(run.weights.x)]
        if any(map(can_go, verdicts, weights)):
            return "write the data without the sources shown to be worse", export_command(folder, leaves_out=True)
        if drawn := worth_drawing(verdicts, weights, run.train.sizes.tolist()):
            words = "write records in proportion to their weights (what is worse keeps a part; a longer run may end it)"
            return words, export_command(folder, leaves_out=False, drawn=drawn)
    words = "write all records with their weights (no source is clearly to be left out)"
    return words, export_command(folder, leaves_out=False)


def _retrain(settings: Settings, folder: Path) -> str:
    model = "" if settings.save_model == "w" else " --save_model w"
    return f"{again(settings, folder, _retrained(folder))} --method fixed --x_init {quoted(folder)}{model}"


def _retrained(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}_retrained")
