"""The start of a run, before heavy imports: --help, dry run, and checks of settings, files and model shape."""

import math
import os
import sys
import textwrap
from typing import TYPE_CHECKING, TypeAlias

from bilevel.errors import UserError
from bilevel.run.interrupt import watch_launcher
from bilevel.run.libraries import quiet_libraries
from bilevel.run.preflight import check_files, check_shape
from bilevel.run.stages import stage
from bilevel.settings.command_line import load_settings
from bilevel.settings.fields import Settings
from bilevel.settings.written import dump_changed

if TYPE_CHECKING:  # imported where it is used: mistakes are told at once
    from bilevel.data.sources import Source

FILES_ONLY = "BILEVEL_FILES_ONLY"  # set by run_F2SA.sh: a dry run that only checks, before several processes start
Files: TypeAlias = dict[str, list["Source"]]  # keys: train, val, test


def start(argv: list[str]) -> tuple[Settings, Files] | int:
    """The checked settings and data files of a run, or an exit code: 0 after a dry run, 2 after a mistake.

    It also checks the model's shape and the names and shapes of its weights, which takes seconds; the imports after it
    take several more.
    """
    stage.begin()
    try:
        settings, dry_run = load_settings(argv, note)
        watch_launcher()
        if not dry_run:
            stage("checking the data files")
        files = check_files(settings)
        if dry_run:
            return 0 if FILES_ONLY in os.environ else _tell(settings, files, full=dry_run == "full")
        stage("checking the model")
        quiet_libraries()
        from bilevel.model.loading import model_shape

        shape = model_shape(settings)
        check_shape(settings, shape)
        from bilevel.model.check import check_model  # imported late: a shape that cannot be is told a second sooner

        check_model(settings, shape)
    except UserError as error:
        return refuse(error)
    return settings, files


def note(words: str) -> None:
    """Print a note, once for all processes, and not in a check before they start."""
    if os.environ.get("RANK", "0") == "0" and FILES_ONLY not in os.environ:
        print(f"note: {words}", file=sys.stderr)


def refuse(error: UserError) -> int:
    """Print the error, once for all processes; return the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return 2


def _tell(settings: Settings, files: Files, full: bool) -> int:
    """Print what the run will take, and its settings; the exit code. full: all settings, and the memory plan."""
    from bilevel.run.outlook import outlook

    processes, on_host = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    found = outlook(settings, files, processes, hosts=math.ceil(processes / on_host))
    more = "" if full else "; -v also prints the other settings" + (" and the memory plan" if found.plan else "")
    print(*(f"# {line}" for line in found.lines), "", sep="\n")
    print(dump_changed(settings, others=full), end="")
    if full and found.plan:
        from bilevel.memory.table import render

        print(textwrap.indent(render(found.plan), "# ", lambda _: True))
    print(f"\n# a dry run: nothing was started or written{more}")
    if found.fits is False:
        raise UserError("the run does not fit; the lines above name what would help")
    return 0
