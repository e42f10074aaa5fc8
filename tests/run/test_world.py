"""The end of a group of processes."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from run_helpers import settings, train_until
from torch import distributed

import train_bilevel
from bilevel.processes import World


def gloo_threads() -> list[str]:
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def test_no_thread_of_a_group_outlives_it():
    """A thread that lets go of a tensor while Python is taken down aborts the process, after all its work is done."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    distributed.all_reduce(torch.ones(3))
    assert gloo_threads()
    World().leave()
    assert not gloo_threads()
    World().leave()  # plain torch has no group


@pytest.mark.parametrize("code", [0, 143, 2])
def test_a_run_that_ends_in_order_leaves_the_group(data: Path, tmp_path: Path, code: int):
    """A mistake may be one process's alone, and then it must not wait for the others."""
    arguments = settings(data, tmp_path / "r", max_steps=3, **({"val_batch_size": 10**6} if code == 2 else {}))
    with mock.patch.object(World, "leave") as leave:
        assert (train_until(1, arguments) if code == 143 else train_bilevel.main(arguments)) == code
    assert leave.call_count == (code != 2)
