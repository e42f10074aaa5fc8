"""bilevel/model/flops.py against torch's counter on real passes."""

import pytest
import torch
import transformers
from benchmarks.operations import counted
from benchmarks.samples import random_samples
from families import FAMILIES, GPT2, LENGTHS, LLAMA

from bilevel.baselines.influence import LastBlock
from bilevel.model.cpu_kernels import speed_up
from bilevel.model.torch_copy import TorchCopy

OTHERS = [{"model_type": family} | shape | {"vocab_size": 50} for family, shape in FAMILIES.items()]


@pytest.mark.parametrize("shape", [GPT2, LLAMA, *OTHERS], ids=lambda shape: shape["model_type"])
def test_a_copy_knows_what_its_passes_take(shape: dict):
    """Experts one after the other, as each token finds its own."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**shape), attn_implementation="eager", experts_implementation="eager"
    )
    w, (micro,) = TorchCopy(speed_up(model)), random_samples(["a"], LENGTHS, 50, 0).in_order(1000)
    ones = torch.ones(len(micro.sample_ids))
    for _ in range(2):  # the model first looks, on one token, at what becomes of its logits
        with counted() as forward, torch.no_grad():
            w.losses(micro, 0)
    assert w.passed.operations(w.shape) == pytest.approx(2 * forward.get_total_flops(), rel=1e-9)

    before = w.passed.operations(w.shape)
    with counted() as both:
        w.backward(w.losses(micro, 0, ones).sum(), True)
    assert w.passed.operations(w.shape) - before == pytest.approx(both.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("shape", [GPT2, LLAMA])
def test_a_copy_knows_about_what_gradients_of_single_samples_take(shape: dict):
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**shape), attn_implementation="eager"
    )
    w, (micro,) = TorchCopy(speed_up(model)), random_samples(["a"], LENGTHS, 50, 0).in_order(1000)
    w.losses(micro, 0)
    before = w.passed.operations(w.shape)
    with counted() as single:
        list(LastBlock(w).gradients(micro))
    assert w.passed.operations(w.shape) - before == pytest.approx(single.get_total_flops(), rel=0.15)
