"""bilevel/step/schedule.py: alpha grows; and any seed that the settings accept gives every process masks of its own."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from run_helpers import train

from bilevel.seeding import dropout_seed, process_seed
from bilevel.settings.fields import Settings
from bilevel.settings.rules import validate
from bilevel.step.schedule import Schedule

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


GIVEN = {"train_data": ["a"], "val_data": ["b"], "model_name_or_path": "m"}


def test_alpha_grows_evenly_from_the_first_step_to_the_last() -> None:
    growing = Schedule(Settings(**GIVEN, alpha=10, alpha_start=2), 5)
    assert [growing.alpha(step) for step in range(5)] == [2, 4, 6, 8, 10]
    assert Schedule(Settings(**GIVEN, alpha=10, alpha_start=2), 1).alpha(0) == 10
    assert {Schedule(Settings(**GIVEN, alpha=3), 5).alpha(step) for step in range(5)} == {3}
    _, problems = validate(GIVEN | {"alpha": 10, "alpha_start": 20})
    assert problems == ["alpha_start 20.0: alpha grows, and ends at 10.0; give at most that, or a larger alpha"]


@pytest.mark.usefixtures("no_old_log")
def test_a_growing_alpha_is_that_of_the_step_for_w_and_for_x(data: Path, tmp_path: Path) -> None:
    """The first gaps that are not 0 are those of w's first step, at alpha_start; x moves by them at the next alpha."""
    changes = {"max_steps": 3, "x_optimizer": "sgd", "lr_x": 1, "x_lr_schedule": "constant", "warmup_ratio": 0}
    moved = {}
    for name, penalty in {
        "first": {"alpha": 2},
        "both": {"alpha": 10, "alpha_start": 2},
        "last": {"alpha": 10},
    }.items():
        metrics = train(data, tmp_path / name, **changes, **penalty)
        moved[name] = np.log(metrics["weight/train_clean"] / metrics["weight/train_noisy"]).iloc[2]
        assert ("alpha" in metrics) == (name == "both")
    assert moved["both"] == pytest.approx(3 * moved["first"], rel=1e-6)
    assert abs(moved["both"]) > 1e-6 and moved["both"] != pytest.approx(moved["last"], rel=0.1)
    assert pd.read_csv(tmp_path / "both" / "metrics.csv")["alpha"].dropna().tolist() == [2, 6, 10]
