"""Commands on a finished run, as a person types them; the closing lines and the report have the same ones."""

import shlex
from pathlib import Path

from bilevel.settings.fields import Settings


def export_command(folder: Path, leaves_out: bool, drawn: int | None = None) -> str:
    """The command that writes a run's cleaned data, or all its records with their weights.

    drawn: that writes so many, drawn in proportion to their weights.
    """
    how = f" --sample {drawn}" if drawn else "" if leaves_out else " --all"
    return f"python -m bilevel.export {quoted(folder)}{how}"


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
