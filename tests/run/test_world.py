"""The end of a group of processes."""

import itertools
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from run_helpers import settings, train_until
from torch import distributed

import train_bilevel
from bilevel import processes
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


class CountOfEachThread(threading.local):
    def __init__(self):
        self.count = itertools.count()

    def __next__(self) -> int:
        return next(self.count)


def test_the_others_wait_for_the_main_process_and_are_told_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """Two blocks, in three threads that stand for processes; the clock runs 600 times as fast."""
    store, order = distributed.HashStore(), []
    monkeypatch.setattr(processes, "_store", lambda: store)
    monkeypatch.setattr(processes, "ASK", 0.001)
    monkeypatch.setattr(processes, "TELL", 0.1)
    monkeypatch.setattr(processes, "_words", CountOfEachThread())

    def process(rank: int) -> None:
        for block in range(2):
            with World(rank, 3).main_first("reading"):
                if rank == 0:
                    time.sleep(0.35)
                order.append((block, rank))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [rank for block, rank in order if block == 0][0] == 0 == [rank for block, rank in order if block == 1][0]
    assert len(order) == 6
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "reading: minute 1; the other processes wait for it" and said.count(said[0]) == 2


@pytest.mark.parametrize("code", [0, 143, 2])
def test_a_run_that_ends_in_order_leaves_the_group(data: Path, tmp_path: Path, code: int):
    """A mistake may be one process's alone, and then it must not wait for the others."""
    arguments = settings(data, tmp_path / "r", max_steps=3, **({"val_batch_size": 10**6} if code == 2 else {}))
    with mock.patch.object(World, "leave") as leave:
        assert (train_until(1, arguments) if code == 143 else train_bilevel.main(arguments)) == code
    assert leave.call_count == (code != 2)
