"""bilevel/weights/auto.py on gaps that answer to x: bad sources go, an inner optimum is reached, equals stay."""

import math

import pytest
import torch

from bilevel.weights.learned import SourceWeights

N, BATCH = 800, 16


def weights(sources: int = 2, start: list[float] | None = None) -> SourceWeights:
    p = torch.tensor(start) if start else torch.full((sources,), 1 / sources)
    return SourceWeights(torch.arange(N) % sources, p, 10.0, "auto")


def draws(seed: int, steps: int, sources: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches, and gaps of standard deviation 1 that are independent of the source."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randperm(N, generator=generator)[:BATCH] for _ in range(steps)]
    return [(each, torch.randn(BATCH, generator=generator).double()) for each in ids]


def one_step(x: SourceWeights, ids: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor | None = None) -> None:
    x.accumulate(ids, gaps, counts)
    x.step(0.1)


def feedback(seed: int, best: float, answer: float, steps: int) -> list[float]:
    """The weight of source 0 at each step, in a linear model of the loop.

    The difference between the gaps falls by `answer` for each logit between the weight and its best, and follows x with
    a lag of 20 steps, as u and w do. At the first step it is 0.
    """
    x, followed, path = weights(), 0.0, []
    target = math.log(best / (1 - best))
    for step, (ids, noise) in enumerate(draws(seed, steps)):
        difference = max(-1.5, min(1.5, answer * (target - followed)))
        gaps = (noise + difference * x.source_ids[ids].double()) * 1e-3 * min(step, 20)
        one_step(x, ids, gaps)
        followed += (float(x.x[0] - x.x[1]) - followed) / 20
        path.append(float(x.p[0]))
    return path


@pytest.mark.parametrize("best", [0.7, 0.2])
def test_an_inner_optimum_is_reached_and_held(best: float):
    for seed in range(3):
        path = feedback(seed, best, answer=1.0, steps=200)
        held = torch.tensor(path[150:]).logit()
        assert float((held - math.log(best / (1 - best))).abs().max()) < 0.7, (seed, path[::20])


def test_a_source_whose_gap_does_not_answer_is_dropped():
    for seed in range(3):
        x = weights()
        for step, (ids, noise) in enumerate(draws(seed, 60)):
            one_step(x, ids, (noise + 1.5 * x.source_ids[ids].double()) * (step > 0))
        worse = x.evidence.findings(x.x)[1]
        assert worse.weight < 0.01 and worse.verdict == "worse" and worse.called_at <= 15


def test_a_dropped_source_whose_gap_shrinks_does_not_come_back():
    """The model no longer learns it, so its gap falls; a source that validation needs has the opposite sign by then."""
    for seed in range(3):
        x, path = weights(), []
        for step, (ids, noise) in enumerate(draws(seed, 110)):
            difference = 1.5 if step < 65 else 0.5
            one_step(x, ids, (noise + difference * x.source_ids[ids].double()) * (step > 0))
            path.append(float(x.p[1]))
        assert path[64] < 0.01 and max(path[65:]) <= 1.02 * path[64], (seed, path[60::5])
        for ids, noise in draws(seed + 10, 60):
            one_step(x, ids, noise - 1.5 * x.source_ids[ids].double())
        assert float(x.p[1]) > 10 * path[-1], "needed again, it rises"


def test_equal_sources_stay_equal():
    for sources in (2, 10):
        for seed in range(3):
            x = weights(sources)
            for ids, noise in draws(seed, 60, sources):
                one_step(x, ids, noise)
            assert float((x.p * sources).log().abs().max()) < 0.2 and not x.evidence.called_at.any()


def test_no_weight_falls_below_the_lowest_nor_rises_to_it():
    x = weights(3, [0.5, 0.5, 1e-9])
    lowest = float(x.x[2] - x.x.max())
    for ids, noise in draws(1, 400, 3):
        one_step(x, ids, noise + 3.0 * (x.source_ids[ids] == 1).double())
    assert float(x.x.max() - x.x[1]) == pytest.approx(8, abs=1.0)
    assert float(x.x[2] - x.x.max()) >= lowest - 1e-9 and x.p[2] < 1e-3


def test_nothing_moves_while_both_models_are_the_same():
    x = weights()
    before = x.x.clone()
    for ids, _ in draws(1, 5):
        one_step(x, ids, torch.zeros(BATCH))
    one_step(x, ids, torch.full((BATCH,), 0.1).double())  # a difference between the models that no sample shows
    assert torch.equal(x.x, before) and not x.evidence.H.any()


def test_one_source_alone_says_nothing():
    x = weights()
    before = x.x.clone()
    for _, noise in draws(1, 5):
        one_step(x, torch.arange(0, 2 * BATCH, 2), noise)
    assert torch.equal(x.x, before) and not x.evidence.H.any()


@pytest.mark.parametrize("scale", [2.0**-15, 2.0**20])
def test_the_scale_of_the_gaps_does_not_matter(scale: float):
    """Nor do factor (alpha) and learning rate; to the bit for a power of two."""
    x, scaled = weights(), SourceWeights(torch.arange(N) % 2, torch.full((2,), 0.5), 1e-3, "auto")
    for ids, noise in draws(2, 30):
        gaps = noise + 1.0 * x.source_ids[ids].double()
        x.accumulate(ids, gaps)
        scaled.accumulate(ids, scale * gaps)
        x.step(0.1), scaled.step(0.0)
    assert torch.equal(x.x, scaled.x) and float((x.x - x.evidence.start).abs().max()) > 0.5


def test_evidence_gathers_while_x_waits():
    """x_warmup_steps clears the gradient at each step; afterwards a source that is called moves at once."""
    x = weights()
    for ids, noise in draws(3, 20):
        x.accumulate(ids, noise + 1.5 * x.source_ids[ids].double())
        x.clear()
    assert x.p.tolist() == pytest.approx([0.5, 0.5], abs=1e-12) and x.evidence.called_at.min() > 0
    one_step(x, *draws(4, 1)[0])
    assert x.p[1] < 0.4


@pytest.mark.parametrize("weighted", [False, True])
def test_it_goes_on_bit_for_bit(weighted: bool):
    x, again = weights(3, [0.2, 0.3, 0.5]), weights(3)
    batches = draws(5, 40, 3)
    for number, (ids, noise) in enumerate(batches):
        counts = 1 + 9 * torch.rand(BATCH, generator=torch.Generator().manual_seed(number)).double()
        for each in (x, again) if number >= 20 else (x,):
            one_step(each, ids, noise + 1.5 * (x.source_ids[ids] == 1), counts if weighted else None)
        if number == 19:
            again.load_state_dict({name: _copied(value) for name, value in x.state_dict().items()})
    assert torch.equal(x.x, again.x) and x.evidence.findings(x.x) == again.evidence.findings(again.x)


def _copied(value):
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value
