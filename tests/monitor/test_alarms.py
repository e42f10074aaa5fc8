"""bilevel/monitor/alarms.py: what a person would notice while a run is on its way."""

import math

import pytest
import torch
from run_helpers import TINY

from bilevel.monitor.alarms import WINDOW, Watch
from bilevel.settings.fields import Settings
from bilevel.step.result import StepResult
from bilevel.step.schedule import schedule as factor
from bilevel.weights.learned import SampleWeights, SourceWeights

pytestmark = pytest.mark.usefixtures("no_old_log")


def watch(x: SourceWeights | SampleWeights, steps: int = 100, **changes) -> Watch:
    sources = [f"s{i}" for i in range(len(x.x))]
    changes = {"x_optimizer": "adam"} | changes
    return Watch(Settings(train_data=["a"], val_data=["b"], model_config=TINY, **changes), x, sources, steps)


def sources(*start: float) -> SourceWeights:
    return SourceWeights(torch.arange(len(start)).repeat(5), torch.tensor(start), 1.0, "adam")


def seen(loss_w: float, val_loss: float | None = None) -> StepResult:
    return StepResult(loss_w=loss_w, grad_norm_w=1.0, tokens=1, val_loss=val_loss)


def test_a_spike_is_told_and_a_slow_rise_is_not(caplog: pytest.LogCaptureFixture):
    watched = watch(sources(0.5, 0.5))
    for step in range(200):
        watched.loss(step, seen(2 + 0.01 * step))
    assert not caplog.text
    watched.loss(200, seen(8.2))
    assert "step 200: loss_w 8.2 after 3.8" in caplog.text and "smaller lr_y (1e-05)" in caplog.text
    for step in range(WINDOW):
        watched.loss(201 + step, seen(8.2))  # told once
    assert len(caplog.records) == 1


def test_where_draws_are_weighted_validation_tells_a_spike(caplog: pytest.LogCaptureFixture):
    watched = watch(sources(0.5, 0.5), sampling="weighted")
    for step in range(WINDOW):
        watched.loss(step, seen(3.0, val_loss=2.0))
    watched.loss(WINDOW, seen(9.0, val_loss=2.1))  # a sample that stands for many
    assert not caplog.text
    watched.loss(WINDOW + 1, seen(3.0, val_loss=4.5))
    assert f"step {WINDOW + 1}: val_loss_w 4.5 after 2" in caplog.text


@pytest.mark.parametrize(
    ("start", "step", "told"),
    [((0.001, 0.999), 50, False), ((0.001, 0.999), 5, True), ((0.001, 0.998, 0.001), 90, True), ((0.4, 0.6), 5, False)],
)
def test_weights_that_collapse_onto_one_source(caplog: pytest.LogCaptureFixture, start, step: int, told: bool):
    watched = watch(sources(*start), lr_x=0)
    watched.weights(step), watched.weights(step)
    assert [record.getMessage().count("of the weight is on s1") for record in caplog.records] == [1] * told


def test_weights_that_collapse_onto_few_records(caplog: pytest.LogCaptureFixture):
    x = SampleWeights(1000, None, "softmax", 1.0, "adam")
    watched = watch(x, lr_x=10)
    assert x.effective_share() == pytest.approx(1)
    watched.weights(0)
    x.x[:5] += 20
    x.refresh()
    watched.weights(1)
    assert x.effective_share() == pytest.approx(0.005, rel=1e-3)
    assert len(caplog.records) == 1 and "as if 0.50% of the records counted" in caplog.text


