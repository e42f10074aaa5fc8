"""DeepSpeed ZeRO in real processes: the same result as one process of plain torch, and nothing left behind.

One launch per number of processes (tests/workers/zero_worker.py) measures everything; the tests here judge it.
"""

import functools
import itertools
import json
import math
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

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "workers" / "zero_worker.py"
TASKS = {  # compare first: its runs of plain torch must come before any under ZeRO-3
    1: ["compare", "stop", "save", "load", "bf16", "signal"],
    2: ["compare", "stop", "save", "load", "noise", "leak"],
    4: ["compare"],
}
STAGES = range(4)

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def launch(processes: int, folder: Path) -> dict[str, list[dict]]:
    """The reports of all tasks for this number of processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", port]
    command += [WORKER, folder, *TASKS[processes]]
    env = {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    env["LOCAL_SIZE"] = str(processes)  # or DeepSpeed asks numactl in each backward pass
    with (folder / "log").open("w") as log:
        launcher = subprocess.Popen(
            list(map(str, command)), env=os.environ | env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = launcher.wait(timeout=1800)  # it takes five minutes on an idle machine
        except BaseException:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise
    assert code == 0, (folder / "log").read_text()[-5000:]
    return {task: json.loads((folder / f"{task}.json").read_text()) for task in TASKS[processes]}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Callable[[int, str], list[dict]]:
    """report(processes, task): what the task measured; the first call for a number of processes launches them."""

    @functools.cache
    def launched(processes: int) -> dict[str, list[dict]]:
        return launch(processes, tmp_path_factory.mktemp(f"processes{processes}"))

    return lambda processes, task: launched(processes)[task]


def check_case(row: dict, processes: int) -> None:
    """Invariant 2: losses and x to 1e-5, all parameters together to 1e-5, and to 1e-2 of the way they went."""
    assert row["ranks_agree"] and row["x_moved"] > 0.2, row
    for name in ("losses", "norms", "x", "heldout", "relative_u", "relative_w"):
        assert row[name] <= 1e-5, (name, row)
    for name in ("of_displacement_u", "of_displacement_w"):
        assert row[name] <= 1e-2, (name, row)
    # Differences of nearly equal losses, in standard deviations.
    assert (row["trusted"] is None) == (row["weights"] == "source") and (row["trusted"] or 0) <= 1e-3, row
    assert row["clip"] is None or row["clip"] < row["least_norm"], row
    if row["lisa"]:
        check_intervals(row, processes)


def check_intervals(row: dict, processes: int) -> None:
    """Invariant 6: only what is active moves or has moments, and the always-on part carries its own over."""
    holders = processes if row["stage"] == 0 else 1  # stage 0 shares nothing out
    for number, interval in enumerate(row["intervals"]):
        assert interval["moved"] == interval["active"], row
        assert interval["moments"] == holders * interval["active_size"], row
        assert interval["carried"] == (holders * interval["always_size"] if number else 0), row
    first, second, third = (interval["drawn"] for interval in row["intervals"])
    assert first["w"] == third["w"] != second["w"], row
    assert (first["u"] == first["w"]) == (row["lisa"] == "shared"), row


@pytest.mark.parametrize("processes", TASKS)
def test_every_stage_follows_one_process_of_plain_torch(report, processes):
    found = [row for row in report(processes, "compare") if row["file"] is None and row["lisa"] != "independent"]
    rows = [row for row in found if row["order"] == 1 and not row["packed"]]
    chosen = {
        "stage": STAGES,
        "lisa": (None, "shared"),
        "weights": ("source", "sample"),
        "checkpointing": (False, True),
    }
    together = ["stage", "lisa", "weights"] if processes == 2 else ["stage", "lisa"]
    assert len(rows) == math.prod(len(chosen[name]) for name in together)
    for names in [together, *itertools.combinations(chosen, 2)]:
        assert {tuple(row[name] for name in names) for row in rows} == set(itertools.product(*map(chosen.get, names)))
    for row in rows:
        check_case(row, processes)


@pytest.mark.parametrize("processes", [2, 4])
def test_packed_rows_follow_one_process_with_padded_ones(report, processes):
    rows = [row for row in report(processes, "compare") if row["packed"]]
    assert [(row["stage"], row["lisa"]) for row in rows] == [(2, None), (3, None), (3, "shared")]
    for row in rows:
        check_case(row, processes)


def test_offloading_changes_nothing(report):
    rows = [row for row in report(1, "compare") if row["file"] is not None]
    assert [(row["stage"], row["lisa"]) for row in rows] == [(2, None), (3, None), (2, "shared"), (3, "shared")]
    for row in rows:
        check_case(row, 1)


def test_order_2_follows_one_process_of_plain_torch(report):
    rows = [row for row in report(2, "compare") if row["order"] == 2]
    assert [(row["stage"], row["lisa"]) for row in rows] == [(2, None), (3, "shared")]
    for row in rows:
        check_case(row, 2)


def test_copies_that_draw_blocks_of_their_own(report):
    (row,) = [row for row in report(2, "compare") if row["lisa"] == "independent"]
    check_case(row, 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_one_rank_sees_that_is_not_finite_stops_all_before_anything_moves(report, processes):
    """Invariant 8; and with that step left out, the next ones are as if it had never been, at every stage."""
    rows = report(processes, "stop")
    assert len(rows) == 12 and {row["what"] for row in rows} == {"loss", "gradient"}
    for row in rows:
        assert row["stopped_ranks"] == processes and row["moved"] == [] and row["seen"] == 0, row
        if row["what"] == "loss":
            assert not row["suspects"]["train"] and len(row["suspects"]["val"]) == 1, row
        else:
            assert row["suspects"] == {"train": list(range(1, 11)), "val": list(range(1, 11))}, row
        assert row["apart"] == [], row


@pytest.mark.parametrize("processes", [1, 2])
def test_a_saved_model_is_loaded_by_plain_transformers(report, processes):
    for row in report(processes, "save"):
        model = AutoModelForCausalLM.from_pretrained(row["folder"]).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(row["ids"])).logits
        torch.testing.assert_close(logits, torch.tensor(row["logits"]), rtol=1e-5, atol=1e-5)
        assert (logits - torch.tensor(row["start"])).abs().max() > 0.05  # it is the trained one
        assert AutoTokenizer.from_pretrained(row["folder"]).eos_token == "0"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sharded_model_is_loaded_in_partitions(report, processes):
    """Both copies are the folder's weights exactly; at stage 3 no process ever holds a whole parameter."""
    rows = report(processes, "load")
    kinds = [(stage, dtype) for stage in (2, 3) for dtype in ("fp32", "bf16")]
    assert [(row["stage"], row["dtype"]) for row in rows] == kinds
    for row in rows:
        assert len(list(Path(row["folder"]).glob("model-*.safetensors"))) > 3
        original = AutoModelForCausalLM.from_pretrained(row["folder"], dtype=torch.float32)
        size = original.num_parameters()
        for name in "uw":
            state = torch.load(row[name])
            assert state.keys() == original.state_dict().keys()
            for key, value in original.state_dict().items():
                wanted = value.bfloat16() if row["dtype"] == "bf16" else value
                assert state[key].dtype == wanted.dtype and torch.equal(state[key], wanted), (key, row)
        for held in row["held"]:
            assert len(held) == processes
            for rank in held:
                assert rank["dtypes"] == [str(torch.bfloat16 if row["dtype"] == "bf16" else torch.float32)], row
                if row["stage"] == 3:
                    assert rank["whole"] == 0 and size <= processes * rank["partitions"] <= 1.01 * size, row
                else:
                    assert rank["whole"] == size and rank["partitions"] == 0, row
        assert row["apart"], row


