"""bilevel/model/losses.py: equal to the plain way, logits everywhere and no micro-batches, on several architectures."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizer_kinds import tokenizer_of
from torch.nn import functional

from bilevel.data.samples import Samples, load_samples
from bilevel.data.sources import file_source
from bilevel.data.tokenise import IGNORE, Tokeniser
from bilevel.model.losses import sample_losses, token_losses

TINY = {"vocab_size": 450, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=450, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "llama": transformers.LlamaConfig(**TINY, num_key_value_heads=2),
    # The head's logits are squashed afterwards (final_logit_softcapping).
    "gemma2": transformers.Gemma2Config(**TINY, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.3),
    "gpt_neox": transformers.GPTNeoXConfig(**TINY),
}


def make(name: str) -> torch.nn.Module:
    """A small model without dropout, initialised widely enough that the losses of the samples differ."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def samples(write: Callable[..., Path]) -> Samples:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "12", "more"]
    records = [{"instruction": " ".join(words[i:]), "output": " ".join(words[: 3 * i % 11])} for i in range(12)]
    return load_samples([file_source(write("s.json", records))], Tokeniser(tokenizer_of("gpt2"), 100, "response"))


def plain_losses(model: torch.nn.Module, samples: Samples) -> torch.Tensor:
    """l_i one sample at a time from all its logits."""
    losses = []
    for row in samples.table:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=IGNORE))
    return torch.stack(losses)


def our_losses(model: torch.nn.Module, samples: Samples, budget: int) -> torch.Tensor:
    losses = [None] * len(samples)
    for batch in samples.batch(torch.arange(len(samples)), budget).micro_batches:
        for i, loss in zip(batch.sample_ids.tolist(), sample_losses(model, batch), strict=True):
            losses[i] = loss
    return torch.stack(losses)


def flat_gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """The gradient over all parameters as one vector."""
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_equal_the_plain_ones(name: str, samples: Samples) -> None:
    model = make(name)
    weights = torch.linspace(0.5, 2, len(samples))
    expected = plain_losses(model, samples)
    assert expected.std() > 0.01
    expected_gradient = flat_gradient(model, (weights * expected).sum())
    for budget in (1, 100, 10**6):
        losses = our_losses(model, samples, budget)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
        gradient = flat_gradient(model, (weights * losses).sum())
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_logits_are_computed_where_there_is_a_label_only(samples: Samples) -> None:
    model = make("gpt2")
    [batch] = samples.batch(torch.arange(len(samples)), 10**6).micro_batches
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: shapes.append(tuple(logits.shape)))
    losses, rows = token_losses(model, batch)
    labels = sum(label != IGNORE for row in samples.table for label in row["labels"])
    assert shapes == [(1, labels, 450)] and losses.shape == rows.shape == (labels,)
    assert rows.bincount().tolist() == (batch.targets != IGNORE).sum(1).tolist()


def test_hook_is_removed_even_after_an_error(samples: Samples) -> None:
    model = make("llama")
    [batch] = samples.batch(torch.arange(3), 10**6).micro_batches
    whole = model(input_ids=batch.input_ids).logits
    sample_losses(model, batch)
    assert torch.equal(model(input_ids=batch.input_ids).logits, whole)

    def fail(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise RuntimeError("out of memory")

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample_losses(model, batch)
    handle.remove()
    assert torch.equal(model(input_ids=batch.input_ids).logits, whole)
