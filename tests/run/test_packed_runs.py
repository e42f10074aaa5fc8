"""Runs with packing=true: the results of padded rows, what is said, and what is refused at the start."""

import json
from pathlib import Path

import pandas as pd
import pytest
from families import FAMILIES
from run_helpers import TINY, settings, train, train_until

import train_bilevel

pytestmark = pytest.mark.usefixtures("no_old_log")

SHORT = {"max_steps": 2, "eval_every": 2, "save_every": 0, "global_batch_size": 8, "val_batch_size": 8}
SHORT |= {"micro_batch_tokens": 400, "test_data": []}


def test_a_run_with_packed_rows(data: Path, tmp_path: Path) -> None:
    """It says so, ends where padded rows end, and leaves a model that any transformers reads."""
    packed, padded = (train(data, tmp_path / str(packing), **SHORT, packing=packing) for packing in (True, None))
    pd.testing.assert_frame_equal(packed, padded, rtol=1e-4, atol=1e-5)
    said = {name: (tmp_path / name / "run.log").read_text() for name in ("True", "None")}
    assert "rows are packed, by one attention per row" in said["True"]
    assert "rows are" not in said["None"]
    timing = {name: pd.read_csv(tmp_path / name / "timing.csv")["gflop"].iloc[-1] for name in said}
    assert timing["True"] < timing["None"]
    written = (tmp_path / "True" / "model" / "config.json").read_text()
    assert "packed" not in written and json.loads(written)["model_type"] == "gpt2"


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(data: Path, tmp_path: Path) -> None:
    chosen = SHORT | {"packing": True, "save_model": "none"}
    train(data, tmp_path / "whole", **chosen)
    assert train_until(1, settings(data, tmp_path / "parts", **chosen)) == 143
    train(data, tmp_path / "parts", **chosen)
    whole, parts = ((tmp_path / name / "metrics.csv").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_config": {"model_type": "bloom"} | FAMILIES["bloom"]}, "bloom models do not let another attention"),
        ({"model_config": TINY, "dropout": 0.1}, "attention of packed rows has no dropout"),
        ({"model_config": TINY, "attn_implementation": "eager"}, "attn_implementation=eager cannot keep"),
    ],
    ids=["family", "dropout", "attention"],
)
def test_packing_that_cannot_be_is_refused_at_the_start(
    changes: dict, words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_bilevel.main(settings(data, tmp_path / "run", **SHORT, packing=True, **changes)) == 2
    assert f"error: packing=true: {words}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