def test_bf16_masters_go_where_fp32_goes(report):
    """60 steps of LISA at lr_y 1e-5: most of them are below bf16's resolution."""
    rows = {(row["stage"], row["residual"]): row for row in report(1, "bf16")}
    lossy = rows.pop((2, "off"))
    assert set(rows) == {(0, "device"), (1, "device"), (2, "device"), (2, "host"), (3, "device")}
    for row in rows.values():
        assert abs(row["ratio"] - 1) <= 0.05 and row["cosine"] >= 0.99 and 0 < row["x"] <= 0.05, row
    assert rows[2, "host"]["as_device"] and not lossy["as_device"]
    for name in ("device", "host"):
        assert abs(lossy["ratio"] - 1) > abs(rows[2, name]["ratio"] - 1)
        assert 1 - lossy["cosine"] > 10 * (1 - rows[2, name]["cosine"])


def test_gaps_in_bf16_are_those_of_fp32_in_the_safe_region(report):
    *safe, hopeless = report(1, "signal")
    assert [row["lr_y"] for row in safe] == [1e-5, 1e-4]
    for row in safe:
        assert row["correlation"] >= 0.9 and row["signal"] >= 0.9, row
        assert abs(row["signal"] - row["correlation"]) < 0.05, row
    assert hopeless["lr_y"] == 1e-7 and hopeless["signal"] < 0.3, hopeless


def test_the_noise_of_rounding_is_known_to_all_ranks(report):
    for row in report(2, "noise"):
        assert row["ranks_agree"] and all(row["noise"]), row


def test_a_hundred_draws_leave_nothing_behind(report):
    """Nothing grows with the number of draws, and a copy that is taken down leaves nothing."""
    rows = report(2, "leak")
    assert [row["stage"] for row in rows] == [2, 3]
    for row in rows:
        assert row["rows"][-1]["switch"] == 100
        for first, *later in zip(*(measured["ranks"] for measured in row["rows"]), strict=True):
            for other in later:
                assert {**other, "rss": 0} == {**first, "rss": 0}, row
            assert later[-1]["rss"] <= 1.03 * first["rss"], row
            assert first["storage"] == first["own"], row
        before, left = row["rows"][-1]["ranks"][0], row["left"]
        assert left["engines"] == before["engines"] - 1
        assert left["hooks"] < before["hooks"] and left["parameter_hooks"] == 0
        assert left["storage"] == left["own"]
