"""model/ has the configuration that the model came with, whatever the run trained it with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import ROOT, TINY, settings, train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bilevel.model.loading import save_model

pytestmark = pytest.mark.usefixtures("no_old_log")

DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.1, "summary_first_dropout": 0.4}
SHORT = {"max_steps": 2, "global_batch_size": 4, "val_batch_size": 4, "test_data": []}


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Without what transformers says of itself and of the class that was saved."""
    found = json.loads((folder / name).read_text())
    return {key: found[key] for key in found.keys() - {"transformers_version", "architectures", "dtype"}}


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dropouts and a generation configuration of its own."""
    folder = tmp_path_factory.mktemp("pretrained")
    train(data, folder / "run", model_config=TINY, **SHORT)
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    config = AutoConfig.from_pretrained(folder / "run" / "model", **DROPOUT)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, max_new_tokens=17, eos_token_id=tokenizer.eos_token_id
    )
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("dropout", [0.0, 0.05, None])
def test_a_new_model_has_the_numbers_of_model_config(dropout: float | None, data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", model_config=TINY | DROPOUT, dropout=dropout, **SHORT)
    model, tokens = tmp_path / "run" / "model", {"bos_token_id": 0, "eos_token_id": 0}
    AutoConfig.for_model(**TINY | DROPOUT | tokens).save_pretrained(tmp_path / "as_given")
    assert read(model) == read(tmp_path / "as_given")
    assert read(model)["use_cache"] and read(model, "generation_config.json")["use_cache"]


@pytest.mark.parametrize("changes", [{}, {"method": "fixed", "x_init": "size", "lora_rank": 2}], ids=["plain", "lora"])
def test_a_pretrained_model_keeps_its_configuration(
    changes: dict, pretrained: Path, data: Path, tmp_path: Path
) -> None:
    train(data, tmp_path / "run", model_config=None, model_name_or_path=str(pretrained), **SHORT | changes)
    check(tmp_path / "run" / "model", pretrained, torch.float32)


def test_what_a_killed_process_left_half_written_is_removed(pretrained: Path, tmp_path: Path) -> None:
    """safetensors writes to a file of another name first; a file of somebody else stays."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pretrained), AutoTokenizer.from_pretrained(pretrained)
    model.own_dropouts, model.taught_ends = {}, []
    for name in (".tmpmZipK6", "notes.txt"):
        (tmp_path / name).write_text("half")
    save_model(model, tmp_path, tokenizer)
    assert not (tmp_path / ".tmpmZipK6").exists() and (tmp_path / "notes.txt").read_text() == "half"
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_pretrained_model_keeps_its_configuration_under_deepspeed(
    stage: int, pretrained: Path, data: Path, tmp_path: Path
) -> None:
    changes = SHORT | {"model_config": None, "model_name_or_path": str(pretrained), "dtype": "bf16"}
    changes |= {"backend": "deepspeed", "zero_stage": stage, "rounding_guard": "off"}
    command = [sys.executable, ROOT / "train_bilevel.py", *settings(data, tmp_path / "run", **changes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "run" / "model", pretrained, torch.bfloat16)


def check(saved: Path, original: Path, dtype: torch.dtype) -> None:
    for name in ("config.json", "generation_config.json"):
        assert read(saved, name) == read(original, name), name
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.transformer.drop.p == 0.2 and model.dtype == dtype
