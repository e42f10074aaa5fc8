"""bilevel/settings/optimizers.py: the table of rules that move x, and what a new rule needs."""

import math
from typing import get_args

import pytest
import torch

from bilevel.settings.fields import FIELDS
from bilevel.settings.optimizers import OPTIMIZERS, Optimizer
from bilevel.weights.base_optimizer import XOptimizer
from bilevel.weights.learned import SampleWeights, SourceWeights

SOURCES = torch.tensor([0, 0, 1, 1, 2, 2])


def test_the_setting_offers_the_rules_of_the_table():
    words, _ = get_args(FIELDS["x_optimizer"].annotation)  # or None
    assert set(OPTIMIZERS) == set(get_args(words))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rule_goes_on_from_its_state(name: str):
    """The state of each is its own: m, v and count under Adam, nothing under SGD and mirror descent."""
    gaps, weights = torch.tensor([0.3, 0.1, -0.2, 0.5, 0.0, -1.0]), []
    for _ in range(2):
        weights.append(SourceWeights(SOURCES, torch.full((3,), 1 / 3), 2.0, name))
    for each in weights[:1] * 2:
        each.accumulate(torch.arange(6), gaps)
        each.step(0.1)
    state = weights[0].optimizer.state_dict()
    own = {"adam": {"m", "v", "count"}, "auto": {"sum_hd", "sum_h", "integral", "peak"}}
    assert set(state) == own.get(name, set())
    weights[1].load_state_dict(weights[0].state_dict())
    for each in weights:
        each.accumulate(torch.arange(6), gaps)
        each.step(0.1)
    assert torch.equal(weights[0].x, weights[1].x)


def test_how_far_a_rule_can_carry_x():
    """Adam by the sum of the learning rates; by how much the others do is for the gradients to say."""
    rates = [0.1, 0.2, 0.3]
    assert OPTIMIZERS["adam"].kind(per_sample=True)(1).reach(rates) == pytest.approx(0.6)
    for name in ("sgd", "mirror"):
        assert OPTIMIZERS[name].kind(per_sample=True)(1).reach(rates) == math.inf


class SumOfGaps(XOptimizer):
    """A rule without a learning rate: x falls by all gaps that an entry has ever had."""

    def __init__(self, n: int):
        self.total, self.told = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)

    def observe(self, weights, entries: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor) -> None:
        assert len(weights.x) == len(self.total)
        self.total.index_add_(0, entries, counts * gaps)

    def update(self, weights, index: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
        change = self.told[index] - self.total[index]
        self.told[index] = self.total[index]
        return change

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"total": self.total, "told": self.told}


@pytest.mark.parametrize("kind", ["source", "sample"])
def test_a_new_rule_is_one_class_and_one_row(monkeypatch: pytest.MonkeyPatch, kind: str):
    """Also one that looks at every model step, even when x does not move; and it resumes."""
    monkeypatch.setitem(OPTIMIZERS, "sum", Optimizer(f"{__name__}:SumOfGaps"))
    gaps = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    ids = torch.tensor([0, 2, 5])  # of source 0, 1 and 2

    def new() -> SourceWeights | SampleWeights:
        if kind == "source":
            return SourceWeights(SOURCES, torch.full((3,), 1 / 3), 2.0, "sum")
        return SampleWeights(6, None, "sigmoid", 2.0, "sum")

    weights = new()
    start, entries = weights.x.clone(), torch.arange(3) if kind == "source" else ids
    weights.accumulate(ids, gaps)
    weights.clear()  # as while x waits
    weights.accumulate(ids, gaps, torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64))
    again = new()
    again.load_state_dict(weights.state_dict())
    for each in (weights, again):
        each.step(lr=0.0)
        moved = (each.x - start)[entries]
        torch.testing.assert_close(moved.double(), -torch.tensor([2.0, -3.0, 4.0], dtype=torch.float64))
