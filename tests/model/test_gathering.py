"""What ZeRO-3 gathers ahead: enough for the largest layers of the shipped shapes, and never against a user's file."""

from pathlib import Path

import pytest
import torch
import transformers
from run_helpers import ROOT

from bilevel.memory.plan import plan
from bilevel.model.gathering import with_prefetch
from bilevel.settings.rules import validate

ZERO3 = {"zero_optimization": {"stage": 3}}
SHAPES = sorted((ROOT / "configs" / "models").glob("*.json"))


def meta(shape: Path | transformers.PretrainedConfig) -> torch.nn.Module:
    config = transformers.AutoConfig.from_pretrained(shape) if isinstance(shape, Path) else shape
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda file: file.stem)
def test_the_largest_layer_of_a_block_can_be_prefetched_while_any_layer_computes(shape: Path) -> None:
    """By DeepSpeed's rule: at most the bucket, and no more than is missing to the number of gathered parameters."""
    model = meta(shape)
    zero = with_prefetch(ZERO3, model)["zero_optimization"]
    blocks = [block for block in model.modules() if isinstance(block, torch.nn.ModuleList)]
    largest = max(p.numel() for p in blocks[0].parameters())
    for layer in model.modules():
        gathered = sum(p.numel() for p in layer.parameters(recurse=False))
        left = zero["stage3_max_live_parameters"] - gathered
        assert min(left, zero["stage3_prefetch_bucket_size"]) >= largest
    assert zero["stage3_max_live_parameters"] < 2e9 and ZERO3 == {"zero_optimization": {"stage": 3}}


def test_what_a_file_sets_stays_and_other_stages_have_none() -> None:
    model = meta(transformers.GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1))
    own = {"stage": 3, "stage3_prefetch_bucket_size": 7, "stage3_max_live_parameters": 8}
    assert with_prefetch({"zero_optimization": own}, model) == {"zero_optimization": own}
    assert with_prefetch({"zero_optimization": {"stage": 2}}, model) == {"zero_optimization": {"stage": 2}}
    assert with_prefetch({}, model) == {}


def test_the_plan_tells_it() -> None:
    llama = {"model_type": "llama", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 24}
    llama |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    run, problems = validate(
        {"train_data": ["a"], "val_data": ["b"], "model_config": llama, "backend": "deepspeed", "zero_stage": 3}
        | {"max_length": 32, "micro_batch_tokens": 62}
    )
    assert not problems
    shape = transformers.LlamaConfig(**{name: value for name, value in llama.items() if name != "model_type"})
    title = plan(run, shape, 2, "bf16").title
    assert "ZeRO stage 3 (0.02B parameters gathered ahead, while fewer than 0.1B are)" in title
