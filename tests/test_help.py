"""Every command explains itself with an example that can be copied."""

import importlib

import pytest
from run_helpers import ROOT

import train_bilevel

COMMANDS = sorted(path.parent.name for path in (ROOT / "bilevel").glob("*/__main__.py"))
COMMANDS.remove("settings")  # the launcher's: it takes no arguments


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"bilevel.{name}.command").main(["--help"])
    assert not stop.value.code
    assert f"\n  python -m bilevel.{name} " in capsys.readouterr().out.replace("    python", "  python")


def test_training_has_examples(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        train_bilevel.main(["--help"])
    assert capsys.readouterr().out.count("\n  python train_bilevel.py --config ") >= 4
