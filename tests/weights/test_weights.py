"""x, its coefficients, its closed-form gradient and its optimizer, against autograd and torch.optim."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.data.stream import BatchStream
from bilevel.weights.learned import SampleWeights, SourceWeights

ALPHA = 7.0


def source_weights(n: int = 60, optimizer: str = "adam") -> SourceWeights:
    source_ids = torch.tensor([0, 0, 0, 1, 2, 2]).repeat(n // 6)
    return SourceWeights(source_ids, torch.tensor([0.2, 0.5, 0.3]), ALPHA, optimizer)


def sample_weights(x_map: str, n: int = 50, optimizer: str = "adam") -> SampleWeights:
    weights = SampleWeights(n, None, x_map, ALPHA, optimizer)
    weights.x = torch.randn(n, generator=torch.Generator().manual_seed(1))
    weights.refresh()
    return weights


def gaps(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def autograd_gradient(weights: SourceWeights | SampleWeights, gap: torch.Tensor) -> torch.Tensor:
    """d/dx alpha (1/N) sum_i c_i(x) gap_i, by autograd through the definition of c."""
    x = weights.x.double().requires_grad_()
    n = len(gap)
    if isinstance(weights, SourceWeights):
        c = n * (torch.softmax(x, 0) / weights.sizes)[weights.source_ids]
    elif weights.x_map == "sigmoid":
        c = torch.sigmoid(x) / torch.sigmoid(x).mean()
    else:
        c = n * torch.softmax(x, 0)
    torch.testing.assert_close(weights.coefficients(torch.arange(n)), c.detach())
    return torch.autograd.grad(ALPHA / n * (c * gap).sum(), x)[0]


def test_source_gradient_on_the_whole_data_set_is_autograds():
    weights, gap = source_weights(), gaps(60)
    for part in torch.arange(60).split(7):
        weights.accumulate(part, gap[part])
    index, gradient = weights.gradient()
    assert index.tolist() == [0, 1, 2]
    torch.testing.assert_close(gradient, autograd_gradient(weights, gap), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_sample_gradient_on_the_whole_data_set_is_autograds(x_map: str):
    weights, gap = sample_weights(x_map), gaps(50)
    for part in torch.randperm(50).split(7):
        weights.accumulate(part, gap[part])
    index, gradient = weights.gradient()
    assert index.tolist() == list(range(50))
    torch.testing.assert_close(gradient, autograd_gradient(weights, gap), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", [source_weights(), sample_weights("sigmoid"), sample_weights("softmax")])
def test_coefficients_have_mean_one(weights: SourceWeights | SampleWeights):
    n = 60 if isinstance(weights, SourceWeights) else 50
    assert float(weights.coefficients(torch.arange(n)).mean()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("make", [source_weights, lambda: sample_weights("sigmoid"), lambda: sample_weights("softmax")])
def test_what_all_gaps_have_in_common_cancels(make):
    plain, shifted = make(), make()
    ids, gap = torch.arange(12), gaps(12)
    plain.accumulate(ids, gap)
    shifted.accumulate(ids, gap + 100)
    torch.testing.assert_close(plain.gradient()[1], shifted.gradient()[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [source_weights, lambda: sample_weights("sigmoid"), lambda: sample_weights("softmax")])
def test_zero_gaps_leave_x_where_it_is(make):
    weights = make()
    before = weights.x.clone()
    weights.accumulate(torch.arange(12), torch.zeros(12))
    weights.step(0.1)
    assert torch.equal(weights.x, before)


def test_sources_not_seen_do_not_move():
    weights = source_weights()
    before = weights.x.clone()
    weights.accumulate(torch.tensor([0, 3]), torch.tensor([1.0, -1.0]))  # sources 0 and 1
    weights.step(0.1)
    assert weights.x[2] == before[2] and weights.optimizer.count.tolist() == [1, 1, 0]
    assert weights.x[0] < before[0] and weights.x[1] > before[1]


def test_one_source_alone_says_nothing():
    weights = source_weights()
    before = weights.x.clone()
    weights.accumulate(torch.tensor([0, 1, 2]), torch.tensor([1.0, -1.0, 3.0]))
    weights.step(0.1)
    assert torch.equal(weights.x, before) and weights.optimizer.count.sum() == 0


def test_samples_not_seen_do_not_move():
    weights = sample_weights("sigmoid")
    before = weights.x.clone()
    weights.accumulate(torch.tensor([4, 9]), torch.tensor([1.0, -1.0]))
    weights.step(0.1)
    assert (weights.x != before).nonzero().flatten().tolist() == [4, 9]


def test_gradients_of_all_steps_since_the_last_count():
    """Two batches before a step of x are one batch of their union, whatever their order; then all is forgotten."""
    for make in (source_weights, lambda: sample_weights("sigmoid")):
        once, twice = make(), make()
        ids, gap = torch.tensor([5, 1, 30, 22, 8, 5]), gaps(6)
        once.accumulate(ids, gap)
        twice.accumulate(ids[4:], gap[4:])
        twice.accumulate(ids[:4], gap[:4])
        for weights in (once, twice):
            weights.step(0.1)
        torch.testing.assert_close(once.x, twice.x, rtol=1e-12, atol=1e-12)
        before = once.x.clone()
        once.step(0.1)
        assert torch.equal(once.x, before)


@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_the_first_step_is_the_same_for_every_n(x_map: str):
    ids, gap = torch.tensor([3, 77, 4096, 9999]), gaps(4)
    moves = []
    for n in (10_000, 10_000_000):
        for optimizer in ("adam", "sgd"):
            weights = SampleWeights(n, None, x_map, ALPHA, optimizer)
            weights.accumulate(ids, gap)
            weights.step(0.1)
            moves.append(weights.x[ids])
    torch.testing.assert_close(moves[0], moves[2])
    torch.testing.assert_close(moves[1], moves[3])
    assert moves[0].abs().min() > 0.09  # Adam: a whole lr, in spite of eps


def test_adam_is_torchs_where_every_step_visits():
    weights = sample_weights("sigmoid", n=6)
    parameter = weights.x.clone().requires_grad_()
    reference = torch.optim.Adam([parameter], lr=0.05)
    for step in range(20):
        weights.accumulate(torch.arange(6), gaps(6) * step)
        parameter.grad = weights.gradient()[1].float()
        weights.step(0.05)
        reference.step()
        torch.testing.assert_close(weights.x, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_adam_counts_each_entrys_own_visits():
    """An entry visited first at step 1000 moves as one visited first at step 1."""
    weights = SampleWeights(4, None, "sigmoid", ALPHA, "adam")
    for _ in range(1000):
        weights.accumulate(torch.tensor([0, 1]), torch.tensor([1.0, -1.0]))
        weights.step(1e-4)
    weights.accumulate(torch.tensor([2, 3]), torch.tensor([1.0, -1.0]))
    weights.step(0.1)
    torch.testing.assert_close(weights.x[2:], torch.tensor([-0.1, 0.1]), rtol=1e-4, atol=0)


def test_sgd_steps_by_the_gradient():
    weights = source_weights(optimizer="sgd")
    before = weights.x.clone()
    weights.accumulate(torch.arange(60), gaps(60))
    gradient = weights.gradient()[1]
    weights.step(0.3)
    torch.testing.assert_close(weights.x, before - 0.3 * gradient)


def test_mirror_descent_multiplies_sources_by_the_exponential_of_their_gaps():
    """On the simplex: p_k exp(-lr alpha gap_k), normalised, with the mean gap of each source."""
    weights, gap = source_weights(optimizer="mirror"), gaps(60)
    mean = torch.zeros(3, dtype=torch.float64).index_add_(0, weights.source_ids, gap) / weights.sizes
    expected = weights.p * torch.exp(-0.3 * ALPHA * mean)
    for part in torch.arange(60).split(7):
        weights.accumulate(part, gap[part])
    weights.step(0.3)
    torch.testing.assert_close(weights.p, expected / expected.sum())
    assert weights.optimizer.state_dict() == {}


def test_mirror_descent_multiplies_samples_by_the_exponential_of_their_gaps():
    weights, gap = sample_weights("softmax", optimizer="mirror"), gaps(50)
    expected = weights.coefficients(torch.arange(50)) * torch.exp(-0.3 * ALPHA * gap)
    weights.accumulate(torch.arange(50), gap)
    weights.step(0.3)
    torch.testing.assert_close(
        weights.coefficients(torch.arange(50)), expected * 50 / expected.sum(), rtol=1e-5, atol=0
    )


def test_mirror_descent_multiplies_the_odds_of_sigmoids():
    weights, gap = sample_weights("sigmoid", optimizer="mirror"), gaps(50)
    odds, c = torch.exp(weights.x.double()), weights.coefficients(torch.arange(50))
    expected = odds * torch.exp(-0.3 * ALPHA * (gap - (c * gap).mean()))
    weights.accumulate(torch.arange(50), gap)
    weights.step(0.3)
    torch.testing.assert_close(torch.exp(weights.x.double()), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_mirror_descent_moves_samples_alike_for_every_batch_size_and_weight(x_map: str):
    """Where SGD's steps are smaller in larger batches, and nearly nothing where a weight is nearly 0."""
    moved = {}
    for optimizer in ("mirror", "sgd"):
        for times in (1, 4):
            weights = SampleWeights(16, None, x_map, ALPHA, optimizer)
            weights.x[:2] = -9.0
            weights.refresh()
            before, ids = weights.x.clone(), torch.arange(4 * times)
            weights.accumulate(ids, torch.tensor([-1.0, 1.0, -1.0, 1.0]).repeat(times))
            weights.step(0.1)
            moved[optimizer, times] = (weights.x - before)[:4]
    torch.testing.assert_close(
        moved["mirror", 1], 0.1 * ALPHA * torch.tensor([1.0, -1.0, 1.0, -1.0]), rtol=2e-3, atol=0
    )
    torch.testing.assert_close(moved["mirror", 1], moved["mirror", 4], rtol=2e-3, atol=0)
    assert moved["sgd", 1][0] < 1e-3 * moved["sgd", 1][2] and moved["sgd", 4][2] < 0.3 * moved["sgd", 1][2]


