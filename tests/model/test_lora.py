"""LoRA: only the adapters are trained, and a plain model is saved."""

import re
from pathlib import Path

import pytest
import torch
from run_helpers import settings, train, train_until
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bilevel.data.batches import Batch, MicroBatch
from bilevel.errors import UserError
from bilevel.memory.plan import plan
from bilevel.model.adapter_copy import AdapterCopy
from bilevel.model.loading import load_model, model_shape
from bilevel.processes import ALONE
from bilevel.settings.fields import Settings
from bilevel.settings.rules import validate
from bilevel.step.plain import plain_step

pytestmark = pytest.mark.usefixtures("no_old_log")

RANK, ALPHA = 3, 12.0
LLAMA = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 60, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
SHAPES = {"gpt2": GPT2, "llama": LLAMA | {"max_position_embeddings": 32, "num_key_value_heads": 2}}
IDS = torch.randint(60, (4, 12), generator=torch.Generator().manual_seed(1))


class Tokens:
    """As much of a tokenizer as a new model asks for."""

    bos_token_id = eos_token_id = 0

    def __init__(self, size: int = 60):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def convert_ids_to_tokens(self, ids: range) -> list[str]:
        return [f"<{i}>" for i in ids]


def given(family: str, **changes) -> Settings:
    values = {"train_data": ["a"], "method": "fixed", "model_config": {"model_type": family} | SHAPES[family]}
    return Settings(**values | {"max_length": 32, "lora_rank": RANK, "lora_alpha": ALPHA} | changes)


