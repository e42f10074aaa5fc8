"""bilevel/seeding.py: a bijection, uniform by chi-square with fixed keys, in memory that does not grow with n."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy.stats import chisquare, norm

from bilevel.seeding import Permutation

KEYS = 2000  # permutations of each statistic


def orders(n: int, count: int = KEYS) -> np.ndarray:
    """(count, n): whole permutations by different keys, computed together: each round's numbers stand in a column."""
    each = [Permutation(n, f"seed 0, epoch {epoch}") for epoch in range(count)]
    together = Permutation(n, "")
    numbers = np.array([permutation.rounds for permutation in each])  # (count, rounds, 3)
    together.rounds = [tuple(numbers[:, number].T[..., None]) for number in range(numbers.shape[1])]
    found = together(np.tile(np.arange(n), (count, 1)))
    assert np.array_equal(found[-1], each[-1](np.arange(n)))
    return found


def is_uniform(values: np.ndarray, cells: int) -> bool:
    """Whether integers in 0..cells-1 could be uniform; a true null fails once in 10,000 tests."""
    return bool(chisquare(np.bincount(values, minlength=cells)).pvalue > 1e-4)


def has_mean(values: np.ndarray, mean: float, variance: float) -> bool:
    """Whether independent values with this mean and variance could be these; a true null fails once in 10,000 tests."""
    z = (values.mean() - mean) / math.sqrt(variance / len(values))
    return bool(2 * norm.sf(abs(z)) > 1e-4)


@pytest.mark.parametrize(
    "n", [*range(1, 70), 127, 128, 1000, 4097, 65_536, 99_991, pytest.param(1_000_000, marks=pytest.mark.slow)]
)
def test_every_number_stands_at_one_place(n: int):
    for key in ("a", "b"):
        assert np.array_equal(np.sort(Permutation(n, key)(np.arange(n))), np.arange(n))


@pytest.mark.parametrize("n", [10**8, 2**40, 2**62])
def test_places_of_a_huge_order(n: int):
    places = np.unique(np.random.default_rng(0).integers(n, size=100_000))
    found = Permutation(n, "a")(places)
    assert found.dtype == np.int64 and len(np.unique(found)) == len(places)
    assert found.min() >= 0 and found.max() < n and is_uniform((found // (n / 100)).astype(int), 100)


def test_an_order_is_a_function_of_its_key():
    """Pinned: with other numbers runs could not be made again."""
    assert Permutation(10, "seed 0, epoch 0")(np.arange(10)).tolist() == [3, 4, 0, 2, 8, 7, 5, 6, 9, 1]
    assert Permutation(10**8, "seed 0, epoch 0")(np.arange(4)).tolist() == [42674631, 69040462, 77765192, 26798996]
    one = Permutation(1000, "a")
    assert np.array_equal(one(np.arange(1000))[[3, 500, 3]], one(np.array([3, 500, 3])))
    assert not np.array_equal(one(np.arange(1000)), Permutation(1000, "b")(np.arange(1000)))


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_all_orders_of_few_things_are_as_likely(n: int):
    every = {order: number for number, order in enumerate(itertools.permutations(range(n)))}
    assert is_uniform(np.array([every[tuple(order)] for order in orders(n, 4000).tolist()]), len(every))


@pytest.mark.parametrize("n", [7, 16, 25, 101])
def test_positions_pairs_and_neighbours_are_uniform(n: int):
    found = orders(n)
    for place in (0, 1, n // 2, n - 1):
        assert is_uniform(found[:, place], n)
    for number in (0, n // 2, n - 1):
        assert is_uniform((found == number).argmax(1), n)
    for one, other in ((0, 1), (n // 2, n // 2 + 1), (0, n - 1), (1, n // 2)):
        a, b = found[:, one], found[:, other]
        assert is_uniform(a * (n - 1) + b - (b > a), n * (n - 1))  # ordered pairs
        assert is_uniform((b - a) % n - 1, n - 1)
        assert is_uniform((a + b) % n, n) or n % 2 == 0


@pytest.mark.parametrize("n", [8, 9, 12, 25, 200])
def test_there_is_no_structure_in_an_order(n: int):
    """Statistics of whole permutations against their exact mean and variance under uniform ones."""
    found = orders(n)
    harmonic = [sum(1 / k**power for k in range(1, n + 1)) for power in (1, 2)]
    assert has_mean((found == np.arange(n)).sum(1), 1, 1)  # fixed points
    assert has_mean(np.array([cycles(order) for order in found.tolist()]), harmonic[0], harmonic[0] - harmonic[1])
    assert has_mean((np.diff(found) < 0).sum(1), (n - 1) / 2, (n + 1) / 12)  # descents
    assert has_mean(np.diff(found) == 1, 1 / n, 1 / n)  # numbers followed by the next
    inversions = sum((found[:, i : i + 1] > found[:, i + 1 :]).sum(1) for i in range(n - 1))
    assert has_mean(inversions, n * (n - 1) / 4, n * (n - 1) * (2 * n + 5) / 72)
    assert is_uniform(inversions % 2, 2)  # both parities


def cycles(order: list[int]) -> int:
    count, left = 0, set(range(len(order)))
    while left:
        place, count = left.pop(), count + 1
        while (place := order[place]) in left:
            left.remove(place)
    return count


def test_neighbours_in_a_large_order_are_strangers():
    """Within one permutation of 1e8: consecutive batches, and how far numbers that stand together lie apart."""
    n, count = 10**8, 200_000
    for start in (0, n // 3, n - count):
        found = Permutation(n, "seed 5, epoch 2")(np.arange(start, start + count))
        assert is_uniform(found * 1000 // n, 1000)
        assert is_uniform((found[1:] - found[:-1]) % n * 1000 // n, 1000)
        pairs = found * 30 // n
        assert is_uniform(pairs[:-1:2] * 30 + pairs[1::2], 900)
        assert is_uniform(found % 64, 64)
        assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 4 / math.sqrt(count)


def test_epochs_and_seeds_have_nothing_in_common():
    n, count = 10**6, 100_000
    first = Permutation(n, "seed 0, epoch 0")(np.arange(count))
    for key in ("seed 0, epoch 1", "seed 1, epoch 0", "seed 10, epoch 0"):
        other = Permutation(n, key)(np.arange(count))
        assert is_uniform((first - other) % n * 1000 // n, 1000)
        common = len(np.intersect1d(first, other))  # hypergeometric, sd 90
        assert abs(common - count**2 / n) < 400


def test_memory_does_not_grow_with_n():
    peaks = []
    for n in (10**4, 10**8):
        tracemalloc.start()
        Permutation(n, "a")(np.arange(64))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 50_000
