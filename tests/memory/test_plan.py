"""The memory plan: its tensors against measured bytes, the shipped shapes, the run files."""

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from run_helpers import ROOT

from bilevel.memory.activations import measure_pass, meta_model, micro_batch
from bilevel.memory.plan import GB, Unmeasurable, memory_plan, plan, run_shape
from bilevel.memory.table import render
from bilevel.settings.command_line import load_settings
from bilevel.settings.fields import Settings
from bilevel.settings.rules import validate

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1501,
    "hidden_size": 96,
    "intermediate_size": 251,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 1201, "n_embd": 60, "n_layer": 3, "n_head": 4, "n_positions": 33}
TENSORS = ("parameters", "fp32 masters", "Adam moments", "gradients", "communication buckets")
SIZES = {
    "openai-community/gpt2": 124_439_808,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "google/gemma-2-9b": 9_241_705_984,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "01-ai/Yi-34B": 34_388_917_248,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
}
WORKER = ROOT / "tests" / "workers" / "plan_worker.py"
RUN_FILES = sorted({*(ROOT / "configs").glob("*-[18]x*.yaml"), *(ROOT / "configs").glob("lora-*gb.yaml")})
QUICK = ("qwen2.5-1.5b-1x24gb", "lora-1.7b-8gb")  # the others are slow
LIMITS = {"yi-34b-8xa40": 46, "qwen2.5-32b-8xh100": 76, "llama3-8b-1x80gb": 80}  # GB per GPU


def settings(**changes) -> Settings:
    values = {"train_data": ["a"], "val_data": ["b"], "max_length": 32, "micro_batch_tokens": 62, "lisa_interval": 2}
    found, problems = validate(values | changes)
    assert not problems, problems
    return found


# ----------------------------------------------------------------------------------------------------------------------
# against what is held


