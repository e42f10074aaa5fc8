"""The project's hypergradient against the exact one, where the lower level can be solved exactly (tests/oracle.py)."""

import math

import numpy as np
import pytest
import torch
from oracle import (
    TRAIN,
    VALIDATION,
    Logistic,
    Problem,
    Ridge,
    coefficients,
    hypergradient,
    make_weights,
    relative_error,
    solve,
    upper,
)

from bilevel.data.stream import BatchStream
from bilevel.model.torch_copy import TorchCopy
from bilevel.step.f2sa import penalty_step
from bilevel.weights.learned import SampleWeights, SourceWeights

KINDS = ("source", "sigmoid", "softmax")
NUS = [*np.logspace(-4, -1.5, 3), 1e-3]  # two and a half decades


def solutions(problem: Problem, c: torch.Tensor, nu: float, order: int) -> dict[str, torch.Tensor]:
    """Where u and w descend to at coefficients c."""
    return {"u": solve(problem, c, 0.0 if order == 1 else -nu), "w": solve(problem, c, nu)}


def by_autograd(kind: str, weights: SourceWeights | SampleWeights, gaps: torch.Tensor) -> torch.Tensor:
    """1/nu (d/dx g(x, w) - d/dx g(x, u)), half of it with order 2, from the gaps of all samples."""
    x = weights.x.double().clone().requires_grad_()
    (coefficients(kind, x) * gaps).mean().backward()
    return weights.factor * x.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Ridge, Logistic])
def test_finite_differences_of_the_solved_upper_objective_agree_with_the_exact_hypergradient(make, kind: str):
    problem, x = make(), make_weights(kind, 1.0).x.double()
    gradient = hypergradient(problem, kind, x)
    step = 1e-5 * torch.randn(len(x), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    difference = (upper(problem, kind, x + step) - upper(problem, kind, x - step)) / 2
    assert float(difference) == pytest.approx(float(gradient @ step), rel=1e-7)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Ridge, Logistic])
def test_the_error_of_the_hypergradient_falls_like_nu_to_the_order(make, kind: str, order: int):
    """The project's losses, coefficients and x-gradient at the exact w and u, over the whole data."""
    problem, errors = make(), []
    true = hypergradient(problem, kind, make_weights(kind, 1.0).x)
    for nu in NUS:
        x = make_weights(kind, nu, order)
        c = x.coefficients(TRAIN)
        torch.testing.assert_close(c, coefficients(kind, x.x.double()), rtol=1e-14, atol=0)
        copies = {name: problem.copy(y) for name, y in solutions(problem, c, nu, order).items()}
        batches = problem.batch(TRAIN), problem.batch(VALIDATION)
        result = penalty_step(
            **copies, weights=x, train=batches[0], validation=batches[1], nu=nu, lr_y=0, seed=0, order=order
        )
        assert max(result.grad_norm_u, result.grad_norm_w) < 1e-13, "what the step descends is what was solved"
        gradient = x.gradient()[1]
        torch.testing.assert_close(gradient, by_autograd(kind, x, result.gaps), rtol=1e-8, atol=1e-12)
        errors.append(relative_error(gradient, true))
    slope = np.polyfit(np.log(NUS[:-1]), np.log(errors[:-1]), 1)[0]
    assert abs(slope - order) <= {1: 0.1, 2: 0.15}[order], (slope, errors)
    assert errors[-1] < {1: 1e-2, 2: 1e-5}[order], errors


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def train(
    problem: Problem, nu: float, order: int, steps: int, lr_y, sgd: bool, sizes: tuple[int, int] = (30, 16)
) -> tuple[dict[str, TorchCopy], SampleWeights]:
    """u and w after so many steps from 0 while x rests, and x, which has seen the last step's gaps.

    lr_y: from the step to its size. sizes: of the batches of training and of validation samples.
    """
    copies = {name: problem.copy(torch.zeros(problem.size, dtype=torch.float64)) for name in "uw"}
    for copy in copies.values() if sgd else ():
        copy.optimizer = torch.optim.SGD(copy.model.parameters())
    x = make_weights("sigmoid", nu, order)
    streams = BatchStream(len(TRAIN), sizes[0], 0), BatchStream(len(VALIDATION), sizes[1], 1)
    for step in range(steps):
        train, trusted = (
            problem.batch(part[next(stream)], 30) for part, stream in zip((TRAIN, VALIDATION), streams, strict=True)
        )
        x.clear()
        penalty_step(**copies, weights=x, train=train, validation=trusted, nu=nu, lr_y=lr_y(step), seed=step,
                     order=order)  # fmt: skip
    return copies, x


def distance(problem: Problem, copies: dict[str, TorchCopy], c: torch.Tensor, nu: float, order: int) -> float:
    """Of u or w, the larger, from where it descends to, relative to the distance between those two ends."""
    ends = solutions(problem, c, nu, order)
    between = (ends["w"] - ends["u"]).norm()
    flat = {name: next(copy.model.parameters()).detach().flatten() for name, copy in copies.items()}
    return max(float((flat[name] - end).norm() / between) for name, end in ends.items())


WAYS = {"sgd-Ridge": (Ridge, True), "sgd-Logistic": (Logistic, True), "adamw-Ridge": (Ridge, False)}
SLOW_WAY = pytest.param(Logistic, False, id="adamw-Logistic", marks=pytest.mark.slow)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("make", "sgd"), [*(pytest.param(*way, id=name) for name, way in WAYS.items()), SLOW_WAY])
def test_the_loop_over_the_whole_data_reaches_the_solutions(make, order: int, sgd: bool):
    problem, nu, steps = make(), 0.05, 45 if sgd else 150
    lr_y = (lambda step: 0.6) if sgd else (lambda step: 0.1 * math.cos(math.pi / 2 * step / steps) ** 2)
    copies, x = train(problem, nu, order, steps, lr_y, sgd)
    assert distance(problem, copies, x.coefficients(TRAIN), nu, order) < (1e-6 if sgd else 1e-2)
    assert relative_error(x.gradient()[1], hypergradient(problem, "sigmoid", x.x)) < {1: 0.1, 2: 0.01}[order]


@pytest.mark.parametrize("order", [1, 2])
def test_small_batches_with_falling_steps_come_near_the_solutions(order: int):
    """SGD on batches of 6 and 4: an unbiased estimate of each objective, so steps like 1/t go where they must."""
    problem, nu = Logistic(), 0.05
    copies, x = train(problem, nu, order, 120, lambda step: 3 / (step + 5), True, sizes=(6, 4))
    assert distance(problem, copies, x.coefficients(TRAIN), nu, order) < 0.05
