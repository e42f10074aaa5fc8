"""A model of 1.5B parameters from its shape: seconds per step, peak memory against the plan, and useful TFLOP/s.

One base cell and one change each. A cell is two steps to warm up and five that are measured. Needs a GPU.
"""

import gc
import time

import torch
import transformers
from gpu import work
from gpu.rows import Rows

from bilevel.memory.plan import plan
from bilevel.model.lisa import Lisa
from bilevel.model.packing import use_packed_rows
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import World
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
CELLS = {
    "base: full, sdpa, 4k tokens": {},
    "LISA, 4 of 28 layers": {"lisa_layers": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "16k tokens": {"micro_batch_tokens": 16384, "gradient_checkpointing": True},
    "packed rows, 4k tokens": {"packing": True},
    "packed rows, 16k tokens": {"packing": True, "micro_batch_tokens": 16384, "gradient_checkpointing": True},
    "eager attention": {"attn_implementation": "eager"},
}
WARM, MEASURED, BATCH = 2, 5, 64


def check(device: str, rows: Rows) -> None:
    rate = bare_product(device)
    rows.add("bare bf16 product of the model's sizes", f"{rate / 1e12:.0f} TFLOP/s")
    data = work.Data(512, SHAPE["vocab_size"])
    for name, changes in CELLS.items():
        try:
            cell(name, {**BASE, **changes}, data, rate, rows)
        except torch.OutOfMemoryError as error:
            rows.add(name, f"out of memory: {str(error)[:80]}")
        gc.collect()
        torch.cuda.empty_cache()
    for left_out in ("adapters while weights are learned", "nf4", "Liger's kernels", "torch.compile"):
        rows.add(left_out, "left out: not a setting yet")


def cell(name: str, changes: dict, data: work.Data, rate: float, rows: Rows) -> None:
    settings = Settings(train_data=["-"], val_data=["-"], model_config=SHAPE, dtype="bf16", max_length=512, **changes)
    shape = transformers.AutoConfig.for_model(**SHAPE)
    estimate = plan(settings, shape, 1, "bf16").without_residual
    torch.cuda.reset_peak_memory_stats()
    models = {}
    for copy_name in "uw":
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(
                shape, attn_implementation=settings.attn_implementation, dtype=torch.float32
            )
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        models[copy_name] = model.train()
    lisa = Lisa(settings, models) if settings.lisa_layers else None
    copies = {n: TorchCopy(m, active=lisa.active(n) if lisa else None, bf16=True) for n, m in models.items()}
    if settings.packing:
        for copy in copies.values():
            use_packed_rows(copy, settings)
    weights = SourceWeights(data.source_ids, torch.tensor([0.5, 0.5]), 10.0, "adam")
    generator, world = torch.Generator().manual_seed(0), World()
    for step in range(WARM + MEASURED):
        if step == WARM:
            torch.cuda.synchronize()
            start, before = time.perf_counter(), operations(copies)
        numbers = torch.randperm(512, generator=generator)
        batches = [
            data.batch(numbers[part], settings.micro_batch_tokens, world, packed=copies["w"].packed)
            for part in (slice(BATCH), slice(-BATCH, None))
        ]
        penalty_step(**copies, weights=weights, train=batches[0], validation=batches[1], nu=0.1, lr_y=1e-6, seed=step)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / MEASURED
    useful = (operations(copies) - before) / MEASURED / seconds
    peak = torch.cuda.max_memory_allocated()
    rows.add(f"{name}: seconds per step", seconds)
    rows.add(f"{name}: peak memory", f"{peak / 1e9:.1f} GB; plan {estimate / 1e9:.1f} GB ({peak / estimate:.2f})")
    rows.add(f"{name}: useful", f"{useful / 1e12:.0f} TFLOP/s, {useful / rate:.0%} of the bare product")


def operations(copies: dict[str, TorchCopy]) -> float:
    """Of all passes so far; with LISA fewer are needed than are counted."""
    return sum(c.passed.operations(c.shape) for c in copies.values())


def bare_product(device: str) -> float:
    """Operations per second of bf16 products (4096, hidden) x (hidden, intermediate)."""
    a = torch.randn(4096, SHAPE["hidden_size"], device=device, dtype=torch.bfloat16)
    b = torch.randn(SHAPE["hidden_size"], SHAPE["intermediate_size"], device=device, dtype=torch.bfloat16)
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        a @ b
    torch.cuda.synchronize()
    return 200 * 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - start)
