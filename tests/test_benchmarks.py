"""What the benchmarks count: operations against a hand count, samples against the lengths they say they have; and the
exact hypergradient of data hyper-cleaning, against finite differences and the project's penalty step."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bilevel.step.f2sa import penalty_step
from bilevel.weights.learned import SampleWeights
from tests.benchmarks import hyper_cleaning
from tests.benchmarks.operations import counted, least_pass, sizes
from tests.benchmarks.peers import Ours, PlainTrainer, Round, Work
from tests.benchmarks.samples import alpaca_lengths, random_samples
from tests.image_problem import (
    LinearCopy,
    Problem,
    batch,
    coefficients,
    hypergradient,
    make_problem,
    read_images,
    solve,
    write_blobs,
)

GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 512, "n_embd": 32, "n_layer": 3, "n_head": 2}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def one_layer(shape: dict) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(**shape | {"num_hidden_layers": 1})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize(
    ("shape", "matrices"),
    # Query, key and value, output, up, down; queries, keys and values of half as many heads, output, gate, up, down.
    [(GPT2, 3 * 32 * 32 + 32 * 32 + 2 * 4 * 32 * 32), (LLAMA, 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)],
)
def test_the_counter_agrees_with_a_hand_count_of_one_layer(shape: dict, matrices: int) -> None:
    """t inputs, width d, vocabulary V: two operations for each number of a matrix and input, and for attention scores
    t^2 d and their product with the values t^2 d; backward twice as many."""
    t, d, vocabulary = 11, 32, 300
    model = one_layer(shape)
    with counted() as counter:
        loss = model(input_ids=torch.ones(1, t, dtype=torch.long)).logits.sum()
    forward = 2 * (matrices * t + 2 * t * t * d + vocabulary * d * t)
    assert counter.get_total_flops() == forward
    with counted() as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * forward
    assert least_pass(model, np.array([[t, t]])) == 3 * forward


@pytest.mark.parametrize("shape", [GPT2, LLAMA])
@pytest.mark.parametrize("lisa_layers", [None, 2])
def test_a_step_without_padding_takes_the_fewest_operations(shape: dict, lisa_layers: int | None) -> None:
    """Samples of one length, so that nothing is padded: the count is the formula's."""
    samples = [random_samples(names, np.full((8, 2), (5, 9)), 300, seed=0) for names in (["a", "b"], ["v"])]
    work = Work(shape, *samples, [Round(torch.arange(8), torch.arange(6))], attention="eager")
    peer = Ours(work, "source", lisa_layers)
    with counted() as counter:
        peer.step()
    train, validation = (
        sizes(part, ids) for part, ids in zip(samples, dataclasses.astuple(work.rounds[0]), strict=True)
    )
    assert (train == [13, 9]).all() and len(validation) == 6
    model = peer.models["w"]
    fewest = 2 * least_pass(model, train, lisa_layers) + least_pass(model, validation, lisa_layers)
    # Beside it the model looks once at what becomes of its logits, on one token.
    assert fewest <= counter.get_total_flops() < 1.01 * fewest


@pytest.mark.slow
def test_a_step_of_alpaca_s_lengths_is_near_the_fewest_operations() -> None:
    """Of the issue: within 10 per cent, padding and all."""
    lengths = np.minimum(alpaca_lengths(), (200, 300))
    samples = [random_samples([name], lengths, 300, seed=0) for name in "tv"]
    shape = LLAMA | {"num_hidden_layers": 1}
    draws = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    work = Work(shape, *samples, [Round(draws[:64], draws[64:128])], attention="eager")
    peer = Ours(work, "sample")
    with counted() as counter:
        peer.step()
    train, validation = (
        sizes(part, ids) for part, ids in zip(samples, dataclasses.astuple(work.rounds[0]), strict=True)
    )
    fewest = 2 * least_pass(peer.models["w"], train) + least_pass(peer.models["w"], validation)
    assert counter.get_total_flops() < 1.1 * fewest


@pytest.mark.parametrize("grouped", [False, True])
def test_trainer_takes_a_step_for_each_round(grouped: bool) -> None:
    samples = random_samples(["a"], np.full((128, 2), (3, 4)), 300, seed=0)
    work = Work(GPT2, samples, samples, [Round(torch.arange(64), torch.arange(64))] * 3)
    trainer, steps = PlainTrainer(work, grouped), []
    trainer.run(lambda: steps.append(trainer.trainer.state.global_step))
    assert steps == [1, 2, 3]


def test_the_lengths_are_alpaca_s() -> None:
    lengths = alpaca_lengths()
    assert lengths.shape == (1000, 2) and lengths.min() >= 1 and lengths.sum(1).max() == 512
    assert lengths.sum(1).mean() == pytest.approx(97.2, abs=0.1) and lengths[:, 1].mean() == pytest.approx(
        66.3, abs=0.1
    )


# ----------------------------------------------------------------------------------------------------------------------
# data hyper-cleaning


Cleaning = tuple[Problem, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def cleaning(tmp_path_factory: pytest.TempPathFactory) -> Cleaning:
    """40 images of 3 classes, half with a random label, in float64; x where weights differ, d/dx f(y*(x)), and y*."""
    (features, labels), _ = read_images(write_blobs(tmp_path_factory.mktemp("blobs")))
    problem = make_problem(features.double(), labels, 40, noise=0.5, seed=0)
    x = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()  # of float32, as SampleWeights keeps it
    start = problem.start()
    return problem, x, *hypergradient(problem, x, start, torch.zeros_like(start), tolerance=1e-10)[:2]


def test_the_cleaning_s_hypergradient_agrees_with_finite_differences(cleaning: Cleaning) -> None:
    problem, x, gradient, y = cleaning
    step = 1e-4 * torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    up, down = (problem.upper(solve(problem, coefficients(x + s), y, 1e-10)) for s in (step, -step))
    assert float(up - down) / 2 == pytest.approx(float(gradient @ step), rel=1e-5)


def test_the_penalty_step_moves_x_down_the_cleaning_s_hypergradient(cleaning: Cleaning) -> None:
    """With u and w at their minima, where stochastic steps only come near."""
    problem, x, gradient, y = cleaning
    nu = 1e-3
    weights = SampleWeights(problem.n, None, "sigmoid", 1 / nu, "sgd")
    weights.x = x.float()
    weights.refresh()
    u, w = (LinearCopy(problem, best) for best in (y, solve(problem, coefficients(x), y, 1e-10, nu)))
    ids = torch.arange(len(problem.labels))
    penalty_step(u, w, weights, batch(ids[: problem.n]), batch(ids[problem.n :]), nu, lr_y=0.0, seed=0)
    weights.step(100.0)
    moved = weights.x.double() - x
    assert torch.cosine_similarity(moved, -gradient, dim=0) > 0.9
    assert float(moved.norm()) == pytest.approx(100 * float(gradient.norm()), rel=0.2)


def test_the_cleaning_without_its_images_says_what_to_install(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["hyper_cleaning", "--data", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stopped:
        hyper_cleaning.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "apt-get install dataset-fashion-mnist" in said and "--data FOLDER" in said
