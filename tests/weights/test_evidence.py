"""bilevel/weights/evidence.py: the sums against its formulas, how often chance is called, and how soon a bad source."""

import math

import pytest
import torch

from bilevel.weights.evidence import CALL, Evidence
from bilevel.weights.learned import SourceWeights


def by_the_formulas(start: list[float], steps: list[tuple[list[int], list[float], list[float]]], n: int) -> dict:
    """The docstring's sums, a source and a sample at a time; steps: sources, gaps and counts of the samples."""
    size = len(start)
    S, H, Q, T, last, e, visits, called = [0.0] * size, [0.0] * size, [0.0] * size, [0] * size, {}, {}, 0.0, {}
    for number, (sources, gaps, counts) in enumerate(steps, 1):
        visits += sum(counts)
        mean_of_all = sum(c * g for g, c in zip(gaps, counts, strict=True)) / sum(counts)
        sd = math.sqrt(sum(c * (g - mean_of_all) ** 2 for g, c in zip(gaps, counts, strict=True)) / sum(counts))
        seen = sorted(set(sources))
        if len(seen) < 2 or sd <= 1e-12:
            continue
        mean, records = {}, {}
        for k in seen:
            of_k = [(g, c) for s, g, c in zip(sources, gaps, counts, strict=True) if s == k]
            mean[k] = sum(g * c for g, c in of_k) / sum(c for _, c in of_k)
            records[k] = sum(c for _, c in of_k) ** 2 / sum(c * c for _, c in of_k)
        p = {k: math.exp(start[k]) / sum(math.exp(start[j]) for j in seen) for k in seen}
        for k in seen:
            others = [j for j in seen if j != k]
            d = (mean[k] - sum(p[j] * mean[j] for j in others) / (1 - p[k])) / sd
            h = 1 / (1 / records[k] + sum(p[j] ** 2 / records[j] for j in others) / (1 - p[k]) ** 2)
            S[k], H[k] = S[k] + h * d, H[k] + h
            if k in last:
                Q[k] += (d - last[k][0]) ** 2 / (1 / h + 1 / last[k][1])
                T[k] += 1
            last[k] = d, h
        for k in range(size):
            phi_d = max(1, (16 + Q[k]) / (4 + T[k])) * max(1, (1 + visits / n) / 2)
            e[k] = S[k] ** 2 / (2 * phi_d * (H[k] + 64)) - 0.5 * math.log(1 + H[k] / 64)
            if e[k] > math.log(20):
                called.setdefault(k, number)
    return {"S": S, "H": H, "Q": Q, "T": T, "e": [e[k] for k in range(size)], "called": called}


def test_the_sums_are_those_of_the_formulas():
    """Samples that stand for several, sources that are not seen, one source alone, and gaps that are all the same."""
    generator, start, steps = torch.Generator().manual_seed(1), torch.tensor([0.2, -1.0, 0.5]).double(), []
    shift = torch.tensor([1.5, 0.0, -0.5]).double()
    for step in range(30):
        sources = torch.randint(3, (16,), generator=generator)
        sources = {4: sources.clamp_max(1), 7: torch.zeros(16, dtype=torch.int64)}.get(step, sources)
        gaps = (torch.randn(16, generator=generator).double() + shift[sources]) * 0.01 * (step > 0)
        steps.append((sources, gaps, torch.rand(16, generator=generator).double() * 4 + 1))
    evidence = Evidence(start, 300)
    for sources, gaps, counts in steps:
        evidence.observe(start, sources, gaps, counts)
    expected = by_the_formulas(start.tolist(), [tuple(part.tolist() for part in step) for step in steps], 300)
    for name in "SHQT":
        assert getattr(evidence, name).tolist() == pytest.approx(expected[name], rel=1e-10)
    assert evidence.evidence().tolist() == pytest.approx(expected["e"], rel=1e-10)
    assert {k: at for k, at in enumerate(evidence.called_at.tolist()) if at} == expected["called"] and expected[
        "called"
    ]
    for found, e in zip(evidence.findings(start), expected["e"], strict=True):
        assert (found.low > 0 or found.high < 0) == (e > CALL)


def test_gaps_dealt_at_random_are_seldom_called():
    """200 sources that differ by chance alone: records with gaps of their own, heavy tails, and a growing spread."""
    generator, z, called = torch.Generator().manual_seed(2), [], 0
    n, sources, batch = 9600, 20, 192
    for _ in range(10):
        ids = torch.randint(sources, (n,), generator=generator)
        own = torch.randn(n, generator=generator).double()
        evidence, x = Evidence(torch.zeros(sources).double(), n), torch.zeros(sources).double()
        for step in range(60):
            seen = torch.randperm(n, generator=generator)[:batch]
            tails = torch.randn(batch, generator=generator).double() / torch.rand(batch, generator=generator).double()
            gaps = (own[seen] + 0.3 * tails.clamp(-8, 8)) * 1e-3 * step
            evidence.observe(x, ids[seen], gaps, torch.ones(batch).double())
        z += (evidence.S / (evidence.variance() * evidence.H).sqrt()).tolist()
        called += int((evidence.called_at > 0).sum())
    beyond = sum(abs(value) > 1.96 for value in z) / len(z)
    assert 0.01 <= beyond <= 0.08, beyond
    assert called / len(z) <= 0.02, called


