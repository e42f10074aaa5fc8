"""bilevel/model/chunked_head.py: losses and gradients in chunks are those of whole logits, wherever the gradient
goes."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from torch.nn import functional

from bilevel.data.batches import MicroBatch
from bilevel.data.tokenise import IGNORE
from bilevel.memory.activations import LiveBytes
from bilevel.model import chunked_head as head_module
from bilevel.model.chunked_head import head_losses
from bilevel.model.cpu_kernels import Linear
from bilevel.model.losses import sample_losses

TOKENS, WIDTH, VOCABULARY = 37, 16, 53


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 rows, the last of 2; tiles of 20 rows of the gradient, the last of 13."""
    monkeypatch.setitem(head_module.CHUNK, "cpu", 5 * VOCABULARY + 3)
    monkeypatch.setattr(head_module, "TILE", 20)


def problem(bias: bool, dtype: torch.dtype = torch.float32):
    """A head, hidden (1, M, H), targets (M,) and the gradients (M,) that their losses will have."""
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    hidden = torch.randn(1, TOKENS, WIDTH).to(dtype).requires_grad_()
    return head, hidden, torch.randint(VOCABULARY, (TOKENS,)), torch.rand(TOKENS) + 0.1


def plain(head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses (M,) in fp32 of whole logits."""
    bias = None if head.bias is None else head.bias.float()
    return functional.cross_entropy(
        functional.linear(hidden[0].float(), head.weight.float(), bias), targets, reduction="none"
    )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_equal_whole_logits(small_chunks: None, in_place: bool, bias: bool, frozen: bool) -> None:
    head, hidden, targets, scales = problem(bias)
    for parameter in head.parameters():
        parameter.requires_grad_(not frozen)
        parameter.grad = None if frozen else torch.ones_like(parameter)  # what an earlier micro-batch has left
    reference, reference_hidden = copy.deepcopy(head), hidden.detach().clone().requires_grad_()
    for mine, parameter in zip(reference.parameters(), head.parameters(), strict=True):
        mine.grad = None if frozen else parameter.grad.clone()
    expected = plain(reference, reference_hidden, targets)
    losses = head_losses(head, hidden, targets, scales, in_place)
    assert losses.shape == (1, TOKENS, 1) and losses.dtype == torch.float32
    torch.testing.assert_close(losses[0, :, 0], expected, rtol=1e-5, atol=0)
    (scales * expected).sum().backward()
    (scales * losses[0, :, 0]).sum().backward()
    torch.testing.assert_close(hidden.grad, reference_hidden.grad, rtol=1e-5, atol=1e-6)
    for mine, parameter in zip(head.parameters(), reference.parameters(), strict=True):
        assert (mine.grad is None) == frozen
        if not frozen:
            torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-5, atol=1e-6)


def test_a_common_factor_reaches_all_gradients(small_chunks: None) -> None:
    """DeepSpeed multiplies the loss by the number of processes."""
    head, hidden, targets, scales = problem(bias=True)
    inputs = [hidden, head.weight, head.bias]
    once = torch.autograd.grad((scales * plain(head, hidden, targets)).sum(), inputs)
    thrice = torch.autograd.grad(3 * (scales * head_losses(head, hidden, targets, scales)[0, :, 0]).sum(), inputs)
    for mine, expected in zip(thrice, once, strict=True):
        torch.testing.assert_close(mine, 3 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
def test_other_gradients_than_promised_are_refused(in_place: bool) -> None:
    head, hidden, targets, scales = problem(bias=False)
    losses = head_losses(head, hidden, targets, scales, in_place)[0, :, 0]
    with pytest.raises(AssertionError, match="not proportional to the scales"):
        losses.sum().backward()
    if in_place:
        with pytest.raises(AssertionError, match="was already added"):
            (2 * scales * head_losses(head, hidden, targets, scales, in_place)[0, :, 0]).sum().backward()


def test_losses_that_count_nothing_move_nothing() -> None:
    head, hidden, targets, scales = problem(bias=False)
    (0 * head_losses(head, hidden, targets, 0 * scales)).sum().backward()
    assert not hidden.grad.any() and not head.weight.grad.any()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("size", [1e-42, 1e-61])  # with few digits in float32, and none
def test_scales_next_to_nothing_are_no_mistake(size: float, in_place: bool) -> None:
    head, hidden, targets, scales = problem(bias=False)
    losses = head_losses(head, hidden, targets, size * scales.double(), in_place)[0, :, 0]
    ((size * scales.double()).to(losses.dtype) * losses).sum().backward()
    assert hidden.grad.abs().max() <= size and head.weight.grad.abs().max() <= 10 * size


@pytest.mark.parametrize("in_place", [False, True])
def test_bf16_weights_give_fp32_losses(small_chunks: None, in_place: bool) -> None:
    """Losses as exact as fp32's of the same numbers; gradients to bf16's rounding."""
    head, hidden, targets, scales = problem(bias=False, dtype=torch.bfloat16)
    expected = plain(head, hidden, targets)
    losses = head_losses(head, hidden, targets, scales, in_place)[0, :, 0]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad((scales * expected).sum(), [hidden, head.weight])
    (scales * losses).sum().backward()
    for mine, exact in zip((hidden.grad, head.weight.grad), gradients, strict=True):
        assert mine.dtype == torch.bfloat16 and (mine - exact).float().norm() < 0.02 * exact.float().norm()


@pytest.mark.parametrize("in_place", [False, True])
def test_autocast_keeps_fp32_gradients(small_chunks: None, in_place: bool) -> None:
    head, hidden, targets, scales = problem(bias=False)
    expected = plain(head, hidden, targets)
    (exact,) = torch.autograd.grad((scales * expected).sum(), [head.weight])
    with torch.autocast("cpu", torch.bfloat16):
        losses = head_losses(head, hidden, targets, scales, in_place)[0, :, 0]
    assert losses.dtype == torch.float32
    (scales * losses).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=2e-2)
    assert head.weight.grad.dtype == torch.float32 and (head.weight.grad - exact).norm() < 0.02 * exact.norm()


# ----------------------------------------------------------------------------------------------------------------------
# in a model


NUMBERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL = {"vocab_size": VOCABULARY} | NUMBERS
DRY = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
MODELS = {  # and whether the logits are what the head returns
    "gpt2": (lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **DRY), True),
    "llama": (lambda: transformers.LlamaConfig(**SMALL), True),
    "llama, tied": (lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True), True),
    "gpt_neox": (lambda: transformers.GPTNeoXConfig(**SMALL), True),
    "phi": (lambda: transformers.PhiConfig(**SMALL), True),  # its head has a bias
    "gemma2": (lambda: transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.3), False),
    "cohere": (lambda: transformers.CohereConfig(**SMALL, pad_token_id=0, logit_scale=0.06), False),
    "granite": (lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0), False),
}


def micro_batch() -> MicroBatch:
    torch.manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (4, 9))
    targets = torch.where(torch.rand(4, 9) < 0.5, tokens.roll(-1, 1), IGNORE)
    targets[3] = IGNORE  # a row that only fills up a share
    return MicroBatch(tokens, targets, torch.arange(4), torch.arange(4), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_each_architecture_gets_its_own_losses(
    name: str, in_place: bool, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the model's own logits, in chunks exactly where the model returns what its head does."""
    config, in_chunks = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config()).train()
    calls = watch(monkeypatch)
    batch, factors = micro_batch(), torch.tensor([0.5, 2.0, 1.0, 3.0])
    logits = model(input_ids=batch.input_ids).logits
    losses = functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none", ignore_index=IGNORE)
    expected = losses.sum(1) / (batch.targets != IGNORE).sum(1).clamp_min(1)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((factors * expected).sum(), parameters)
    found = sample_losses(model, batch, factors, in_place)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert len(calls) == in_chunks and model.training
    (factors * found).sum().backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(sample_losses(model, batch), expected, rtol=1e-5, atol=0)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each call of head_losses."""
    from bilevel.model import losses

    calls, original = [], losses.head_losses
    monkeypatch.setattr(losses, "head_losses", lambda *arguments: calls.append(1) or original(*arguments))
    return calls


def peak(make: Callable[[], torch.nn.Module], trained: bool) -> int:
    """The most bytes alive during a pass, beyond weights and their gradients."""
    model = make()
    batch = micro_batch()
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(trained)
        parameter.grad = torch.zeros_like(parameter) if trained else None
    sample_losses(model, batch, torch.ones(4), True)
    with LiveBytes() as live:
        live.ignore(model)
        live.ignore(torch.nn.ParameterList(p.grad for p in model.parameters() if p.grad is not None))
        sample_losses(model, batch, torch.ones(4), True).sum().backward()
    return live.peak


@pytest.mark.parametrize("trained", [False, True])
def test_memory_of_a_pass_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    """Twice the vocabulary takes nothing but its own weights and their gradients: no logits, no second gradient."""
    monkeypatch.setitem(head_module.CHUNK, "cpu", 4000)
    monkeypatch.setattr(head_module, "TILE", 100)

    def model(vocabulary: int) -> torch.nn.Module:
        shape = transformers.LlamaConfig(vocab_size=vocabulary, **NUMBERS)
        made = transformers.LlamaForCausalLM(shape)
        made.model.embed_tokens.weight.requires_grad_(False)
        return made

    small, large = (peak(lambda v=v: model(v), trained) for v in (1000, 2000))
    assert large == pytest.approx(small, rel=0.02)


def test_the_faster_head_counts_as_linear() -> None:
    assert head_module.is_linear(Linear(2, 3)) and not head_module.is_linear(torch.nn.Sequential())
