"""NaN and infinity in a pretrained model's own weights: told when it is loaded, not as the fault of a record."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_helpers import ROOT, TINY, settings
from tokenizer_kinds import tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM

import train_bilevel

pytestmark = pytest.mark.usefixtures("no_old_log")


def spoiled(folder: Path, value: float) -> Path:
    """A model folder in which one number of the second block is this value."""
    tokenizer = tokenizer_of("gpt2")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY | {"vocab_size": len(tokenizer)}))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = value
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


def message(model: Path) -> str:
    return f"model_name_or_path {str(model)!r}: 1 of its tensors hold NaN or infinity (transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_is_not_finite_is_refused(value: float, data: Path, tmp_path: Path, capsys) -> None:
    model, out = spoiled(tmp_path / "model", value), tmp_path / "run"
    line = settings(data, out, model_config=None, model_name_or_path=str(model), max_length=64)
    assert train_bilevel.main(line) == 2
    assert message(model) in capsys.readouterr().err and not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_that_is_not_finite_is_refused_under_deepspeed(stage: int, data: Path, tmp_path: Path) -> None:
    """ZeRO-3 has partitioned the parameters by then."""
    model, out = spoiled(tmp_path / "model", math.nan), tmp_path / "run"
    changes = {"backend": "deepspeed", "zero_stage": stage, "dtype": "bf16", "max_length": 64}
    line = settings(data, out, model_config=None, model_name_or_path=str(model), **changes)
    done = subprocess.run([sys.executable, ROOT / "train_bilevel.py", *line], capture_output=True, text=True)
    assert done.returncode == 2 and not out.exists()
    assert message(model) in done.stderr and "Traceback" not in done.stderr
