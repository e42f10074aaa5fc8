"""bilevel/monitor/rounding_guard.py and the fp32 head: what is left of the gaps under bf16, against fp32 on the same
weights."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from run_helpers import TINY, settings, train
from tokenizer_kinds import tokenizer_of

import train_bilevel
from bilevel.data.samples import Samples, load_samples
from bilevel.data.sources import file_source
from bilevel.data.stream import BatchStream
from bilevel.data.tokenise import Tokeniser
from bilevel.model.losses import wide_linear
from bilevel.model.torch_copy import TorchCopy
from bilevel.monitor import rounding_guard as rounding
from bilevel.monitor.rounding_guard import gap_signal, last_place, rounding_noise
from bilevel.processes import ALONE
from bilevel.step.f2sa import penalty_step
from bilevel.weights.learned import SourceWeights

TOKENS = 16384


@pytest.fixture
def early_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks at steps 2, 4 and 8, and an end from 4 on, instead of 16, 32 and 64."""
    monkeypatch.setattr(rounding, "FIRST", 2)
    monkeypatch.setattr(rounding, "PATIENCE", 4)


@pytest.fixture(scope="module")
def parts(data: Path) -> dict[str, Samples]:
    tokeniser = Tokeniser(tokenizer_of("gpt2"), 100, "response")
    files = {"train": sorted(data.glob("train_*.json")), "val": [data / "val.json"]}
    return {name: load_samples(list(map(file_source, paths)), tokeniser) for name, paths in files.items()}


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {key: value for key, value in TINY.items() if key != "model_type"} | {"vocab_size": 512}
    return transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**shape)).eval()


def two_copies(parts: dict[str, Samples], lr_y: float, alpha: float, steps: int) -> dict[str, TorchCopy]:
    """u and w after some steps at fixed weights of the sources; in fp32, as bf16 is slow on a CPU."""
    copies = {name: TorchCopy(make_model()) for name in "uw"}
    x = SourceWeights(parts["train"].source_ids, torch.tensor([0.5, 0.5]), alpha, "adam")
    streams = BatchStream(len(parts["train"]), 8, 0), BatchStream(len(parts["val"]), 8, 1)
    for step in range(steps):
        batches = (
            samples.batch(next(stream), TOKENS, ALONE) for samples, stream in zip(parts.values(), streams, strict=True)
        )
        penalty_step(copies["u"], copies["w"], x, *batches, 1 / alpha, lr_y, step)
    return copies


@torch.no_grad()
def gaps(copies: dict[str, TorchCopy], samples: Samples, bf16: bool) -> torch.Tensor:
    """l_i(w) - l_i(u) of all samples, the forward passes in bf16 or not, of the same weights."""
    batch = samples.batch(samples.all_ids, TOKENS, ALONE)
    losses = {}
    for name, trained in copies.items():
        same = TorchCopy(trained.model, bf16=bf16)
        losses[name] = batch.collect([same.losses(micro, 0) for micro in batch.micro_batches], ALONE)
    return losses["w"] - losses["u"]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize(("lr_y", "alpha", "steps"), [(1e-5, 10, 100), (1e-4, 10, 60), (1e-3, 10, 30), (1e-4, 1, 30)])
def test_in_the_safe_region_the_gaps_are_those_of_fp32(parts: dict[str, Samples], lr_y, alpha, steps):
    copies = two_copies(parts, lr_y, alpha, steps)
    batch = parts["train"].batch(parts["train"].all_ids, TOKENS, ALONE)
    found = gaps(copies, parts["train"], bf16=True)
    signal = gap_signal(found, rounding_noise(TorchCopy(copies["u"].model, bf16=True), batch, 0))
    assert correlation(found, gaps(copies, parts["train"], bf16=False)) >= 0.9
    assert signal >= 0.9


@pytest.mark.parametrize(("lr_y", "alpha"), [pytest.param(1e-7, 100, marks=pytest.mark.slow), (1e-6, 1000)])
def test_where_the_gaps_are_lost_the_signal_says_so(parts: dict[str, Samples], lr_y, alpha):
    copies = two_copies(parts, lr_y, alpha, 8)
    batch = parts["train"].batch(parts["train"].all_ids, TOKENS, ALONE)
    found = gaps(copies, parts["train"], bf16=True)
    assert abs(correlation(found, gaps(copies, parts["train"], bf16=False))) < 0.3
    assert gap_signal(found, rounding_noise(TorchCopy(copies["u"].model, bf16=True), batch, 0)) < 0.3


