"""Run under torchrun by test_plan: bytes of the tensors that two copies really hold, for each case of a JSON file.

torchrun ... tests/plan_worker.py CASES OUT        CASES: a list of settings; OUT gets rank 0's measurements
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed

from bilevel.backend import ModelCopy
from bilevel.config import Settings, validate
from bilevel.data import MicroBatch
from bilevel.lisa import Lisa
from bilevel.world import World
from bilevel.zero import ZeroCopy, start_world, zero_config

LR = 1e-3


def measure(settings: Settings, world: World) -> dict[str, int]:
    """Bytes at the end of the backward pass of a step, after Adam has state and LISA has drawn again."""
    numbers = dict(settings.model_config)
    shape = transformers.AutoConfig.for_model(numbers.pop("model_type"), **numbers)
    shape.use_cache = False
    models = {}
    for name in ("u", "w"):
        torch.manual_seed(0)
        models[name] = transformers.AutoModelForCausalLM.from_config(shape).train()
    lisa = Lisa(settings, models) if settings.lisa_layers else None
    active = {name: lisa.active(name) if lisa else None for name in models}
    config = zero_config(settings, settings.dtype)
    copies = {
        name: ZeroCopy(model, world, config, active=active[name], residual=settings.lisa_residual)
        for name, model in models.items()
    }
    steps = 1 if lisa is None else 24
    for step in range(steps):
        if lisa:
            lisa.switch(step, copies)
        for copy in copies.values():
            backward(copy, shape.vocab_size)
            if step + 1 < steps:
                copy.step(LR, copy.gradient_norm())
        if step == 0 and lisa is None:
            for copy in copies.values():
                copy.step(LR, copy.gradient_norm())
                backward(copy, shape.vocab_size)
    found = held(copies)
    for copy in copies.values():
        copy._stop(set())
    return found


def backward(copy: ModelCopy, vocabulary: int) -> None:
    """Two micro-batches of random tokens, the second one the step's last."""
    for last in (False, True):
        tokens = torch.randint(0, vocabulary, (2, 9))
        batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.arange(2), torch.arange(2))
        copy.backward(copy.losses(batch, 0).sum(), last)


def held(copies: dict[str, ZeroCopy]) -> dict[str, int]:
    """Bytes of distinct storages, each counted in the first line that names it."""
    seen: set[int] = set()
    tensors = {"parameters": [], "masters": [], "moments": [], "gradients": [], "residual": [], "buckets": []}
    for copy in copies.values():
        optimizer = copy.engine.optimizer
        for p in copy.module.parameters():
            tensors["parameters"] += [p.data, getattr(p, "ds_tensor", None)]
            tensors["gradients"] += [p.grad, getattr(p, "grad_accum", None)]
        for _, master in copy._partitions():
            tensors["masters"].append(master)
            tensors["gradients"].append(master.grad)
        for state in copy._inner().state.values():
            tensors["moments"] += [value for value in state.values() if value.numel() > 1]
        if copy.stage in (1, 2):
            for gradients in optimizer.averaged_gradients.values():
                tensors["gradients"] += [getattr(gradients, "flat_partition", None), *(gradients or [])]
        if copy.stage == 3:
            tensors["gradients"].append(optimizer.grad_partitions_flat_buffer)
            tensors["buckets"] += [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
        tensors["residual"] += list(copy.residuals.values())
    return {line: sum(new_bytes(t, seen) for t in found if t is not None) for line, found in tensors.items()}


def new_bytes(tensor: torch.Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()


def main(cases: Path, out: Path) -> None:
    world = start_world()
    results: list[Any] = []
    for case in json.loads(cases.read_text()):
        settings, problems = validate(case)
        assert not problems, problems
        results.append(measure(settings, world))
    if world.main:
        out.write_text(json.dumps(results))
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
