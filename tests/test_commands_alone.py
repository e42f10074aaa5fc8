"""Commands of the pages that need no other page's: benchmarks, experiments, and the page of the comparison."""

from pathlib import Path

import pytest
from pages import alone, named, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", alone(), ids=named)
def test_every_command_runs(command: str, clone: Path) -> None:
    run(command, clone)
