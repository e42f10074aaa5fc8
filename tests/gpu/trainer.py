"""One step of u, w and x beside transformers' Trainer in bf16 with length grouping, on the same rows.

On a CPU the model is small, so the ratio says nothing about a GPU.
"""

import copy
import statistics
import tempfile
import time

import torch
import transformers
from gpu import work
from gpu.rows import Rows

from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import World
from bilevel.step.f2sa import penalty_step
from bilevel.weights.learned import SourceWeights

SHAPES = {  # GPT-2 with another vocabulary, and a small one
    "cuda": {"vocab_size": 32000, "n_positions": 512, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "cpu": {"vocab_size": 2048, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 2},
}
ROUNDS, BATCH, MICRO = {"cuda": 6, "cpu": 2}, {"cuda": 64, "cpu": 16}, 16


def check(device: str, rows: Rows) -> None:
    torch.manual_seed(0)
    shape = transformers.AutoConfig.for_model("gpt2", **SHAPES[device], bos_token_id=None, eos_token_id=None)
    for rate in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(shape, rate, 0.0)
    model = transformers.AutoModelForCausalLM.from_config(shape)
    data = work.Data(ROUNDS[device] * BATCH[device], shape.vocab_size)
    ours, theirs = our_steps(model, data, device), trainer_steps(model, data, device)
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    rows.add("our step, median", f"{statistics.median(ours[1:]):.3f} s")
    rows.add("Trainer's step, bf16, length grouping, median", f"{statistics.median(theirs[1:]):.3f} s")
    rows.add("ratio", f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", "3 passes for its 1")


def our_steps(model: torch.nn.Module, data: work.Data, device: str) -> list[float]:
    u, w = (TorchCopy(copy.deepcopy(model).to(device), bf16=True) for _ in "uw")
    weights, world, times = SourceWeights(data.source_ids, torch.tensor([0.5, 0.5]), 10.0, "adam"), World(), []
    rounds, size = ROUNDS[device], BATCH[device]
    for number in range(rounds):
        wait()
        start = time.perf_counter()
        train = data.batch(torch.arange(number * size, (number + 1) * size), 16384, world)
        validation = data.batch((torch.arange(size) + (number + 1) * size) % (rounds * size), 16384, world)
        penalty_step(u, w, weights, train, validation, 0.1, 1e-5, number)
        weights.step(0.1)
        wait()
        times.append(time.perf_counter() - start)
    return times


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Clock(transformers.TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        wait()
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        wait()
        self.times.append(time.perf_counter() - self.start)


def trainer_steps(model: torch.nn.Module, data: work.Data, device: str) -> list[float]:
    """Micro-batches of 16 rows of one global batch, sorted by length as Trainer's grouping does."""
    features, size = [], BATCH[device]
    for number in range(ROUNDS[device]):
        part = range(number * size, (number + 1) * size)
        order = sorted(part, key=lambda i: -len(data.ids[i]))
        features += [{"input_ids": data.ids[i], "labels": data.labels[i]} for i in order]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=size // MICRO,
            max_steps=ROUNDS[device],
            bf16=True,
            use_cpu=device == "cpu",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        transformers.Trainer(
            model=copy.deepcopy(model), args=arguments, train_dataset=features, data_collator=padded, callbacks=[clock]
        ).train()
    return clock.times


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def whole(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": whole("input_ids", 0), "labels": whole("labels", -100), "attention_mask": mask}
