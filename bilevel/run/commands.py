"""Commands on a finished run, as a person types them; the closing lines and the report have the same ones."""

import shlex
from pathlib import Path

from bilevel.settings.fields import Settings
from bilevel.weights.removable import Advice

EXPORTS = {
    "leave out": "write the data without what is shown to be worse",
    "groups": "write the records of the upper group of weights",
    "draw": "write records in proportion to their weights (what is worse keeps a part, which a longer run may take)",
    "keep": "write all records with their weights (nothing is clearly to be left out)",
    "wait": "nothing is shown to be worse; write all records with their weights",
}


def export_command(folder: Path, advice: Advice) -> tuple[str, str]:
    """What to export from a run, in words, and the command that does it."""
    how = {"draw": f" --sample {advice.drawn}", "leave out": "", "groups": ""}.get(advice.kind, " --all")
    return EXPORTS[advice.kind], f"python -m bilevel.export {quoted(folder)}{how}"


def again(settings: Settings, folder: Path, other: Path) -> str:
    """The command that starts a run with the settings of the one in `folder`, into the folder `other`."""
    config = quoted(folder / "config.yaml")
    several = settings.backend == "deepspeed"
    start = f"CONFIG={config} bash run_F2SA.sh" if several else f"python train_bilevel.py --config {config}"
    named = f"--run_name {quoted(other.name)}"
    return f"{start} {named if settings.output_dir is None else f'--output_dir {quoted(other)}'}"


def quoted(path: Path | str) -> str:
    """As one word of a shell."""
    return shlex.quote(str(path))
