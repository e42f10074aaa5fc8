"""Packed rows have the losses and gradients of padded ones, or are refused with the reason."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, GPT2, LLAMA
from test_adapters import no_data, shared, trained, weights_of  # noqa: F401, no_data is a fixture
from test_lora import Tokens
from torch.nn import functional

from bilevel.data.batches import Batch, make_micro_batches
from bilevel.data.tokenise import IGNORE
from bilevel.errors import UserError
from bilevel.model import packed_attention
from bilevel.model.copies import make_copies
from bilevel.model.losses import sample_losses
from bilevel.model.packed_attention import NAME, attention, why_no_varlen
from bilevel.model.packing import check_rows_stay_apart, why_padded
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import ALONE, HOST, World
from bilevel.settings.fields import Settings
from bilevel.step.f2sa import penalty_step
from bilevel.step.result import StepResult

SHAPES: dict[str, dict[str, Any]] = {"gpt2": GPT2, "llama": LLAMA | {"num_key_value_heads": 1}} | FAMILIES
PACKED = ["gpt2", "llama", "opt", "mixtral", "qwen2_moe", "qwen3_moe"]
LENGTHS = [9, 4, 12, 2, 7]
VOCABULARY = 50


def settings(**changes: Any) -> Settings:
    given = {"train_data": ["a"], "val_data": ["b"], "model_config": {"model_type": "llama"} | LLAMA, "max_length": 16}
    return Settings(**given | {"packing": True} | changes)


def config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if family == "gpt2" else {}
    shape = {key: value for key, value in SHAPES.get(family, LLAMA).items() if key != "model_type"}
    return transformers.AutoConfig.for_model(family, **shape | drops | changes)


def model(family: str, **changes: Any) -> torch.nn.Module:
    """A small model without dropout, initialised widely enough that rows differ and attention counts."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def rows(seed: int = 0) -> dict[str, list[list[int]]]:
    random = np.random.default_rng(seed)
    ids = [random.integers(1, VOCABULARY, n + 1).tolist() for n in LENGTHS]
    return {"input_ids": ids, "labels": [[IGNORE] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]}


def batch(packed: bool, budget: int, seed: int = 0, world: World = ALONE) -> Batch:
    ids, ones = torch.arange(len(LENGTHS)), torch.ones(len(LENGTHS), dtype=torch.float64)
    micro_batches = make_micro_batches(rows(seed), ids, ones, budget, world, packed=packed)
    return Batch(ids, micro_batches, ones, len(ids), rows(seed))