@pytest.mark.parametrize("kind", ["source", "sample"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_x_that_can_hardly_move_is_told_at_the_start(caplog: pytest.LogCaptureFixture, kind: str, schedule: str):
    """The bound is what Adam reaches with gradients that always point one way; records are read five at a time."""
    steps, changes = 40, {"weights": kind, "x_lr_schedule": schedule, "upper_every": 2, "x_warmup_steps": 6}
    changes |= {"global_batch_size": 5 if kind == "sample" else 10}
    x = SampleWeights(20, None, "sigmoid", 1.0, "adam") if kind == "sample" else sources(0.5, 0.5)
    watched = watch(x, steps, lr_x=0.02, **changes)
    for step in range(steps):
        ids = torch.arange(5) + 5 * (step % 4) if kind == "sample" else torch.arange(10)
        x.accumulate(ids, ids.double() % 2)
        if step < 6:
            x.clear()
        elif (step + 1) % 2 == 0:
            x.step(0.02 * factor(step, steps, 0.03, schedule))
    moved = float((x.x - (0 if kind == "sample" else math.log(0.5))).abs().mean())
    assert moved == pytest.approx(watched.reach(), rel=0.05)
    watched.weights(0)
    assert f"x by {watched.reach():.2g} at most" in caplog.text and len(caplog.records) == 1
    assert ("or x_optimizer=auto, which needs no rate" in caplog.text) == (kind == "sample")
    caplog.clear()
    enough = 0.02 * 3 / watched.reach()
    for each in ({"lr_x": enough}, {"lr_x": 0.02, "x_optimizer": "sgd"}):
        optimizer = each.get("x_optimizer", "adam")
        x = SampleWeights(20, None, "sigmoid", 1.0, optimizer)
        if kind == "source":
            x = SourceWeights(torch.arange(2).repeat(5), torch.tensor([0.5, 0.5]), 1.0, optimizer)
        watch(x, steps, **changes | each).weights(0)
    assert not caplog.text


def test_weights_that_never_move(caplog: pytest.LogCaptureFixture):
    x = sources(0.3, 0.7)
    watched, moved, idle = watch(x), watch(sources(0.3, 0.7)), watch(x, lr_x=0)
    moved.watched.x[0] += 0.1
    for each in (watched, moved, idle):
        each.weights(49)
        assert not caplog.text
    for each in (watched, moved, idle):
        each.weights(50)
    assert len(caplog.records) == 1 and "still where they started: try a larger lr_x" in caplog.text


def test_what_holds_back_a_rule_without_a_rate(caplog: pytest.LogCaptureFixture):
    """Gaps that are all the same, or a difference that is not shown yet; never lr_x."""
    causes = []
    for gaps in (0.0, 1.0):
        x = SourceWeights(torch.arange(20) % 2, torch.tensor([0.5, 0.5]), 1.0, "auto")
        watched = watch(x, x_optimizer="auto", lr_x=0)
        watched.weights(0)
        x.accumulate(torch.arange(20), gaps * torch.randn(20, generator=torch.Generator().manual_seed(0)))
        watched.weights(50)
        causes.append(caplog.records[-1].getMessage())
    assert len(caplog.records) == 2 and not any("lr_x" in cause for cause in causes)
    assert "no evidence at all" in causes[0] and "global_batch_size (64)" in causes[0]
    assert "the nearest to a verdict is s" in causes[1] and "more steps at this rate" in causes[1]


@pytest.mark.parametrize("optimizer", ["auto", "adam"])
def test_a_warm_up_of_most_of_the_run_is_named_as_the_cause(caplog: pytest.LogCaptureFixture, optimizer: str):
    """At the start, and again when the weights have not moved; with the remedy, neither is said."""

    def warned(x_warmup_steps: int) -> list[str]:
        caplog.clear()
        x = SourceWeights(torch.arange(20) % 2, torch.tensor([0.5, 0.5]), 1.0, optimizer)
        watched = watch(x, 113, x_optimizer=optimizer, x_warmup_steps=x_warmup_steps, upper_every=1, epochs=2)
        watched.weights(0)
        watched.weights(112)
        return [record.getMessage() for record in caplog.records]

    start, end = warned(100)
    cause = "x_warmup_steps (100) leaves x only the last 13 of the run's 113 steps. Give x_warmup_steps=11, or make"
    assert start.startswith(f"step 0: {cause} the run longer (epochs=18)")
    assert end.startswith(f"step 112: the weights are still where they started: {cause}")
    assert [cause for cause in warned(11) if "x_warmup_steps" in cause] == []


@pytest.mark.parametrize("start", [None, torch.linspace(0.1, 1.9, 20, dtype=torch.float64)])
def test_records_weights_that_never_move(caplog: pytest.LogCaptureFixture, start: torch.Tensor | None):
    """From equal weights, of which no copy is kept, and from others."""
    x, other = (SampleWeights(20, start, "sigmoid", 1.0, "adam") for _ in range(2))
    watched, moved = watch(x), watch(other)
    x.x[3] += 0.009
    other.x[3] -= 0.011
    moved.weights(50)
    assert not caplog.text
    watched.weights(50)
    assert "still where they started" in caplog.text
    assert len(watched.start) == (1 if start is None else 20)
