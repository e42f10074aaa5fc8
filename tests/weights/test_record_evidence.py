"""bilevel/weights/record_evidence.py and auto_records.py, against the formulas written out, and on gaps whose truth is
known."""

import math

import numpy as np
import pytest
import torch

from bilevel.weights import record_evidence
from bilevel.weights.learned import SampleWeights
from bilevel.weights.record_evidence import CALL, RecordEvidence, bins, harmful_curve, histogram, root

N = 400


def evidence_of(first: np.ndarray, trusted: np.ndarray, later: np.ndarray | None = None) -> RecordEvidence:
    """Evidence in which each record has this first gap, beside these of trusted records, and perhaps a second one."""
    evidence = RecordEvidence(len(first))
    evidence.first, evidence.trusted = torch.from_numpy(first).float(), torch.from_numpy(trusted).float()
    evidence.sums, evidence.visits = evidence.first.clone(), torch.ones(len(first), dtype=torch.int32)
    if later is not None:
        evidence.sums, evidence.visits = evidence.sums + torch.from_numpy(later).float() / 4, evidence.visits + 1
    return evidence


def sound(rng: np.random.Generator, n: int, kind: str) -> np.ndarray:
    """Gaps of records of which none is harmful, in distributions of different shapes and places."""
    values = {
        "normal": rng.normal(-0.8, 0.9, n),
        "heavy": -0.7 + 0.7 * rng.standard_t(4, n),
        "left": -0.2 - rng.gamma(1.5, 0.7, n) + 0.3 * rng.normal(size=n),
        "on zero": rng.normal(0, 1, n),
        "nearly all above zero": rng.normal(0.8, 0.9, n),
        "two languages": np.where(rng.random(n) < 0.5, rng.normal(-0.5, 0.7, n), rng.normal(-1.6, 0.7, n)),
    }
    return values[kind]


# ----------------------------------------------------------------------------------------------------------------------
# the formulas


def test_means_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    evidence, sums, divisors, visits = RecordEvidence(20), np.zeros(20), np.zeros(20), np.zeros(20)
    for _ in range(30):
        ids = rng.choice(19, 6, replace=False)  # the last one is never visited
        gaps = rng.normal(-1, 2, 6)
        evidence.observe(torch.from_numpy(ids), torch.from_numpy(gaps), torch.ones(6, dtype=torch.float64))
        for i, gap in zip(ids, gaps, strict=True):
            visits[i] += 1
            sums[i] += gap / gaps.std() / visits[i] ** 2
            divisors[i] += 1 / visits[i] ** 2
    assert evidence.first.isnan().all()  # there were no trusted records beside them
    np.testing.assert_allclose(evidence.means(slice(0, 19)), sums[:19] / divisors[:19], rtol=1e-5)
    assert math.isnan(evidence.means(slice(19, 20))[0])