def losses_and_gradient(made: torch.nn.Module, of: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """l_i (n,) in the batch's order, and the gradient of a weighted sum of them over all parameters."""
    found = of.collect(each := [sample_losses(made, micro) for micro in of.micro_batches], ALONE)
    weights = torch.linspace(0.5, 2, len(LENGTHS))
    total = sum((weights[micro.places] * loss).sum() for micro, loss in zip(of.micro_batches, each, strict=True))
    gradients = torch.autograd.grad(total, list(made.parameters()), allow_unused=True)
    return found, torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.mark.parametrize("family", PACKED)
def test_losses_and_gradients_are_those_of_padded_rows(family: str) -> None:
    padded = model(family)
    packed = copy.deepcopy(padded)
    packed.set_attn_implementation(NAME)
    expected, gradient = losses_and_gradient(padded, batch(packed=False, budget=1))
    assert expected.std() > 0.01
    for budget in (15, 1000):
        found, same = losses_and_gradient(packed, batch(packed=True, budget=budget))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        assert (same - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("family", PACKED)
def test_logits_are_those_under_a_block_diagonal_mask(family: str) -> None:
    """A mask (1, 1, T, T) under sdpa, which lets a token see earlier ones of its own row, and nothing else."""
    masked = model(family)
    packed = copy.deepcopy(masked)
    packed.set_attn_implementation(NAME)
    [micro] = batch(packed=True, budget=1000).micro_batches
    row = torch.arange(len(LENGTHS)).repeat_interleave(micro.lengths)
    mask = torch.block_diag(*(torch.ones(n, n) for n in micro.lengths.tolist())).tril().bool()
    assert torch.equal(mask, (row[:, None] == row).tril())
    given = {"input_ids": micro.input_ids, "position_ids": micro.bounds.position_ids}
    logits = masked(**given, attention_mask=mask[None, None], use_cache=False).logits[0]
    at = micro.supervised
    expected = functional.cross_entropy(logits[at.positions], at.targets, reduction="none")
    expected = torch.stack([losses.mean() for losses in expected.split(at.sizes.tolist())])
    torch.testing.assert_close(sample_losses(packed, micro), expected, rtol=1e-5, atol=0)


def test_padded_rows_are_as_before_in_a_model_for_packed_ones() -> None:
    """Evaluations take them."""
    plain = model("llama")
    other = copy.deepcopy(plain)
    other.set_attn_implementation(NAME)
    for micro in batch(packed=False, budget=30).micro_batches:
        assert torch.equal(sample_losses(plain, micro), sample_losses(other, micro))


# ----------------------------------------------------------------------------------------------------------------------
# steps


def steps(packed: bool, number: int = 2, **changes: Any) -> tuple[list[StepResult], torch.Tensor]:
    """Steps of u and w of a run with these settings, and w's parameters after them."""
    s = settings(packing=packed, lr_y=1e-3, **changes)
    copies, lisa = make_copies(s, ALONE, transformers.AutoConfig.for_model(**s.model_config), Tokens())
    assert copies["w"].packed == packed
    x, found = weights_of(per_sample=True), []
    for step in range(number):
        if lisa:
            lisa.switch(step, copies)
        train, validation = (batch(packed, 24, seed) for seed in (step, 100 + step))
        found.append(penalty_step(copies["u"], copies["w"], x, train, validation, 2.0, 1e-3, 1000 * step))
    return found, torch.cat([p.detach().flatten() for p in copies["w"].model.parameters()])


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True}, {"lisa_layers": 1, "lisa_interval": 1}],
    ids=["plain", "checkpointing", "LISA"],
)
@pytest.mark.usefixtures("no_data")
def test_steps_are_those_of_padded_rows(changes: dict) -> None:
    (ours, here), (theirs, there) = (steps(packed, **changes) for packed in (True, False))
    assert not ours[0].gaps.any() and ours[1].gaps.any()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(one.gaps, other.gaps, rtol=1e-3, atol=1e-6)
        assert one.tokens <= other.tokens
    assert (here - there).norm() < 1e-5 * there.norm()


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3_moe"))]
)
@pytest.mark.usefixtures("no_data")
def test_adapters_share_a_packed_pass(family: str) -> None:
    """Also when layers are computed again in the backward pass."""
    found = {}
    for rows_packed in (True, False):
        copies = shared(family, packing=rows_packed, gradient_checkpointing=rows_packed)
        assert all(each.one_pass for each in copies.values())
        x = weights_of(per_sample=True)
        found[rows_packed] = trained(copies, x, steps=2, packed=rows_packed), x.x
    for ours, theirs in zip(*(each for each, _ in found.values()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# what cannot be packed


def reason(family: str, shape: dict | None = None, device: str = "cpu", dtype: str = "fp32", **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        why_padded(settings(**changes), config(family, **shape or {}), torch.device(device), dtype)
    assert str(caught.value).endswith("leave packing out, and rows are padded")
    return str(caught.value)


def test_every_family_is_packed_or_says_why() -> None:
    for family in SHAPES:
        if family in PACKED:
            assert why_padded(settings(), config(family), HOST, "fp32") is None
        else:
            assert f"{family} models do not let another attention take the place" in reason(family)


def test_reasons() -> None:
    assert "soft cap" in reason("gemma2") and "soft cap" in reason("gpt_oss")
    assert "besides attention" in reason("lfm2", {"layer_types": ["conv", "full_attention"]})
    assert "sliding window of 8 tokens is shorter than max_length 16" in reason("mistral", {"sliding_window": 8})
    assert why_padded(settings(), config("mistral", sliding_window=16), HOST, "fp32") is None
    assert "dropout" in reason("gpt2", {"resid_pdrop": 0.1}, dropout=None)
    assert why_padded(settings(), config("gpt2", resid_pdrop=0.1), HOST, "fp32") is None  # the setting turns it off
    assert "attn_implementation=eager" in reason("llama", attn_implementation="eager")
    assert "needs dtype=bf16" in reason("llama", device="cuda")
    assert "heads are 512 wide" in reason("llama", {"head_dim": 512}, device="cuda", dtype="bf16")
    assert "method=align" in reason("llama", device="cuda", dtype="bf16", method="align")


def test_without_the_setting_a_cpu_pads_and_a_gpu_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.model.packing.why_no_varlen", lambda device, width: None)
    auto, gpu = settings(packing=None), torch.device("cuda")
    assert "packing=true only" in why_padded(auto, config("llama"), HOST, "bf16")
    assert why_padded(auto, config("llama"), gpu, "bf16") is None
    assert "needs dtype=bf16" in why_padded(auto, config("llama"), gpu, "fp32")
    assert why_padded(settings(packing=False), config("llama"), gpu, "bf16") == "packing=false"


def test_what_the_kernel_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match="this model's attention has softcap; use packing=false"):
        attention(None, *torch.zeros(3, 1, 1, 2, 4), None, cu_seq_lens_q=torch.tensor([0, 2]), softcap=3.0)


def test_a_model_that_mixes_rows_is_found() -> None:
    """Its attention gets no bounds: the rows are one to it."""
    apart, mixing = TorchCopy(model("llama")), TorchCopy(model("llama"))
    apart.model.set_attn_implementation(NAME)
    check_rows_stay_apart(apart)
    with pytest.raises(UserError, match="depend on another row"):
        check_rows_stay_apart(mixing)


def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """varlen_attn, which a CPU lacks, by an attention of each row."""
    assert query.shape[-1] % 8 == 0 and key.shape == value.shape and enable_gqa == (query.shape[1] > key.shape[1])
    assert max_q == max_k == cu_seq_q.diff().max() and window_size == (-1, 0) and cu_seq_q is cu_seq_k
    rows = [slice(start, end) for start, end in itertools.pairwise(cu_seq_q.tolist())]
    parts = [[tensor[None, row].transpose(1, 2) for tensor in (query, key, value)] for row in rows]
    found = [
        functional.scaled_dot_product_attention(*part, scale=scale, is_causal=True, enable_gqa=True) for part in parts
    ]
    return torch.cat(found, 2)[0].transpose(0, 1)


def test_what_varlen_attn_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the GPU's kernel: rows, heads and widths as it wants them, and the answer of a CPU."""

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 12, width, generator=generator) for heads, width in ((4, 12), (2, 12), (2, 10))
    )
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    found = packed_attention._varlen(query, key, value, None, bounds, 7)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    wanted, _ = attention(module, query, key, value, None, cu_seq_lens_q=bounds, max_length_q=7)
    assert found.shape == (1, 12, 4, 10)
    torch.testing.assert_close(found, wanted)


def test_the_trial_of_varlen_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "varlen_attn fails here" in why_no_varlen(HOST, 16)  # a CPU has no kernel
    assert why_no_varlen(HOST, 264) == "the model's heads are 264 wide, and flash attention takes 256"
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    assert why_no_varlen(HOST, 16) is None

    def mixing(query, key, value, bounds, *others, scale, window_size, enable_gqa):
        return stand_in(query, key, value, whole := torch.tensor([0, 8]), whole, 8, 8, scale=scale,
                        window_size=window_size, enable_gqa=enable_gqa)  # fmt: skip

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", mixing)
    assert "gives other results" in why_no_varlen(HOST, 16)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value, is_causal: query)
    assert "lacks enable_gqa, scale, window_size" in why_no_varlen(HOST, 16)
