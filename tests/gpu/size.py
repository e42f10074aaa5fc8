"""A model of 1.5B parameters from its shape: seconds per step, peak memory against the plan, and useful TFLOP/s.

One base cell and one change each. A cell is two steps to warm up and five that are measured. The copies are those that
a run makes (bilevel.model.copies), from a folder with random weights. Needs a GPU; a test runs it on a CPU with a small
shape, where memory is not measured.
"""

import contextlib
import gc
import tempfile
import time
from unittest import mock

import tokenizers
import torch
import transformers
from gpu import work
from gpu.rows import Rows

from bilevel.errors import UserError
from bilevel.memory.plan import plan
from bilevel.model.copies import make_copies
from bilevel.processes import start_world
from bilevel.settings.fields import Settings
from bilevel.step.f2sa import penalty_step
from bilevel.weights.learned import SourceWeights

SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
BASE = {"micro_batch_tokens": 4096, "gradient_checkpointing": False}
ADAPTERS = {"lora_rank": 16, "lora_alpha": 32}
CELLS = {
    "base: full, sdpa, 4k tokens": {},
    "LISA, 4 of 28 layers": {"lisa_layers": 4},
    "adapters on one bf16 model": ADAPTERS | {"base_dtype": "bf16"},
    "adapters on one nf4 model": ADAPTERS | {"base_dtype": "nf4"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "16k tokens": {"micro_batch_tokens": 16384, "gradient_checkpointing": True},
    "packed rows, 4k tokens": {"packing": True},
    "packed rows, 16k tokens": {"packing": True, "micro_batch_tokens": 16384, "gradient_checkpointing": True},
    "eager attention": {"attn_implementation": "eager"},
}
WARM, MEASURED, BATCH = 2, 5, 64


def check(device: str, rows: Rows) -> None:
    rate = bare_product(device)
    rows.add("bare bf16 product of the model's sizes", f"{rate / 1e12:.3g} TFLOP/s")
    data = work.Data(8 * BATCH, SHAPE["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_random_model(folder, device)
        for name, changes in CELLS.items():
            values = BASE | changes | {"model_name_or_path": folder, "train_data": ["-"], "val_data": ["-"]}
            try:
                cell(name, Settings(**values, dtype="bf16", max_length=512), tokenizer, data, rate, rows)
            except torch.OutOfMemoryError as error:
                rows.add(name, f"out of memory: {str(error)[:80]}")
            except UserError as error:  # bitsandbytes is missing
                rows.add(name, f"left out: {error}")
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    for left_out in ("Liger's kernels", "torch.compile"):
        rows.add(left_out, "left out: not a setting yet")


def save_random_model(folder: str, device: str) -> transformers.PreTrainedTokenizerBase:
    """A folder with a model of SHAPE, in bf16, and the least tokenizer; returns the tokenizer."""
    torch.manual_seed(0)
    shape = transformers.AutoConfig.for_model(**SHAPE)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def cell(
    name: str,
    settings: Settings,
    tokenizer: transformers.PreTrainedTokenizerBase,
    data: work.Data,
    rate: float,
    rows: Rows,
) -> None:
    shape, world = transformers.AutoConfig.for_model(**SHAPE), start_world()
    estimate = plan(settings, shape, 1, "bf16").without_residual
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with mock.patch("bilevel.model.copies.taught_ends", return_value=[]):  # nothing is saved, and there are no files
        copies, _ = make_copies(settings, world, shape, tokenizer)
    weights = SourceWeights(data.source_ids, torch.tensor([0.5, 0.5]), 10.0, "adam")
    generator, total = torch.Generator().manual_seed(0), len(data.source_ids)
    wait = torch.cuda.synchronize if on_gpu else contextlib.nullcontext
    for step in range(WARM + MEASURED):
        if step == WARM:
            wait()
            start, before = time.perf_counter(), operations(copies)
        numbers = torch.randperm(total, generator=generator)
        batches = [
            data.batch(numbers[part], settings.micro_batch_tokens, world, packed=copies["w"].packed)
            for part in (slice(BATCH), slice(-BATCH, None))
        ]
        penalty_step(**copies, weights=weights, train=batches[0], validation=batches[1], nu=0.1, lr_y=1e-6, seed=step)
    wait()
    seconds = (time.perf_counter() - start) / MEASURED
    useful = (operations(copies) - before) / MEASURED / seconds
    rows.add(f"{name}: seconds per step", seconds)
    rows.add(f"{name}: useful", f"{useful / 1e12:.3g} TFLOP/s, {useful / rate:.0%} of the bare product")
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
        rows.add(f"{name}: peak memory", f"{peak / 1e9:.1f} GB; plan {estimate / 1e9:.1f} GB ({peak / estimate:.2f})")


def operations(copies: dict) -> float:
    """Of all passes so far; with LISA fewer are needed than are counted."""
    return sum(c.passed.operations(c.shape) for c in copies.values())


def bare_product(device: str) -> float:
    """Operations per second of bf16 products (4096, hidden) x (hidden, intermediate)."""
    a = torch.randn(4096, SHAPE["hidden_size"], device=device, dtype=torch.bfloat16)
    b = torch.randn(SHAPE["hidden_size"], SHAPE["intermediate_size"], device=device, dtype=torch.bfloat16)
    wait, times = (torch.cuda.synchronize, 200) if device == "cuda" else (contextlib.nullcontext, 5)
    for _ in range(10):
        a @ b
    wait()
    start = time.perf_counter()
    for _ in range(times):
        a @ b
    wait()
    return times * 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - start)
