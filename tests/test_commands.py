"""Every command of README.md and docs/ runs, in order, in a clone, as it stands; those of test_commands_alone.py there.

A command can use what those before it made, so that one that fails can make others fail.
"""

from pathlib import Path

import pytest
from pages import alone, commands, named, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", [each for each in commands() if each not in alone()], ids=named)
def test_every_command_runs(command: str, clone: Path) -> None:
    run(command, clone)


def test_the_commands_made_what_the_pages_promise(clone: Path) -> None:
    assert (clone / "curves.png").exists() and (clone / "my_data" / "mixed" / "train_mixed.json").exists()