def cases(folder: Path) -> list[dict]:
    """Settings of every stage, full and LISA, in fp32 and in bf16 where that runs."""
    file = folder / "zero3.json"
    small = {"stage": 3, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": 200}
    file.write_text(json.dumps({"zero_optimization": small}))
    lisa, frozen = {"lisa_layers": 2}, {"lisa_layers": 1, "lisa_train_embeddings": False}
    ways = [("fp32", {}), ("fp32", lisa), ("bf16", lisa), ("bf16", frozen)]
    found = []
    for stage in range(4):
        machine = {"deepspeed": str(file)} if stage == 3 else {"zero_stage": stage}
        for dtype, way in ways if stage else ways[:2]:
            model = GPT2 if way is frozen or not stage else LLAMA
            found.append({"backend": "deepspeed", "model_config": model, "dtype": dtype} | machine | way)
    return found


@pytest.fixture(scope="module", params=[1, 2])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list]:
    """(processes, [(settings, measured bytes by line)]): one launch for all cases."""
    folder = tmp_path_factory.mktemp("plan")
    listed = [dataclasses.asdict(settings(**case)) for case in cases(folder)]
    (folder / "cases.json").write_text(json.dumps(listed))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(request.param)]
    done = subprocess.run(
        [*launcher, "--master_port", str(port), WORKER, folder / "cases.json", folder / "out.json"],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, list(zip(listed, json.loads((folder / "out.json").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.processes
def test_tensors_are_those_that_are_held(measured: tuple[int, list]):
    processes, results = measured
    wrong = []
    for case, held in results:
        run, _ = validate(case)
        planned = plan(run, run_shape(run), processes, run.dtype)
        expected = {line: planned.gpu[line] for line in TENSORS} | {"residual bits": planned.residual}
        expected["checkpoint"] = planned.host["checkpoint being written"]
        for line, size in expected.items():
            if abs(size - held[line]) > 0.05 * held[line]:
                wrong.append((run.zero_stage, run.dtype, run.lisa_layers, line, size, held[line]))
        if run.zero_stage is None:
            assert held["gathered"] <= planned.gpu["gathered and reduced in a pass"]
    assert not wrong, "\n".join(map(str, wrong))


# ----------------------------------------------------------------------------------------------------------------------
# the shipped numbers


def test_each_shipped_shape_is_tested():
    names = {file.stem.replace("--", "/") for file in (ROOT / "configs" / "models").glob("*.json")}
    assert names == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_shipped_shapes_have_the_public_number_of_parameters(name: str):
    run = settings(model_name_or_path=name)
    assert sum(p.numel() for p in meta_model(run, run_shape(run), "bf16").parameters()) == SIZES[name]


def test_there_is_a_run_file_for_each_machine():
    machines = {file.stem.rpartition("-")[2] for file in RUN_FILES}
    assert machines == {"1x24gb", "1x80gb", "8xa40", "8xh100", "8gb", "24gb", "48gb", "8x80gb"} and len(RUN_FILES) == 13


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, id=file.stem, marks=[] if file.stem in QUICK else pytest.mark.slow) for file in RUN_FILES],
)
def test_run_files_fit_their_machine_and_their_heads_tell_the_plan(file: Path):
    run, _ = load_settings(["--config", str(file)])
    found = plan(run, run_shape(run), 8 if "-8x" in file.stem else 1, run.dtype)
    assert found.fits and found.total <= LIMITS.get(file.stem, math.inf) * GB
    assert sum(found.at_load.values()) < 128 * GB
    assert found.host.keys() <= {"processes", "residual bits", "checkpoint being written"}  # no offload

    head = file.read_text().split("\n\n")[0]
    assert f"CONFIG=configs/{file.name} bash run_F2SA.sh" in head
    said = re.search(r"per GPU: ([\d.]+) GB(.*?); per host: ([\d.]+) GB, ([\d.]+) GB while loading", head)
    numbers = [found.total, sum(found.host.values()), sum(found.at_load.values())]
    assert [said[1], said[3], said[4]] == [f"{size / GB:.1f}" for size in numbers]
    both = re.findall(r"[\d.]+(?= with)", said[2])
    expected = [found.without_residual, found.with_residual] if found.residual else []
    assert both == [f"{size / GB:.1f}" for size in expected]

    row = next(row for row in (ROOT / "README.md").read_text().split("\n") if row.startswith("| ") and file.name in row)
    host, disk = (f"{sum(sizes.values()) / GB:,.0f}" for sizes in (found.host, found.disk))
    assert row.endswith(f"| {found.total / GB:.1f} | {host} | {disk} |")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("scalebio-math", []),
        ("scalebio-math", ["--model_name_or_path", "google/gemma-2-9b"]),
        ("scalebio-math", ["--model_name_or_path", "Qwen/Qwen2-7B"]),
        ("scalebio-math-lisa", []),
        ("scalebio-math-lisa", ["--model_name_or_path", "Qwen/Qwen2.5-32B", "--micro_batch_tokens", "2048"]),
        ("scalebio-math-adapters", []),
    ],
)
def test_the_papers_run_files_fit_as_the_page_says(name: str, flags: list[str]):
    run, _ = load_settings(["--config", str(ROOT / "configs" / "papers" / f"{name}.yaml"), *flags])
    found = plan(run, run_shape(run), 1 if name.endswith("adapters") else 8, "bf16")
    page = (ROOT / "docs" / "papers.md").read_text()
    rows = [row for row in page.split("\n") if f"| {name}.yaml |" in row]
    assert found.fits and any(f"| {found.total / GB:.1f} |" in row for row in rows)


def test_bf16_run_files_keep_the_signal():
    for file in RUN_FILES:
        run, _ = load_settings(["--config", str(file)])
        assert run.dtype == "bf16" and run.alpha <= 10
        if run.lora_rank is None:
            assert run.lr_y >= 1e-5 and run.x_warmup_steps >= 100
        else:  # gaps of adapters are about twelve times smaller at one learning rate
            assert run.lr_y >= 1.2e-4 and run.x_warmup_steps >= 20


@pytest.mark.slow
def test_yi_fits_an_a40_with_its_residual_bits_when_the_embedding_is_frozen():
    file = ROOT / "configs" / "yi-34b-8xa40.yaml"
    run, _ = load_settings(["--config", str(file), "--lisa_residual", "device", "--lisa_train_embeddings", "false"])
    run = dataclasses.replace(run, micro_batch_tokens=1024)
    total = plan(run, run_shape(run), 8, "bf16").total / GB
    assert total < 46 and f"({total:.1f} GB)" in file.read_text()


ADAPTERS = {"lora_rank": 16, "dtype": "bf16", "gradient_checkpointing": True, "max_length": 512}