def test_no_scale_is_left():
    rng, scaled = np.random.default_rng(1), [RecordEvidence(50) for _ in range(2)]
    for _ in range(20):
        ids, gaps = torch.from_numpy(rng.choice(50, 8, replace=False)), torch.from_numpy(rng.normal(size=8))
        for factor, evidence in zip((1.0, 1e-4), scaled, strict=True):
            evidence.observe(ids, factor * gaps, torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(scaled[0].sums, scaled[1].sums)


def test_equal_gaps_are_no_evidence():
    evidence = RecordEvidence(10)
    gaps, one = torch.full((4,), 1e-15, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    evidence.observe(torch.arange(4), gaps, one, gaps[:2])
    assert not evidence.visits.any() and evidence.first.isnan().all() and not len(evidence.trusted)
    assert evidence.harm().z == -math.inf and not evidence.harm().shown


def test_first_gaps_stand_beside_those_of_trusted_records_at_the_same_step():
    """Both in standard deviations of all gaps of the step; a record that was read before has no first gap."""
    rng, evidence = np.random.default_rng(2), RecordEvidence(6)
    one, first, trusted, visited = torch.ones(3, dtype=torch.float64), np.full(6, np.nan), [], set()
    for ids, compared in (([0, 1, 2], True), ([1, 2, 3], True), ([4, 0, 1], False), ([5, 0, 4], True)):
        gaps, of_trusted = rng.normal(size=3), rng.normal(size=2)
        given = torch.from_numpy(of_trusted) if compared else None
        evidence.observe(torch.tensor(ids), torch.from_numpy(gaps), one, given)
        sd = np.r_[gaps, of_trusted].std()
        if compared:
            trusted += (of_trusted / sd).tolist()
        for i, gap in zip(ids, gaps / sd, strict=True):
            first[i] = gap if compared and i not in visited else first[i]
        visited |= set(ids)
    np.testing.assert_allclose(evidence.first.numpy(), first, rtol=1e-6)
    np.testing.assert_allclose(evidence.trusted.numpy(), trusted, rtol=1e-6)


def test_z_is_that_of_the_g_test():
    """Against scipy's, one threshold after the other."""
    from scipy.stats import chi2_contingency

    rng = np.random.default_rng(2)
    first = np.r_[sound(rng, 300, "normal"), rng.normal(1.5, 0.3, 100)].astype(np.float32).astype(float)
    trusted = sound(rng, 90, "normal").astype(np.float32).astype(float)
    harm, z = evidence_of(first, trusted).harm(), []
    places = np.arange(record_evidence.BINS // 2) * record_evidence.WIDTH
    a, c = (np.array([(values > t).sum() for t in places]) for values in (first, trusted))
    for here, there in {(x, y) for x, y in zip(a.tolist(), c.tolist(), strict=True) if x >= record_evidence.LEAST}:
        g = chi2_contingency([[here, 400 - here], [there, 90 - there]], correction=False, lambda_="log-likelihood")[0]
        z.append(math.copysign(math.sqrt(g), here / 400 - there / 90))
    assert harm.z == pytest.approx(max(z)) and (harm.seen, harm.trusted) == (400, 90) and harm.shown


def test_the_share_of_harmful_records_is_that_of_the_densities():
    """Of many records: beside the true densities; and beyond all trusted ones, where one more is counted."""
    from scipy.stats import norm

    rng, n, m = np.random.default_rng(3), 40_000, 40_000
    first = np.r_[rng.normal(-0.8, 0.9, n // 2), rng.normal(1.2, 0.5, n // 2)]
    evidence = evidence_of(first, rng.normal(-0.8, 0.9, m))
    harm = evidence.harm()
    t = np.array([0.1, 0.4, 0.8, 1.2])
    true = norm.pdf(t, 1.2, 0.5) / (norm.pdf(t, -0.8, 0.9) + norm.pdf(t, 1.2, 0.5))
    found = harm.curve[record_evidence.bins(t)]
    np.testing.assert_allclose(found, true, atol=0.05)
    assert harm.number == (evidence.harmful_share(harm, slice(0, n)) > 0.5).sum() == pytest.approx(n // 2, rel=0.06)
    alone = evidence_of(np.r_[np.full(60, 2.0), np.full(140, -1.0)], np.full(39, -1.0))
    p = alone.harmful_share(alone.harm(), slice(0, 200))
    assert p[:60] == pytest.approx(1 - 140 / 200 * 200 / 40 / 60) and (p[60:] == 0).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_p_is_a_probability(share: float):
    """Where the gaps of both kinds overlap; records whose mean gap is below 0 have none."""
    rng, n = np.random.default_rng(12), 20_000
    bad = np.arange(n) < share * n
    first = np.where(bad, rng.normal(0.9, 0.8, n), rng.normal(-0.6, 0.9, n))
    evidence = evidence_of(first, rng.normal(-0.6, 0.9, 2000))
    p = evidence.harmful_share(evidence.harm(), slice(0, n))
    assert (p[first <= 0] == 0).all()
    filled = []
    for low, high in ((0.05, 0.3), (0.3, 0.7), (0.7, 0.97)):
        inside = (p > low) & (p < high)
        filled.append(inside.sum() > 50)
        assert not filled[-1] or bad[inside].mean() == pytest.approx(p[inside].mean(), abs=0.1)
    assert any(filled)
    later = evidence_of(first, rng.normal(-0.6, 0.9, 2000), np.full(n, -9.0))
    assert (later.harmful_share(later.harm(), slice(0, n))[first < 2] == 0).all()


def test_larger_first_gaps_are_more_likely_harmful():
    """Between the centres of the regression's steps no two bins have the same P, and few records are tied."""
    rng = np.random.default_rng(3)
    first = np.concatenate([rng.normal(0, 1, 700), rng.normal(2, 1, 300)]).astype(np.float32)
    p = harmful_curve(histogram(first), histogram(rng.normal(0, 1, 200).astype(np.float32)))
    inside = (p > p.min()) & (p < p.max() - 1e-9)
    assert inside.sum() > 300 and (np.diff(p[inside]) > 0).all()
    here = bins(first)[inside[bins(first)]]
    assert len(np.unique(p[here])) == len(np.unique(here)) > 0.5 * len(here) > 100


def test_shares_that_are_the_same_have_no_root():
    a, c = np.array([0.0, 10, 40]), np.array([0.0, 5, 20])
    np.testing.assert_allclose(root(a, 40, c, 20), 0, atol=1e-6)
    assert root(np.array([4.0]), 40, np.array([10.0]), 20) < 0


# ----------------------------------------------------------------------------------------------------------------------
# what it finds


@pytest.mark.parametrize("kind", ["normal", "heavy", "left", "two languages", "on zero", "nearly all above zero"])
@pytest.mark.parametrize("trusted", [15, 128])
def test_sound_records_are_not_called(kind: str, trusted: int):
    """In at most 2 of 100 runs, wherever their gaps lie."""
    rng = np.random.default_rng(4)
    called = sum(evidence_of(sound(rng, N, kind), sound(rng, trusted, kind)).harm().shown for _ in range(100))
    assert called <= 2


@pytest.mark.parametrize("batch", [4, 8])
def test_small_batches_call_no_sound_records(batch: int):
    """Their gaps are divided by a deviation that hangs on them; nearly all lie above 0, as where w is worse than u."""
    called = 0
    for seed in range(40):
        rng, evidence, sent = np.random.default_rng(seed), RecordEvidence(1000), 0
        steps, one = 1000 // batch, torch.ones(batch, dtype=torch.float64)
        for step in range(steps):
            number = 256 * (step + 1) // steps - sent
            sent += number
            gaps, trusted = (torch.from_numpy(rng.normal(1.5, 1, size)) for size in (batch, number))
            evidence.observe(torch.arange(step * batch, step * batch + batch), gaps, one, trusted)
        called += evidence.harm().shown
    assert called <= 1


def test_gaps_that_are_not_finite_are_left_out():
    evidence, one = RecordEvidence(4), torch.ones(4, dtype=torch.float64)
    nothing = torch.full((2,), math.nan, dtype=torch.float64)
    evidence.observe(torch.arange(4), torch.tensor([1.0, 2, 3, 5], dtype=torch.float64), one, nothing)
    assert evidence.harm().seen == 4 and evidence.harm().trusted == 0 and evidence.harm().z == -math.inf


@pytest.mark.parametrize(("share", "trusted"), [(0.1, 256), (0.3, 64), (0.5, 64), (0.9, 20)])
def test_harmful_records_are_called(share: float, trusted: int):
    rng = np.random.default_rng(5)
    for _ in range(20):
        bad = int(share * N)
        first = np.r_[rng.normal(1.5, 0.4, bad), sound(rng, N - bad, "normal")]
        evidence = evidence_of(first, sound(rng, trusted, "normal"))
        harm = evidence.harm()
        p = evidence.harmful_share(harm, slice(0, N))
        assert harm.shown and p[:bad].mean() > 0.6 and p[:bad].mean() - p[bad:].mean() > 0.5
        assert (np.diff(p[np.argsort(first)]) >= 0).all()  # with one gap each


def test_a_verdict_is_kept_until_it_is_clearly_gone():
    """The same records, of which fewer and fewer are harmful: called at CALL, forgotten at KEPT."""
    rng = np.random.default_rng(10)
    good, bad = sound(rng, N, "normal"), rng.normal(1.2, 0.5, N)
    evidence, states = evidence_of(good, sound(rng, 128, "normal")), set()
    for number in [*range(0, N, 2), *range(N, -1, -2)]:
        first = np.r_[good[number // 2 :], bad[:number]]
        held = evidence.shown
        evidence.n, evidence.first = len(first), torch.from_numpy(first).float()
        evidence.sums, evidence.visits = evidence.first.clone(), torch.ones(len(first), dtype=torch.int32)
        evidence.known = None
        harm = evidence.harm()
        assert harm.shown == (harm.z > (record_evidence.KEPT if held else CALL))
        states.add((held, record_evidence.KEPT < harm.z <= CALL))
        evidence.note(harm)
        assert evidence.shown == harm.shown
    assert states == {(False, False), (False, True), (True, False), (True, True)}


# ----------------------------------------------------------------------------------------------------------------------
# the rule


def run(weights: SampleWeights, bad: np.ndarray, steps: int, rng: np.random.Generator, batch: int = 32) -> None:
    """Steps of a run; two trusted records a step have the gaps of sound ones."""
    trait = np.where(bad, 1.2, -0.8) + 0.5 * rng.normal(size=len(bad))
    for step in range(steps):
        ids = rng.permutation(len(bad))[:batch]
        gaps = 1e-3 * (step + 1) * (trait[ids] + 0.5 * rng.normal(size=batch))
        trusted = 1e-3 * (step + 1) * rng.normal(-0.8, 0.7, 2)
        weights.accumulate(torch.from_numpy(ids), torch.from_numpy(gaps), trusted=torch.from_numpy(trusted))
        weights.step(0.0)


@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_harmful_records_lose_their_weight_and_others_stay_equal(x_map: str):
    rng, bad = np.random.default_rng(6), np.arange(N) % 4 == 0
    weights = SampleWeights(N, None, x_map, 10.0, "auto")
    run(weights, bad, 60, rng)
    c = weights.coefficients(slice(0, N)).numpy()
    # Beside the true probabilities: the gaps of both kinds are normal, of deviation 0.7 about 1.2 and -0.8.
    gap = np.where(bad, 1.2, -0.8) + math.sqrt(0.5) * np.random.default_rng(0).normal(size=(1000, N))
    odds = np.exp(((gap + 0.8) ** 2 - (gap - 1.2) ** 2) / (2 * 0.5)) / 3
    factor = 1 / (1 + odds)
    assert c[bad].mean() == pytest.approx(factor[:, bad].mean() / factor.mean(), abs=0.07)
    assert c.mean() == pytest.approx(1)
    assert np.median(c[~bad]) == pytest.approx(c.max())
    even = SampleWeights(N, None, x_map, 10.0, "auto")
    run(even, np.zeros(N, dtype=bool), 60, rng)
    assert even.effective_share() == pytest.approx(1) and not even.records.harm().shown


def test_while_w_and_u_are_the_same_nothing_moves():
    """The first step sees more than a quarter of the records, and all gaps are 0."""
    weights = SampleWeights(20, None, "sigmoid", 10.0, "auto")
    weights.accumulate(torch.arange(16), torch.zeros(16), trusted=torch.zeros(4))
    weights.step(0.0)
    assert torch.equal(weights.coefficients(slice(0, 20)), torch.ones(20, dtype=torch.float64))
    weights.accumulate(torch.arange(16), torch.randn(16, generator=torch.Generator().manual_seed(0)))
    weights.step(0.0)
    assert weights.coefficients(slice(0, 20)).isfinite().all()


def test_the_weights_are_set_at_each_quarter_of_an_epoch():
    """Batches of 16 of 320 records: five of them are a quarter."""
    rng, weights, set_at = np.random.default_rng(11), SampleWeights(320, None, "sigmoid", 10.0, "auto"), []
    for step in range(1, 41):
        before = weights.x
        run(weights, np.zeros(320, dtype=bool), 1, rng, batch=16)
        set_at += [step] if weights.x is not before else []
    assert set_at == list(range(5, 41, 5))


def test_the_weights_are_set_when_the_run_ends():
    """It ended before a quarter of an epoch was over: harmful records are known, and all weights are still equal."""
    rng, bad = np.random.default_rng(12), np.arange(4000) % 2 == 0
    weights = SampleWeights(4000, None, "sigmoid", 10.0, "auto")
    run(weights, bad, 10, rng, batch=99)
    assert weights.records.harm().number > 100 and weights.effective_share() == 1
    weights.conclude()
    called = weights.records.harmful_share(weights.records.harm(), slice(None)) > 0.5
    c = weights.coefficients(slice(0, 4000)).numpy()
    assert c[called].max() < 0.7 and weights.effective_share() < 1
    again = weights.x
    weights.conclude()
    assert torch.equal(weights.x, again)


def test_it_starts_from_the_weights_that_are_given():
    rng, bad = np.random.default_rng(7), np.arange(N) % 2 == 0
    start = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    weights = SampleWeights(N, start, "sigmoid", 10.0, "auto")
    run(weights, bad, 60, rng)
    c = weights.coefficients(slice(0, N))[torch.from_numpy(~bad)]
    ratio = c / start[torch.from_numpy(~bad)]
    assert ratio.median() == pytest.approx(float(ratio.max()), rel=1e-3) and c.max() / c.min() > 2


def test_resumed_it_goes_on_bit_for_bit():
    bad = np.arange(N) % 3 == 0
    whole, parts = (SampleWeights(N, None, "sigmoid", 10.0, "auto") for _ in range(2))
    rng, again = np.random.default_rng(8), np.random.default_rng(8)
    trait = np.where(bad, 1.2, -0.8)
    for step in range(40):
        for weights, own in ((whole, rng), (parts, again)):
            ids = own.permutation(N)[:32]
            gaps, trusted = trait[ids] + own.normal(size=32), own.normal(-0.8, 0.7, 2)
            weights.accumulate(torch.from_numpy(ids), torch.from_numpy(gaps), trusted=torch.from_numpy(trusted))
            weights.step(0.0)
        if step == 20:
            state = parts.state_dict()
            parts = SampleWeights(N, None, "sigmoid", 10.0, "auto")
            parts.load_state_dict(state)
    assert torch.equal(whole.x, parts.x) and whole.records.shown and parts.records.shown


def test_the_evidence_is_kept_beside_any_rule():
    rng, bad = np.random.default_rng(9), np.arange(N) % 4 == 0
    weights = SampleWeights(N, None, "sigmoid", 10.0, "adam")
    run(weights, bad, 60, rng)
    harm = weights.records.harm()
    assert harm.shown and harm.number == pytest.approx(100, abs=30)
    each = [value.element_size() for value in weights.records.state_dict().values() if len_of(value) == N]
    assert sum(each) == 12


def len_of(value: object) -> int:
    return len(value) if torch.is_tensor(value) else 0