def test_the_signal_of_known_noise():
    generator = torch.Generator().manual_seed(0)
    exact, added, other = torch.randn(3, 20_000, generator=generator, dtype=torch.float64)
    for size in (0.1, 0.5, 1.0):  # of the noise of one loss of the two whose difference a gap is
        found = exact + size * added * 2**0.5
        assert gap_signal(found, size * other * 2**0.5) == pytest.approx(correlation(found, exact), abs=0.02)
    assert gap_signal(torch.zeros(8), torch.ones(8)) == 0


def test_measuring_changes_nothing_and_finds_none_in_fp32(parts: dict[str, Samples]):
    model = make_model()
    before, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    batch = parts["train"].batch(torch.arange(8), TOKENS, ALONE)
    assert rounding_noise(TorchCopy(model, bf16=True), batch, 0).abs().min() > 0
    assert not rounding_noise(TorchCopy(model), batch, 0).any()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_the_last_place_is_the_distance_to_the_next_number():
    values = torch.tensor([1.0, 1.5, -3.0, 100.0, 0.0078, -1e-20]).bfloat16()
    further = (values.view(torch.int16) + 1).view(torch.bfloat16)
    torch.testing.assert_close(last_place(values), (further.float() - values.float()).abs(), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_wide_logits_are_the_products_of_bf16_numbers_unrounded(bias: bool, autocast: bool):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(64, 300, bias=bias), torch.randn(1, 20, 64)
    rounded = copy.deepcopy(head).bfloat16()
    mine = head if autocast else rounded
    exact = hidden.bfloat16().double() @ rounded.weight.double().t() + (mine.bias.double() if bias else 0)
    hidden = (hidden if autocast else hidden.bfloat16()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = wide_linear(mine, hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.detach().double(), exact.detach(), rtol=1e-5, atol=1e-5)

    direction = torch.randn(1, 20, 300)
    logits.backward(direction)
    wanted = (direction.bfloat16().double() @ rounded.weight.double()).detach()
    torch.testing.assert_close(hidden.grad.double(), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
    wanted = direction[0].bfloat16().double().t() @ hidden[0].detach().bfloat16().double()
    torch.testing.assert_close(mine.weight.grad.double(), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


LOST = {"dtype": "bf16", "lr_y": 1e-7, "alpha": 1000, "warmup_ratio": 0, "test_data": []}


@pytest.mark.slow
@pytest.mark.usefixtures("early_checks")
def test_a_run_that_rounding_makes_hopeless_ends_with_the_reason(data: Path, tmp_path: Path, capsys):
    assert train_bilevel.main(settings(data, tmp_path / "r", max_steps=6, **LOST)) == 1
    said = capsys.readouterr().out
    assert "step 2: rounding to bf16 hides" in said and "step 4: rounding to bf16 hides what moves x" in said
    assert "Raise lr_y (1e-07), lower alpha (1000)" in said and not (tmp_path / "r" / "model").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("early_checks")
def test_it_goes_on_when_told_to(data: Path, tmp_path: Path, capsys):
    metrics = train(data, tmp_path / "r", max_steps=4, rounding_guard="warn", **LOST)
    assert metrics["gap_signal"].dropna().index.tolist() == [2, 4] and metrics["gap_signal"].max() < 0.3
    assert capsys.readouterr().out.count("rounding to bf16 hides what moves x") == 2


@pytest.mark.slow
def test_no_word_while_x_waits_and_none_when_all_is_well(data: Path, tmp_path: Path, monkeypatch, capsys):
    """Checks at steps 4 and 8, and an end from 8 on: at step 2 the copies have hardly parted."""
    monkeypatch.setattr(rounding, "FIRST", 4)
    monkeypatch.setattr(rounding, "PATIENCE", 8)
    train(data, tmp_path / "waits", max_steps=10, x_warmup_steps=9, **LOST)
    metrics = train(data, tmp_path / "well", max_steps=10, dtype="bf16", lr_y=3e-3, alpha=1, micro_batch_tokens=2048)
    assert metrics["gap_signal"].dropna().min() > 0.9
    assert "rounding" not in capsys.readouterr().out


def test_an_fp32_run_is_not_measured(data: Path, tmp_path: Path):
    assert "gap_signal" not in train(data, tmp_path / "r", max_steps=2)
