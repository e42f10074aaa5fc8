"""bilevel/run/preflight.py, zero_config.py and what else refuses a run before it starts."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from run_helpers import TINY, make_data, settings
from tokenizer_kinds import tokenizer_of

import train_bilevel
from bilevel.errors import UserError
from bilevel.model.copies import chosen_dtype
from bilevel.model.loading import load_model
from bilevel.run.preflight import check_shape
from bilevel.settings.deepspeed import read_config, zero_config
from bilevel.settings.fields import Settings


def run(**changes) -> Settings:
    return Settings(**{"train_data": ["a"], "val_data": ["b"], "model_config": TINY} | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("{}", "the zero_optimization section is missing"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}, "bf16": {}}, "remove bf16, optimizer"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer needs zero_optimization.stage 2",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs zero_optimization.stage 3",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "or higher, but it is 0"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_right(tmp_path: Path, capsys, content: str | dict, message: str):
    """Refused by the script's first check, with whatever else is wrong, and nothing is written."""
    file = tmp_path / "zero.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    data = make_data(tmp_path / "data", size=8)
    changes = {"backend": "deepspeed", "deepspeed": str(file), "val_batch_size": 1000}
    assert train_bilevel.main(settings(data, tmp_path / "r", **changes)) == 2
    said = capsys.readouterr().err
    assert message in said and str(file) in said and "val_batch_size 1000 is larger" in said
    assert not (tmp_path / "r").exists()


def test_offload_where_it_works_is_taken(tmp_path: Path):
    for stage, part in ((2, "offload_optimizer"), (3, "offload_param"), (1, "none")):
        file = tmp_path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage, part: {"device": "cpu"}}}))
        assert read_config(file)["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_bf16_has_fp32_masters_at_every_stage(stage: int | None):
    config = zero_config(run(backend="deepspeed", zero_stage=stage), "bf16")
    assert config["zero_optimization"]["stage"] == (2 if stage is None else stage)
    assert config["bf16"]["enabled"] == (stage != 0) == ("torch_autocast" not in config)
    assert "torch_autocast" not in zero_config(run(backend="deepspeed", zero_stage=stage), "fp32")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2", "qwen2", "mistral", "phi"])
def test_more_lisa_layers_than_blocks(family: str):
    shape = transformers.AutoConfig.for_model(family, num_hidden_layers=3)
    check_shape(run(lisa_layers=3), shape)
    with pytest.raises(UserError, match="lisa_layers 4: the model has 3 decoder blocks"):
        check_shape(run(lisa_layers=4), shape)


def test_a_quantized_model():
    shape = transformers.LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"'some/model-GPTQ': its weights are quantised \(gptq\)"):
        check_shape(run(model_config=None, model_name_or_path="some/model-GPTQ"), shape)


def test_lisa_and_a_model_that_is_frozen_in_part(monkeypatch: pytest.MonkeyPatch):
    make = transformers.AutoModelForCausalLM.from_config

    def frozen(*args, **kwargs) -> torch.nn.Module:
        model = make(*args, **kwargs)
        model.transformer.h[1].requires_grad_(False)
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", frozen)
    shape, tokenizer = transformers.GPT2Config(**TINY), tokenizer_of("gpt2")
    with pytest.raises(UserError, match=r"12 parameters of this model are frozen \(transformer.h.1.ln_1.weight, ...\)"):
        load_model(run(lisa_layers=1), shape, tokenizer)
    assert not all(p.requires_grad for p in load_model(run(), shape, tokenizer).parameters())


def test_bf16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert chosen_dtype(run(), gpu) == "fp32" and chosen_dtype(run(dtype="bf16"), cpu) == "bf16"
    with pytest.raises(UserError, match="an old card does not support bf16; use dtype=fp32"):
        chosen_dtype(run(dtype="bf16"), gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert chosen_dtype(run(), gpu) == "bf16" and chosen_dtype(run(), cpu) == "fp32"