@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_the_running_normaliser_stays_exact(x_map: str):
    weights = SampleWeights(1000, None, x_map, ALPHA, "adam")
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        weights.accumulate(torch.randint(1000, (32,), generator=generator), torch.randn(32, generator=generator))
        weights.step(0.5)
    running = weights.coefficients(torch.arange(1000))
    weights.refresh()
    torch.testing.assert_close(running, weights.coefficients(torch.arange(1000)), rtol=1e-9, atol=0)
    assert weights.x.abs().max() > 5


def test_softmax_survives_large_x():
    weights = SampleWeights(4, None, "softmax", ALPHA, "sgd")
    weights.accumulate(torch.arange(4), torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    weights.step(500.0)
    assert weights.x.max() > 700  # exp of it is infinite
    torch.testing.assert_close(weights.coefficients(torch.arange(4)), torch.tensor([4.0, 0, 0, 0]).double())


@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_a_step_makes_nothing_of_the_size_of_the_data(x_map: str):
    """What every operation of a step makes, whatever N; memory is 16 bytes per sample, and for the order none."""
    made = []
    for n in (10_000, 1_000_000):
        weights, stream = SampleWeights(n, None, x_map, ALPHA, "adam"), BatchStream(n, 64, seed=0)
        with SizesMade() as sizes:
            for _ in range(3):
                ids = next(stream)
                weights.coefficients(ids)
                weights.accumulate(ids, gaps(64))
            weights.step(0.1)
        made.append(sizes.made)
        held = (weights.x, *weights.optimizer.state_dict().values())
        assert sum(tensor.nbytes for tensor in held) == 16 * n
        assert sum(map(torch.numel, filter(torch.is_tensor, vars(weights).values()))) == n
    assert made[0] == made[1] and max(made[0]) <= 3 * 64


class SizesMade(TorchDispatchMode):
    """Entries of every tensor that an operation returns, unless it is one that it was given to write into."""

    def __init__(self):
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        results = function(*arguments, **(named or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if torch.is_tensor(result) and not any(result is argument for argument in arguments):
                self.made.append(result.numel())
        return results


@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_the_normaliser_is_the_same_in_parts(x_map: str, monkeypatch: pytest.MonkeyPatch):
    whole = sample_weights(x_map, n=1000)
    share, start = whole.effective_share(), whole.coefficients(torch.arange(1000))
    again = SampleWeights(1000, start, x_map, ALPHA, "adam")
    monkeypatch.setattr("bilevel.weights.chunks.CHUNK", 64)
    in_parts = sample_weights(x_map, n=1000)
    assert in_parts.total == pytest.approx(whole.total, rel=1e-13)
    assert in_parts.effective_share() == pytest.approx(share, rel=1e-13)
    assert torch.equal(SampleWeights(1000, start, x_map, ALPHA, "adam").x, again.x)


@pytest.mark.parametrize("x_map", ["sigmoid", "softmax"])
def test_start_values_are_met(x_map: str):
    start = torch.tensor([0.5, 3.0, 0.25, 0.25], dtype=torch.float64)
    weights = SampleWeights(4, start, x_map, ALPHA, "adam")
    torch.testing.assert_close(weights.coefficients(torch.arange(4)), start, rtol=1e-6, atol=1e-6)
    assert torch.equal(
        SampleWeights(4, None, x_map, ALPHA, "adam").coefficients(torch.arange(4)), torch.ones(4).double()
    )
    sources = SourceWeights(torch.tensor([0, 0, 0, 1]), torch.tensor([0.75, 0.25]), ALPHA, "adam")
    torch.testing.assert_close(sources.coefficients(torch.arange(4)), torch.ones(4).double())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_sigmoids_start_where_they_should(share: float):
    """All alike, from a file whose weights are all alike, and where a file's weights leave room below 1."""
    weights = SampleWeights(4, None, "sigmoid", ALPHA, "mirror", share)
    torch.testing.assert_close(torch.sigmoid(weights.x), torch.full((4,), share))
    assert torch.equal(weights.coefficients(slice(None)), torch.ones(4, dtype=torch.float64))
    for start in (torch.ones(4), torch.tensor([0.5, 3.0, 0.25, 0.25])):
        again = SampleWeights(4, start, "sigmoid", ALPHA, "mirror", share)
        torch.testing.assert_close(again.coefficients(slice(None)), start.double(), rtol=1e-5, atol=1e-5)
        assert float(torch.sigmoid(again.x).mean()) == pytest.approx(
            share if 3 * share < 0.95 or start[0] == 1 else 0.98 / 3, rel=0.05
        )


def test_from_sigmoids_near_one_no_record_rises_above_its_equals():
    """The same gaps, once from the middle and once from the top: there the good stay beside each other."""
    spread = {}
    for share in (0.5, 0.98):
        weights = SampleWeights(6, None, "sigmoid", ALPHA, "mirror", share)
        weights.accumulate(torch.arange(6), torch.tensor([-0.4, -0.2, 0.0, 0.2, 0.4, 3.0]))
        weights.step(0.5)
        c = weights.coefficients(slice(None))
        assert c[5] < 0.1 * c[4]
        spread[share] = float(c[0] / c[4])
    assert spread[0.98] < 1 + 0.2 * (spread[0.5] - 1)
