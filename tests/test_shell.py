"""Commands whose output loses its reader, as in `command | head`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT, make_data, settings

from bilevel.shell import READER_LEFT

DRY = "--config configs/experiments/small.yaml --train_data a.json b.json --val_data c.json --dry_run"


def without_reader(command: list[str], **options) -> subprocess.CompletedProcess:
    """Run it with a pipe as stdout that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(
            [sys.executable, *command], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, **options
        )
    finally:
        os.close(write)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["train_bilevel.py", "--help"],
        *(["-m", f"bilevel.{name}", "--help"] for name in ("compare", "evaluate", "export", "prepare", "report")),
        ["-m", "bilevel.settings"],
    ],
    ids=lambda command: " ".join(command[:2]).removeprefix("-m "),
)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_command_ends_without_a_traceback(command: list[str], unbuffered: str) -> None:
    """argparse ignores that its help cannot be written, if that shows at once."""
    done = without_reader(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.stderr == ""
    assert done.returncode == READER_LEFT or (done.returncode == 0 and "--help" in command)


@pytest.mark.slow
def test_a_dry_run_ends_and_a_run_goes_on(tmp_path: Path) -> None:
    command = ["train_bilevel.py", *settings(make_data(tmp_path), tmp_path / "run", max_steps=2)]
    done = without_reader([*command, "--dry_run"], cwd=ROOT)
    assert (done.returncode, done.stderr) == (READER_LEFT, "")
    done = without_reader(command, cwd=ROOT)
    assert done.returncode == 0 and done.stderr.count("CANNOT BE WRITTEN: [Errno 32] Broken pipe. The run goes on") == 1
    assert (tmp_path / "run" / "weights.csv").exists()