@pytest.mark.parametrize(("base", "limit"), [pytest.param("bf16", 1.1, marks=pytest.mark.slow), ("nf4", 1.12)])
@pytest.mark.parametrize("name", ["meta-llama/Meta-Llama-3-8B", pytest.param("01-ai/Yi-34B", marks=pytest.mark.slow)])
def test_two_adapters_take_little_more_than_one(name: str, base: str, limit: float):
    """Learning weights beside plain LoRA fine-tuning, in all bytes of the plan."""
    common = ADAPTERS | {"model_name_or_path": name, "base_dtype": base, "micro_batch_tokens": 2048}
    two, one = (settings(**common | changes) for changes in ({}, {"method": "fixed", "x_init": "size"}))
    totals = [plan(run, run_shape(run), 1, "bf16").total for run in (two, one)]
    assert 1 < totals[0] / totals[1] <= limit


@pytest.mark.slow
def test_adapters_that_do_not_fit_are_told_of_4_bit():
    common = {"model_name_or_path": "Qwen/Qwen2.5-1.5B", "lora_rank": 8, "dtype": "bf16", "max_length": 512}
    run = settings(**common, gpu_memory_gib=4)
    assert plan(run, run_shape(run), 1, "bf16").remedies[0].startswith("base_dtype nf4: saves")


def test_a_machine_that_cannot_hold_two_copies_is_told_of_adapters_first():
    run = settings(model_name_or_path="Qwen/Qwen2.5-1.5B", dtype="bf16", gpu_memory_gib=8, max_length=512)
    found = plan(run, run_shape(run), 1, "bf16")
    assert not found.fits and found.remedies[0].startswith("lora_rank 16: saves")
    assert found.remedies[1].startswith("lora_rank 16 base_dtype nf4: saves") and "fits" in found.remedies[1]
    assert "does not fit" not in found.remedies[0]


# ----------------------------------------------------------------------------------------------------------------------
# what it says


def test_a_model_that_cannot_be_counted_in_fp32_has_a_plan_in_bf16():
    mixtral = {"model_type": "mixtral", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64,
               "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    with pytest.raises(
        Unmeasurable, match="^a model of type mixtral in fp32 cannot be measured without data: "
    ) as said:
        memory_plan(settings(model_config=mixtral, dtype="fp32"), 1)
    assert "\n" not in str(said.value)
    assert "activations" in memory_plan(settings(model_config=mixtral, dtype="bf16"), 1).gpu


@pytest.mark.slow
def test_what_does_not_fit_gets_remedies_that_help():
    changes = {"backend": "deepspeed", "zero_stage": 2, "lisa_layers": 2, "dtype": "bf16", "gpu_memory_gib": 0.02}
    found = memory_plan(settings(model_config=LLAMA, micro_batch_tokens=620, **changes), 2)
    text = render(found)
    assert found.fits is False and "does not fit 0.02 GiB" in text and "without residual bits" in text
    run = settings(model_name_or_path="meta-llama/Meta-Llama-3-8B", max_length=1024, **changes | {"gpu_memory_gib": 79})
    found = plan(run, run_shape(run), 1, "bf16")
    names = [remedy.split(":")[0] for remedy in found.remedies]
    assert names[:2] == ["lora_rank 16", "lora_rank 16 base_dtype nf4"]
    assert names[2:5] == ["gradient_checkpointing true", "lisa_layers 1", "lisa_train_embeddings false"]
    assert names[-1].startswith("offload_optimizer and offload_param") and found.remedies[-1].endswith("fits")
    totals = [float(re.search(r"([\d.]+) GB in total", remedy)[1]) for remedy in found.remedies]
    assert max(totals) < found.total / GB


def test_checkpointing_and_smaller_micro_batches_need_less():
    def total(**changes) -> float:
        run = settings(model_config=LLAMA | {"num_hidden_layers": 4}, **{"micro_batch_tokens": 6200} | changes)
        return plan(run, run_shape(run), 1, "fp32").total

    assert total(gradient_checkpointing=True) < total()
    assert total(micro_batch_tokens=3100) < total()


def test_activations_agree_with_what_autograd_keeps():
    """On real tensors, without checkpointing: bytes that the blocks' forward pass saves for the backward pass."""
    run = settings(model_config=LLAMA, attn_implementation="eager")
    model = meta_model(run, run_shape(run), "fp32")
    kept = measure_pass(run, model).kept
    real = transformers.AutoModelForCausalLM.from_config(run_shape(run), attn_implementation="eager")
    storages = {p.untyped_storage().data_ptr() for p in real.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = real.base_model(torch.zeros(micro_batch(run), dtype=torch.long), use_cache=False)[0]
    assert kept == pytest.approx(sum(saved.values()) + hidden.untyped_storage().nbytes(), rel=0.05)
