"""bilevel/weights/record_evidence.py and auto_records.py, against the formulas written out, and on gaps whose truth is
known."""

import math

import numpy as np
import pytest
import torch

from bilevel.weights import record_evidence
from bilevel.weights.learned import SampleWeights
from bilevel.weights.record_evidence import CALL, RecordEvidence, centre

N = 400


def evidence_of(m: np.ndarray) -> RecordEvidence:
    """Evidence in which each record has been visited once and has this mean."""
    evidence = RecordEvidence(len(m))
    evidence.sums, evidence.visits = torch.from_numpy(m).float(), torch.ones(len(m), dtype=torch.int32)
    return evidence


def sound(rng: np.random.Generator, n: int, kind: str) -> np.ndarray:
    """Means of records of which none is harmful: most lie below 0, in distributions of different shapes."""
    values = {
        "normal": rng.normal(-0.8, 0.9, n),
        "heavy": -0.7 + 0.7 * rng.standard_t(4, n),
        "left": -0.2 - rng.gamma(1.5, 0.7, n) + 0.3 * rng.normal(size=n),
        "on zero": rng.normal(0, 1, n),
        "far": rng.normal(-3, 0.5, n),
        "two languages": np.r_[rng.normal(-0.5, 0.7, n // 2), rng.normal(-1.6, 0.7, n - n // 2)],
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
    evidence.observe(torch.arange(4), torch.full((4,), 1e-15, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    assert not evidence.visits.any() and evidence.harm().z == -math.inf and not evidence.harm().shown


def test_the_verdict_is_the_formulas():
    """Against counts over all values, one threshold after the other."""
    rng = np.random.default_rng(2)
    m = np.r_[sound(rng, 300, "normal"), rng.normal(1.5, 0.3, 100)].astype(np.float32).astype(float)
    evidence = evidence_of(m)
    harm = evidence.harm()
    places = np.arange(record_evidence.BINS // 2) * record_evidence.WIDTH
    above = np.array([(m > t).sum() for t in places])
    upper = centre(np.bincount(record_evidence.bins(m), minlength=record_evidence.BINS))[1]
    assert upper > harm.centre

    def beyond(mu: float) -> np.ndarray:
        """B, with its thresholds rounded down to a bin."""
        width = record_evidence.WIDTH
        return np.array([(m <= np.floor((2 * mu - t) / width + 1e-9) * width).sum() for t in places])

    enough = above >= record_evidence.LEAST
    z = (above - beyond(upper))[enough] / np.sqrt((above + beyond(upper))[enough])
    assert harm.z == pytest.approx(z.max())
    curve = np.maximum.accumulate(np.where(above > 0, 1 - (beyond(harm.centre) + 1) / above.clip(1), 0).clip(0))
    np.testing.assert_allclose(harm.curve, curve)
    assert harm.shown and harm.number == (evidence.harmful_share(harm, slice(0, 400)) > 0.5).sum()
    assert harm.number == pytest.approx(100, abs=40)


@pytest.mark.parametrize(("mu", "sd"), [(-0.8, 0.9), (-2.0, 0.5), (-0.3, 1.0)])
def test_the_centre_is_that_of_the_records_below_zero(mu: float, sd: float):
    """With a third of harmful records beside them, and with a tenth of them far below."""
    rng = np.random.default_rng(3)
    m = np.r_[rng.normal(mu, sd, 20_000), rng.normal(1.5, 0.3, 10_000)]
    counts = np.bincount(record_evidence.bins(m), minlength=record_evidence.BINS)
    assert centre(counts)[0] == pytest.approx(mu, abs=0.12)


# ----------------------------------------------------------------------------------------------------------------------
# what it finds


@pytest.mark.parametrize(
    ("kind", "most"), [("normal", 4), ("heavy", 4), ("left", 0), ("far", 0), ("two languages", 4), ("on zero", 10)]
)
def test_sound_records_are_not_called(kind: str, most: int):
    """At most in so many percent; most often if validation and records have nothing to do with each other."""
    rng = np.random.default_rng(4)
    called = sum(evidence_of(sound(rng, N, kind)).harm().shown for _ in range(100))
    assert called <= most


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.8])
def test_harmful_records_are_called(share: float):
    rng = np.random.default_rng(5)
    for _ in range(20):
        n, bad = 5 * N, int(5 * share * N)
        evidence = evidence_of(np.r_[rng.normal(1.2, 0.5, bad), sound(rng, n - bad, "normal")])
        harm = evidence.harm()
        p = evidence.harmful_share(harm, slice(0, n))
        assert harm.shown and p[:bad].mean() > 0.65 and p[bad:].mean() < 0.25
        order = np.argsort(evidence.means(slice(0, n)))
        assert (np.diff(p[order]) >= 0).all()


def test_a_verdict_is_kept_until_it_is_clearly_gone():
    """The same records, of which fewer and fewer are harmful: called at 3.5, forgotten at 2.5."""
    rng = np.random.default_rng(10)
    good, bad = sound(rng, N, "normal"), rng.normal(1.2, 0.5, N)
    evidence, states = evidence_of(good), set()
    for number in [*range(0, N, 2), *range(N, -1, -2)]:
        m = np.r_[good[number // 2 :], bad[:number]]
        held = evidence.shown
        evidence.n, evidence.sums = len(m), torch.from_numpy(m).float()
        evidence.visits = torch.ones(len(m), dtype=torch.int32)
        harm = evidence.harm()
        assert harm.shown == (harm.z > (record_evidence.KEPT if held else CALL))
        states.add((held, record_evidence.KEPT < harm.z <= CALL))
        evidence.note(harm)
        assert evidence.shown == harm.shown
    assert states == {(False, False), (False, True), (True, False), (True, True)}


# ----------------------------------------------------------------------------------------------------------------------
# the rule


def run(weights: SampleWeights, bad: np.ndarray, steps: int, rng: np.random.Generator, batch: int = 32) -> None:
    trait = np.where(bad, 1.2, -0.8) + 0.5 * rng.normal(size=len(bad))
    for step in range(steps):
        ids = rng.permutation(len(bad))[:batch]
        gaps = 1e-3 * (step + 1) * (trait[ids] + 0.5 * rng.normal(size=batch))
        weights.accumulate(torch.from_numpy(ids), torch.from_numpy(gaps))
        weights.step(0.0)


@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_harmful_records_lose_their_weight_and_others_stay_equal(x_map: str):
    rng, bad = np.random.default_rng(6), np.arange(N) % 4 == 0
    weights = SampleWeights(N, None, x_map, 10.0, "auto")
    run(weights, bad, 60, rng)
    c = weights.coefficients(slice(0, N)).numpy()
    assert c[bad].mean() < 0.15 and c.mean() == pytest.approx(1)
    assert np.median(c[~bad]) == pytest.approx(c.max())
    even = SampleWeights(N, None, x_map, 10.0, "auto")
    run(even, np.zeros(N, dtype=bool), 60, rng)
    assert even.effective_share() == pytest.approx(1) and not even.records.harm().shown


def test_while_w_and_u_are_the_same_nothing_moves():
    """The first step sees more than a quarter of the records, and all gaps are 0."""
    weights = SampleWeights(20, None, "sigmoid", 10.0, "auto")
    weights.accumulate(torch.arange(16), torch.zeros(16))
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
            weights.accumulate(torch.from_numpy(ids), torch.from_numpy(trait[ids] + own.normal(size=32)))
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
    bytes_each = sum(value.element_size() for value in weights.records.state_dict().values() if torch.is_tensor(value))
    assert bytes_each == 8
