"""How often a step makes the host wait for a GPU, counted without one."""

import copy

import pytest
import torch
import transformers
from pretended_device import DEVICE, Waits, put
from step_helpers import NU, VOCABULARY, cut, sample_weights, tiny_model

from bilevel.model.torch_copy import TorchCopy
from bilevel.step.f2sa import penalty_step
from bilevel.step.plain import plain_step


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape)).train()


MODELS = {"gpt2": tiny_model, "llama": llama}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bf16", [False, True])
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
