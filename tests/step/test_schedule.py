"""bilevel/step/schedule.py: any seed that the settings accept gives every process masks of its own."""

from pathlib import Path

import pytest
import torch
from run_helpers import train

from bilevel.seeding import dropout_seed, process_seed

LARGEST = 2**63 - 1  # that the settings accept


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31 - 1, LARGEST])
def test_16_processes_and_their_micro_batches_draw_from_seeds_of_their_own(seed: int) -> None:
    seeds = [
        process_seed(dropout_seed(seed, step) + micro, rank, 16)
        for step in (0, 1, 10**6)
        for micro in range(300)
        for rank in range(16)
    ]
    assert len(set(seeds)) == len(seeds)
    for one in (min(seeds), max(seeds)):
        torch.Generator().manual_seed(one)


def test_micro_batches_count_on_where_64_bits_end() -> None:
    assert [process_seed(2**64 - 2 + micro, 0, 1) for micro in range(4)] == [2**64 - 2, 2**64 - 1, 0, 1]
    assert [process_seed(2**60 - 1 + micro, 15, 16) for micro in range(2)] == [2**64 - 1, 15]


def test_what_fits_into_64_bits_is_left_as_it_is() -> None:
    assert dropout_seed(7, 3) == 700_023_400_072
    assert process_seed(dropout_seed(7, 3) + 5, 2, 4) == 4 * (dropout_seed(7, 3) + 5) + 2


@pytest.mark.usefixtures("no_old_log")
@pytest.mark.parametrize("method", [pytest.param("f2sa", marks=pytest.mark.slow), "align"])
def test_a_run_with_the_largest_seed(method: str, data: Path, tmp_path: Path) -> None:
    metrics = train(data, tmp_path / "run", method=method, seed=LARGEST, dropout=0.1, max_steps=2)
    assert metrics["step"].iloc[-1] == 2
