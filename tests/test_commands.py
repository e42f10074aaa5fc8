"""Every command of README.md and docs/ runs, in order, in a clone, as it stands; those of test_commands_alone.py there.

A command can use what those before it made, so that one that fails can make others fail.
"""

from pathlib import Path

import pytest
from pages import alone, commands, make_copy, named, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    make_copy(folder)
    return folder


@pytest.mark.parametrize("command", [each for each in commands() if each not in alone()], ids=named)
def test_every_command_runs(command: str, copy: Path) -> None:
    run(command, copy)


def test_the_commands_made_what_the_pages_promise(copy: Path) -> None:
    assert (copy / "curves.png").exists() and (copy / "my_data" / "mixed" / "train_mixed.json").exists()
