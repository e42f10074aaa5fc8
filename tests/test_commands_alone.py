"""Commands of the pages that need no other page's: benchmarks, experiments, and the page of the comparison."""

from pathlib import Path

import pytest
from pages import alone, make_copy, named, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    make_copy(folder)
    return folder


@pytest.mark.parametrize("command", alone(), ids=named)
def test_every_command_runs(command: str, copy: Path) -> None:
    run(command, copy)
