"""bilevel/run/machine.py: what a run writes of its machine, and what it does without."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from bilevel.run import machine


def test_what_is_written_is_read_and_holds_no_names(tmp_path: Path):
    machine.write_machine(tmp_path, 4)
    found = machine.read_machine(tmp_path)
    assert found.processes == 4 and found.torch == torch.__version__ and found.cores >= 1
    assert found.hardware.endswith(", 4 processes") and f"torch {torch.__version__}" in found.version
    text = (tmp_path / "machine.json").read_text()
    assert socket.gethostname() not in text and str(tmp_path) not in text and str(machine.ROOT) not in text
    assert set(json.loads(text)) == {"cpu", "cores", "gpu", "processes", "python", "torch", "transformers", "commit"}


def test_a_gpu_is_named_instead_of_the_processor():
    of = {"cpu": "Chip", "cores": 2, "python": "3", "torch": "2", "transformers": "5", "commit": "abc-dirty"}
    assert machine.Machine(gpu="H200", processes=1, **of).hardware == "H200"
    assert machine.Machine(gpu="", processes=1, **of).hardware == "Chip, 2 cores"
    assert machine.Machine(gpu="", processes=1, **of).version.startswith("commit abc-dirty, torch 2")
    assert machine.Machine(gpu="", processes=1, **of | {"commit": ""}).version.startswith("torch 2")


@pytest.mark.parametrize("content", [None, "", "[]", '{"cpu": 3}'])
def test_a_file_that_no_run_has_written_is_not_used(content: str | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "machine.json").write_text(content)
    assert machine.read_machine(tmp_path) is None


def test_there_is_no_commit_without_a_checkout_or_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit.__wrapped__() == ""
    (tmp_path / ".git").mkdir()  # not a repository
    assert machine.commit.__wrapped__() == ""
    monkeypatch.setenv("PATH", os.devnull)
    assert machine.commit.__wrapped__() == ""