def test_a_source_like_emptied_records_is_called_within_twelve_steps():
    generator, steps = torch.Generator().manual_seed(3), []
    for _ in range(20):
        evidence = Evidence(torch.zeros(2).double(), 800)
        for step in range(30):
            sources = torch.randint(2, (16,), generator=generator)
            gaps = (torch.randn(16, generator=generator) + 1.5 * sources).double() * 1e-3 * step
            evidence.observe(torch.zeros(2).double(), sources, gaps, torch.ones(16).double())
        found = evidence.findings(torch.zeros(2).double())
        assert [each.verdict for each in found] == ["better", "worse"]  # x has not moved, and the sign says it
        assert found[1].p_worse > 0.999 and found[1].low > 0 and evidence.luck() < 0.01
        steps.append(max(evidence.called_at.tolist()))
    assert sum(step <= 12 for step in steps) >= 19, steps


def test_the_steps_to_a_verdict_hold_what_it_takes():
    """Told at step 20 of runs with a small difference: the verdict comes in the range in two runs of three or more."""
    generator, held, told = torch.Generator().manual_seed(5), 0, 0
    for _ in range(60):
        evidence, x = Evidence(torch.zeros(2).double(), 10_000), torch.zeros(2).double()
        for step in range(1, 1500):
            sources = torch.randint(2, (16,), generator=generator)
            gaps = torch.randn(16, generator=generator).double() + 0.3 * sources.double()
            evidence.observe(x, sources, gaps, torch.ones(16).double())
            if step == 20:
                found = evidence.findings(x)[1]
            if evidence.called_at[1] > 0:
                break
        if found.called_at is None:
            told += 1
            held += found.steps_least <= evidence.called_at[1] - 20 <= found.steps_most
    assert told >= 40 and held / told > 0.66, (held, told)


def test_the_verdict_follows_the_weight_and_the_peak_stays():
    """At an inner optimum the difference has gone, and S with it."""
    evidence, x = Evidence(torch.zeros(2).double(), 800), torch.zeros(2).double()
    generator = torch.Generator().manual_seed(4)
    for step in range(400):
        sources = torch.randint(2, (16,), generator=generator)
        sign = 1.5 if step < 20 else -0.3
        gaps = torch.randn(16, generator=generator).double() + sign * sources.double()
        if step == 20:
            x = torch.tensor([0.5, -0.5]).double()
        evidence.observe(x, sources, gaps, torch.ones(16).double())
    worse = evidence.findings(x)[1]
    assert worse.difference < 0 < evidence.peak[1]
    assert (worse.verdict, worse.settled, worse.steps_least, worse.steps_most) == ("worse", True, 0, 0)
    assert worse.called_at < 20 and worse.peak > CALL


def test_without_evidence_nothing_is_said():
    evidence = Evidence(torch.zeros(2).double(), 10)
    evidence.observe(torch.zeros(2).double(), torch.tensor([0, 1]), torch.zeros(2).double(), torch.ones(2).double())
    evidence.observe(torch.zeros(2).double(), torch.zeros(0, dtype=torch.int64), *torch.zeros(2, 0).double())
    for found in evidence.findings(torch.zeros(2).double()):
        assert math.isnan(found.difference) and math.isnan(found.low) and found.p_worse == 0.5
        assert found.verdict == "no difference shown" and math.isinf(found.steps_least) and found.evidence == 0


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "mirror", "auto"])
def test_evidence_is_kept_beside_every_optimizer(optimizer: str):
    """It depends on the gaps and on x; while x waits it is the same for all."""
    ids = torch.arange(40) % 2
    weights = SourceWeights(ids, torch.tensor([0.5, 0.5]), 10.0, optimizer)
    generator = torch.Generator().manual_seed(5)
    for _ in range(15):
        seen = torch.randperm(40, generator=generator)[:16]
        weights.accumulate(seen, torch.randn(16, generator=generator) + 2.0 * ids[seen])
        weights.clear()
    assert weights.evidence.called_at.min() > 0 and weights.evidence.S[1] > 0
    assert float(weights.evidence.S.sum()) == pytest.approx(0, abs=1e-9)


def test_the_state_of_a_source_takes_at_most_256_bytes():
    weights = SourceWeights(torch.arange(1000), torch.full((1000,), 1e-3), 10.0, "auto")
    tensors = [*weights.state_dict().values(), *weights.evidence.state_dict().values()]
    tensors += weights.optimizer.state_dict().values()
    assert sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor)) <= 256 * 1000
