"""DeepSpeed ZeRO in real processes: the same result as one process of plain torch, and nothing left behind.

One launch per number of processes does everything (tests/zero_worker.py); the tests here judge what it measured.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WORKER = Path(__file__).parent / "zero_worker.py"
TASKS = {
    1: ["compare_half", "stop", "save"],
    2: ["compare", "stop", "save", "leak"],
    4: ["compare_half"],
}
STAGES = range(4)

pytestmark = pytest.mark.slow


def launch(processes: int, tasks: list[str], folder: Path, timeout: int = 600) -> dict[str, list[dict]]:
    """The reports of the tasks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", port]
    command += [WORKER, folder, *tasks]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        launcher = subprocess.Popen(list(map(str, command)), env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            code = launcher.wait(timeout)
        except BaseException:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise
    assert code == 0, (folder / "log").read_text()[-5000:]
    return {task: json.loads((folder / f"{task}.json").read_text()) for task in tasks}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Callable[[int, str], list[dict]]:
    """report(processes, task): what the task measured; the first call for a number of processes launches them."""

    @functools.cache
    def launched(processes: int) -> dict[str, list[dict]]:
        return launch(processes, TASKS[processes], tmp_path_factory.mktemp(f"processes{processes}"))

    def task(processes: int, name: str) -> list[dict]:
        reports = launched(processes)
        return next(rows for key, rows in reports.items() if key.startswith(name))

    return task


def check_cases(rows: list[dict], processes: int) -> None:
    """Invariant 2: losses and x to 1e-5, all parameters together to 1e-5, and to 1e-2 of the way they went."""
    for row in rows:
        assert row["ranks_agree"] and row["x_moved"] > 0.2, row
        for name in ("losses", "norms", "x", "heldout", "relative_u", "relative_w"):
            assert row[name] <= 1e-5, (name, row)
        for name in ("of_displacement_u", "of_displacement_w"):
            assert row[name] <= 1e-2, (name, row)
        assert row["clip"] is None or row["clip"] < row["least_norm"], row
        assert len(row["intervals"]) == (3 if row["lisa"] else 0)
        check_intervals(row, processes)


def check_intervals(row: dict, processes: int) -> None:
    """Invariant 6: only what is active moves or has moments, and the always-on part carries its own over."""
    holders = processes if row["stage"] == 0 else 1  # stage 0 shares nothing out
    for number, interval in enumerate(row["intervals"]):
        assert interval["moved"] == interval["active"], row
        assert interval["moments"] == holders * interval["active_size"], row
        assert interval["carried"] == (holders * interval["always_size"] if number else 0), row
    blocks = [set(interval["active"]) for interval in row["intervals"]]
    assert not blocks or blocks[0] == blocks[2] != blocks[1]


@pytest.mark.parametrize("processes", TASKS)
def test_every_stage_follows_one_process_of_plain_torch(report, processes):
    rows = report(processes, "compare")
    kinds = {(row["stage"], row["lisa"]) for row in rows}
    assert len(kinds) == 8 and {row["weights"] for row in rows} == {"source", "sample"}
    assert len(rows) == (16 if processes == 2 else 8)
    check_cases(rows, processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_both_kinds_of_weights_under_every_stage(tmp_path, processes):
    rows = launch(processes, ["compare"], tmp_path)["compare"]
    assert len(rows) == 16
    check_cases(rows, processes)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_one_rank_sees_that_is_not_finite_stops_all_before_anything_moves(report, processes):
    """Invariant 8."""
    rows = report(processes, "stop")
    assert [(row["stage"], row["what"]) for row in rows] == [(k, what) for k in STAGES for what in ("loss", "gradient")]
    for row in rows:
        assert row["stopped_ranks"] == processes and row["moved"] == [] and row["seen"] == 0, row


@pytest.mark.parametrize("processes", [1, 2])
def test_a_saved_model_is_loaded_by_plain_transformers(report, processes):
    for row in report(processes, "save"):
        model = AutoModelForCausalLM.from_pretrained(row["folder"]).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(row["ids"])).logits
        torch.testing.assert_close(logits, torch.tensor(row["logits"]), rtol=1e-5, atol=1e-5)
        assert (logits - torch.tensor(row["start"])).abs().max() > 0.05  # it is the trained one
        assert AutoTokenizer.from_pretrained(row["folder"]).eos_token == "0"


def check_leaks(rows: list[dict]) -> None:
    """Nothing grows with the number of draws, and a copy that is taken down leaves nothing."""
    assert [row["stage"] for row in rows] == [2, 3]
    for row in rows:
        for first, *later in zip(*(measured["ranks"] for measured in row["rows"]), strict=True):
            for other in later:
                assert {**other, "rss": 0} == {**first, "rss": 0}, row
            assert later[-1]["rss"] <= 1.03 * first["rss"], row
            assert first["storage"] == first["own"], row
        before, left = row["rows"][-1]["ranks"][0], row["left"]
        assert left["engines"] == before["engines"] - 1
        assert left["hooks"] < before["hooks"] and left["parameter_hooks"] == 0
        assert left["storage"] == left["own"]


def test_draws_leave_nothing_behind(report):
    check_leaks(report(2, "leak"))


@pytest.mark.slow
def test_a_hundred_draws_leave_nothing_behind(tmp_path):
    rows = launch(2, ["leak_long"], tmp_path)["leak_long"]
    assert all(row["rows"][-1]["switch"] == 100 for row in rows)
    check_leaks(rows)