def trained(family: str) -> tuple[AdapterCopy, dict[str, torch.Tensor]]:
    """A copy after three steps, and what it was before."""
    chosen = given(family)
    model = load_model(chosen, model_shape(chosen), Tokens())
    copy = AdapterCopy(model, "w", ALONE, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ones = torch.ones(4, dtype=torch.float64)
    micro = MicroBatch(IDS[:, :-1], IDS[:, 1:], torch.arange(4), torch.arange(4), ones)
    for step in range(3):
        plain_step(copy, Batch(torch.arange(4), [micro], ones, 4), 1e-2, step)
    return copy, before


@pytest.mark.parametrize("family", SHAPES)
def test_adapters_of_all_layers_but_the_head_move_and_nothing_else(family: str):
    copy, before = trained(family)
    moved = {name for name, p in copy.model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in before if ".lora_" in name}
    assert moved == adapters and len(adapters) == 2 * 2 * {"gpt2": 4, "llama": 7}[family]
    assert not any("lm_head" in name or "embed" in name for name in adapters)
    assert {id(p) for p in copy.optimizer.state} == {id(dict(copy.model.named_parameters())[name]) for name in adapters}


@pytest.mark.parametrize("family", SHAPES)
def test_the_model_begins_as_it_would_without(family: str):
    both = given(family, lora_rank=None), given(family)
    plain, adapted = (load_model(chosen, model_shape(chosen), Tokens()) for chosen in both)
    assert torch.equal(plain(input_ids=IDS).logits, adapted(input_ids=IDS).logits)


@pytest.mark.parametrize("family", SHAPES)
def test_the_saved_model_is_plain_and_says_the_same(family: str, tmp_path: Path):
    copy, before = trained(family)
    expected = copy.model(input_ids=IDS).logits.detach()
    state = {name: p.detach().clone() for name, p in copy.model.named_parameters()}

    class Tokenizer:
        save_pretrained = staticmethod(lambda folder: None)

    copy.save(tmp_path / "model", Tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    at_start = AutoModelForCausalLM.from_config(model.config)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in at_start.named_parameters()}
    for name, p in model.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.w.weight" in state:
            a, b = (state[f"{layer}.lora_{side}.w.weight"] for side in "AB")
            change = ALPHA / RANK * b @ a
            torch.testing.assert_close(
                p, state[f"{layer}.base_layer.weight"] + (change.t() if family == "gpt2" else change)
            )
        elif name in before:
            assert torch.equal(p, before[name])


@pytest.mark.parametrize("method", ["fixed", "f2sa", "align"])
def test_a_run_with_adapters_is_saved_merged_and_goes_on_bit_for_bit(data: Path, tmp_path: Path, method: str):
    chosen = {"method": method, "x_init": "size", "lora_rank": 2, "save_every": 2, "lr_y": 1e-2, "max_steps": 4}
    metrics = train(data, tmp_path / "whole", **chosen)
    assert train_until(3, settings(data, tmp_path / "stopped", **chosen)) == 143
    train(data, tmp_path / "stopped", **chosen)
    for name in ("metrics.csv", "model/model.safetensors"):
        whole, stopped = ((tmp_path / run / name).read_bytes() for run in ("whole", "stopped"))
        assert whole == stopped, name
    assert not any(
        "lora" in name or "base_layer" in name for name in load_file(tmp_path / "whole/model/model.safetensors")
    )
    assert metrics["test_loss_w"].iloc[-1] < metrics["test_loss_w"].iloc[0]


def test_the_plan_counts_one_model_and_optimizer_state_of_adapters_alone():
    shape = model_shape(given("llama"))
    model = load_model(given("llama"), shape, Tokens())
    size, adapters = (sum(p.numel() for p in model.parameters() if p.requires_grad == which) for which in (False, True))
    fixed = plan(given("llama"), shape, 1, "fp32")
    f2sa = plan(given("llama", method="f2sa", val_data=["b"]), shape, 1, "fp32")
    for found, copies in ((fixed, 1), (f2sa, 2)):
        assert found.gpu["frozen model"] == 4 * size and found.gpu["Adam moments"] == 8 * copies * adapters
        assert found.gpu["adapters"] == found.gpu["gradients"] == 4 * copies * adapters
    assert "one adapter on one copy" in fixed.title and "two adapters on one copy" in f2sa.title
    assert "LoRA of rank 3 on a model in fp32" in fixed.title


TOGETHER = {
    "lisa_layers": ({"lisa_layers": 1}, "lora_rank and lisa_layers: adapters freeze the blocks"),
    "deepspeed": ({"backend": "deepspeed"}, "lora_rank needs backend=torch"),
    "influence": ({"method": "influence"}, "method=influence reads gradients of the last block"),
    "alone": ({"lora_rank": None, "base_dtype": "nf4"}, "base_dtype without adapters: give lora_rank"),
    "bf16": ({"base_dtype": "bf16", "dtype": "fp32"}, "base_dtype=bf16 with dtype=fp32"),
}


@pytest.mark.parametrize(("changes", "said"), TOGETHER.values(), ids=TOGETHER)
def test_what_does_not_go_together(changes: dict, said: str):
    common = {"train_data": ["a"], "val_data": ["b"], "model_name_or_path": "m", "method": "fixed", "lora_rank": 4}
    _, found = validate(common | changes)
    assert len(found) == 1 and found[0].startswith(said)


def test_what_a_new_model_cannot_have():
    common = {"train_data": ["a"], "val_data": ["b"], "model_config": {"model_type": "gpt2", "vocab_size": 9}}
    for changes in ({"base_dtype": "nf4"}, {"lora_merge": False}):
        _, found = validate(common | {"lora_rank": 4} | changes)
        assert len(found) == 1 and "needs model_name_or_path" in found[0]


BAD = {
    "targets": ({"lora_targets": ["q_proj", "wq"]}, "lora_targets: 'wq' matches no linear layer of the model"),
    "pattern": ({"lora_targets": ["(q_proj"]}, "neither the name of a layer nor a regular expression"),
    "rank": ({"lora_rank": 64}, "lora_rank 64: model.layers.0.self_attn.k_proj is only 16 wide"),
}


@pytest.mark.parametrize(("changes", "said"), BAD.values(), ids=BAD)
def test_adapters_that_cannot_be(changes: dict, said: str):
    chosen = given("llama", **changes)
    with pytest.raises(UserError, match=re.escape(said)):
        load_model(chosen, model_shape(chosen), Tokens())


def test_chosen_layers_alone_get_adapters():
    chosen = given("llama", lora_targets=["q_proj", r"model\.layers\.1\.mlp\..*"])
    model = load_model(chosen, model_shape(chosen), Tokens())
    names = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    mlp = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert names == mlp | {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


def test_tokens_without_an_embedding_are_refused():
    chosen = given("llama")
    with pytest.raises(UserError, match=r"2 tokens without an embedding in the model \(<60>, <61>\)"):
        load_model(chosen, model_shape(chosen), Tokens(62))
