"""How often a step makes the host wait for a GPU, counted without one."""

import copy

import pytest
import torch
import transformers
from pretended_device import DEVICE, Waits, put
from step_helpers import NU, VOCABULARY, cut, sample_weights, tiny_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bilevel.data.batches import Batch, make_micro_batches
from bilevel.model.packed_attention import NAME
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import ALONE
from bilevel.step.f2sa import penalty_step
from bilevel.step.plain import plain_step


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape)).train()


MODELS = {"gpt2": tiny_model, "llama": llama}
OTHERS = [("gpt2", False), ("llama", False), ("llama", True)]  # slow


@pytest.mark.parametrize(
    ("model", "bf16"),
    [("gpt2", True), *(pytest.param(*way, marks=pytest.mark.slow) for way in OTHERS)],
)
def test_a_step_makes_the_host_wait_three_times(model: str, bf16: bool) -> None:
    """For the losses and for each copy's norm, however many micro-batches; and computes what it does on the CPU."""
    start = MODELS[model]()
    settings = {"weight_decay": 0.1, "clip_grad_norm": 0.5, "bf16": bf16}
    there = {name: TorchCopy(put(copy.deepcopy(start)), **settings) for name in "uw"}
    here = {name: TorchCopy(copy.deepcopy(start), **settings) for name in "uw"}
    assert there["u"].world.device == DEVICE != here["u"].world.device
    x = {"there": sample_weights(), "here": sample_weights()}
    for _ in range(3):
        train, validation = cut(list(range(12)), 2), cut(list(range(20, 27)), 2)
        expected = penalty_step(**here, weights=x["here"], train=train, validation=validation, nu=NU, lr_y=1e-3, seed=0)
        with Waits() as waits:
            found = penalty_step(
                **there, weights=x["there"], train=train, validation=validation, nu=NU, lr_y=1e-3, seed=0
            )
        torch.testing.assert_close(found.gaps, expected.gaps, rtol=0, atol=1e-3 if bf16 else 1e-6)
    assert sum(waits.found.values()) == 3, waits.found
    passes = 2 * len(train.micro_batches) + len(validation.micro_batches)
    assert waits.copies == 2 * passes + 3 + 2  # rows and factors of each pass, the order of losses, the norms


def test_a_plain_step_waits_twice() -> None:
    w = TorchCopy(put(tiny_model()), 0.1)
    for _ in range(2):  # the first one also looks at how the model uses its head
        with Waits() as waits:
            plain_step(w, cut(list(range(12)), 2), 1e-3, 0)
    assert sum(waits.found.values()) == 2, waits.found


def packed(start: int, number: int) -> Batch:
    """Samples of 4 to 9 tokens, whose second half is supervised, packed into micro-batches of 40 tokens."""
    ids = [[(start + i + place) % VOCABULARY for place in range(5 + i % 6)] for i in range(number)]
    rows = {"input_ids": ids, "labels": [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]}
    numbers, ones = torch.arange(start, start + number), torch.ones(number, dtype=torch.float64)
    return Batch(numbers, make_micro_batches(rows, numbers, ones, 40, ALONE, packed=True), ones, number)


def masked_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, **others):
    """In the place of varlen_attn, which a CPU lacks: a mask from the bounds, made on the device."""
    if cu_seq_lens_q is None:  # one token, to look at how the model uses its head
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    at = torch.arange(query.shape[2], device=query.device)
    row = (at[:, None] >= cu_seq_lens_q[None, 1:]).sum(1)
    mask = (row[:, None] == row) & (at[:, None] >= at)
    return sdpa_attention_forward(module, query, key, value, mask[None, None], **others)


@pytest.mark.parametrize("model", MODELS)
def test_a_step_on_packed_rows_waits_no_more(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = MODELS[model]()
    start.set_attn_implementation(NAME)
    here, there = ({name: TorchCopy(made(copy.deepcopy(start))) for name in "uw"} for made in (lambda same: same, put))
    x = sample_weights()
    expected = penalty_step(**here, weights=x, train=packed(0, 12), validation=packed(20, 5), nu=NU, lr_y=0.0, seed=0)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, masked_attention)
    for _ in range(2):  # the first one also looks at how the model uses its head
        train, validation = packed(0, 12), packed(20, 5)
        with Waits() as waits:
            found = penalty_step(**there, weights=x, train=train, validation=validation, nu=NU, lr_y=0.0, seed=0)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=0)
    assert sum(waits.found.values()) == 3, waits.found
    passes = 2 * len(train.micro_batches) + len(validation.micro_batches)
    assert waits.copies == 2 * passes + 3
