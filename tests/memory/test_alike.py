"""Passes through a few blocks against the pass through all of them."""

from collections.abc import Callable

import pytest
import torch

from bilevel.errors import UserError
from bilevel.memory import activations, alike
from bilevel.memory.activations import _measure, measure_pass, meta_model, micro_batch, when_passed_back
from bilevel.memory.plan import _groups, run_shape
from bilevel.model.lisa import find_blocks
from bilevel.settings.fields import Settings

BLOCKS = 18
LLAMA = {"model_type": "llama", "num_hidden_layers": BLOCKS, "vocab_size": 901, "hidden_size": 64,
         "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 32}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 901, "n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "n_positions": 32}
GEMMA = LLAMA | {"model_type": "gemma2", "head_dim": 16}  # every second block has a window
WAYS = {
    "all": {},
    "checkpointing": {"gradient_checkpointing": True},
    "LISA": {"lisa_layers": 2},
    "LISA with many": {"lisa_layers": 6, "model_config": LLAMA | {"num_hidden_layers": 30}},  # two long runs
    "LISA without embeddings": {"lisa_layers": 1, "lisa_train_embeddings": False},
    "adapters": {"lora_rank": 4},
    "GPT-2": {"model_config": GPT2},
    "many words": {"model_config": LLAMA | {"vocab_size": 30011}},  # the gradient of few blocks is the smaller
    "one row": {"micro_batch_tokens": 31, "model_config": LLAMA | {"vocab_size": 30011}},
}


def prepared(changes: dict) -> tuple[Settings, torch.nn.Module]:
    values = {"train_data": ["a"], "val_data": ["b"], "max_length": 32, "micro_batch_tokens": 310, "lisa_interval": 2}
    settings = Settings(**values | {"model_config": LLAMA} | changes)
    model = meta_model(settings, run_shape(settings), "bf16")
    _groups(settings, model)  # freezes what the plan takes as frozen
    through_all(settings, model)  # tests its head, once, by a pass of its own
    return settings, model


def through_all(settings: Settings, model: torch.nn.Module) -> alike.Pass:
    return _measure(model, find_blocks(model), torch.zeros(micro_batch(settings), dtype=torch.long, device="meta"))


def counted(model: torch.nn.Module, measure: Callable[[], alike.Pass]) -> tuple[alike.Pass, int]:
    """What it measures, and how many blocks it ran forward."""
    ran = []
    hooks = [block.register_forward_hook(lambda *_: ran.append(1)) for block in find_blocks(model)]
    found = measure()
    for hook in hooks:
        hook.remove()
    return found, len(ran)


@pytest.mark.slow
@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS)
def test_few_blocks_tell_of_all(changes: dict):
    settings, model = prepared(changes)
    whole, all_blocks = counted(model, lambda: through_all(settings, model))
    found, few = counted(model, lambda: measure_pass(settings, model))
    assert found == whole and few < all_blocks
    assert len(find_blocks(model)) == all_blocks == settings.model_config.get("num_hidden_layers", BLOCKS)


def test_few_blocks_tell_of_a_llama():
    """One of the cases, in the default suite."""
    test_few_blocks_tell_of_all({"lisa_layers": 2})


@pytest.mark.slow
def test_blocks_that_take_turns_are_all_measured():
    settings, model = prepared({"model_config": GEMMA})
    whole, all_blocks = counted(model, lambda: through_all(settings, model))
    assert counted(model, lambda: measure_pass(settings, model)) == (whole, all_blocks)


def test_a_model_whose_blocks_are_in_no_list_is_measured_whole(monkeypatch: pytest.MonkeyPatch):
    def none_found(_: torch.nn.Module) -> None:
        raise UserError("no list of decoder blocks")

    settings, model = prepared({"model_config": GPT2 | {"n_layer": 2}})
    whole = through_all(settings, model)
    monkeypatch.setattr(activations, "find_blocks", none_found)
    found = measure_pass(settings, model)
    assert (found.kept, found.logits, found.backward) == (whole.kept, whole.logits, whole.backward)


def test_a_block_may_get_its_input_by_any_name():
    """It is told when the gradient has passed the block, and before that of the embeddings is there."""
    table, block, parts = torch.nn.Embedding(100, 10), torch.nn.Linear(10, 10), []
    with when_passed_back(torch.nn.ModuleList([block]), lambda: parts.append(table.weight.grad)):
        block(input=table(torch.tensor([3]))).sum().backward()
    assert parts == [None] and table.weight.grad is not None


def test_blocks_that_differ_unseen_are_all_measured():
    """Blocks of one kind whose needs are not alike: the check with two more of all finds it."""
    blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(24))
    assert alike.extrapolated(blocks, lambda: alike.Pass(len(blocks) ** 2, 1, 1, 1)).kept == 24**2
    assert alike.extrapolated(blocks, lambda: alike.Pass(3 * len(blocks), len(blocks), 1, 1)).logits == 24
    with pytest.raises(KeyError):
        alike.extrapolated(blocks, lambda: {}["a pass that fails"])
    assert len(blocks) == 24
