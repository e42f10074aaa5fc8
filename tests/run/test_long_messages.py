"""Messages about what a file says stay short, however long its names and values are."""

import json
from pathlib import Path

import pytest

from bilevel.errors import UserError
from bilevel.processes import ALONE
from bilevel.run.checkpoint import Checkpoints
from bilevel.run.checkpoint_file import STATE_VERSION, read_manifest, write_manifest
from bilevel.settings.written import differing

LONG = "a" * 5000


def sealed(folder: Path, settings: dict, data: dict) -> Path:
    """A checkpoint of step 1 whose manifest says this."""
    path = folder / "step_000001"
    path.mkdir(parents=True)
    (path / "rank0.sums").write_text(json.dumps({}))
    write_manifest(path, {"version": STATE_VERSION, "step": 1, "processes": 1, "settings": settings, "data": data})
    assert read_manifest(path)["step"] == 1
    return path


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"lr_y": LONG}, {}),
        ({LONG: 1}, {}),
        ({f"setting {number}": LONG for number in range(100)}, {}),
        ({}, {LONG: "1"}),
        ({}, {f"train {number}": "1" for number in range(5000)}),
    ],
)
def test_a_manifest_with_long_values(settings: dict, data: dict, tmp_path: Path) -> None:
    path = sealed(tmp_path, settings, data)
    with pytest.raises(UserError) as refused:
        Checkpoints(tmp_path, ALONE, {}, {}, keep=2)._read(path)
    assert len(str(refused.value)) - len(str(path)) < 4000
    assert "is of another configuration" in str(refused.value) or "was made from other data" in str(refused.value)


def test_values_of_the_usual_length_are_shown_whole() -> None:
    shape = {"model_type": "gpt2", "vocab_size": 400, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
    found = differing({"model_config": shape, "seed": 1}, {"model_config": shape | {"n_head": 4}, "seed": 2})
    assert found == f"model_config was {shape} and is {shape | {'n_head': 4}}, seed was 1 and is 2"
