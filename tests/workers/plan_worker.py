"""Run under torchrun by test_plan: bytes of the tensors that two copies really hold, for each of many settings.

torchrun ... plan_worker.py CASES OUT        JSON: a list of settings; what the rank with most holds, by line
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import transformers
from torch import distributed

from bilevel.data.batches import MicroBatch
from bilevel.model.base_copy import ModelCopy
from bilevel.model.lisa import Lisa
from bilevel.model.loading import model_shape, trained_shape
from bilevel.model.zero_copy import ZeroCopy, start_world
from bilevel.processes import World
from bilevel.run.checkpoint_file import split
from bilevel.settings.deepspeed import zero_config
from bilevel.settings.fields import Settings
from bilevel.settings.rules import validate

LINES = (
    "parameters",
    "fp32 masters",
    "Adam moments",
    "gradients",
    "residual bits",
    "communication buckets",
    "gathered",
    "checkpoint",
)


def measure(settings: Settings, world: World) -> dict[str, int]:
    """The most that is held within a step, when Adam has its state and LISA has drawn every block at least once."""
    torch.manual_seed(0)
    shape = trained_shape(settings, model_shape(settings))
    models = {name: transformers.AutoModelForCausalLM.from_config(shape).train() for name in ("u", "w")}
    lisa = Lisa(settings, models) if settings.lisa_layers else None
    config = zero_config(settings, settings.dtype)
    copies = {
        name: ZeroCopy(model, world, config, active=lisa and lisa.active(name), residual=settings.lisa_residual)
        for name, model in models.items()
    }
    seen: set[int] = set()
    for step in itertools.count():
        if lisa:
            lisa.switch(step, copies)
            seen |= set(lisa.drawn["u"])
        found = [backward(copies, shape.vocab_size, last) for last in (False, True)]
        if step % settings.lisa_interval and (lisa is None or len(seen) == lisa.blocks):
            break
        for copy in copies.values():
            copy.step(1e-3, copy.gradient_norm())
    saved = sum(tensor.nbytes for copy in copies.values() for tensor in split(copy.state_dict())[0].values())
    for copy in copies.values():
        copy._stop(set())
    most = {line: max(tensors[line] for tensors in found) for line in found[0]}
    return most | {"checkpoint": int(world.sum(torch.tensor(saved)))}


def backward(copies: dict[str, ModelCopy], vocabulary: int, last: bool) -> dict[str, int]:
    """A micro-batch of random tokens through both copies; what is held then."""
    tokens = torch.randint(0, vocabulary, (2, 9))
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.arange(2), torch.arange(2), torch.ones(2))
    for copy in copies.values():
        copy.backward(copy.losses(batch, 0).sum(), last)
    return held(copies)


def held(copies: dict[str, ZeroCopy]) -> dict[str, int]:
    """Bytes of distinct storages, each counted in the first line that names it."""
    tensors: dict[str, list[torch.Tensor | None]] = {line: [] for line in LINES[:-1]}
    for copy in copies.values():
        optimizer = copy.engine.optimizer
        for p in copy.module.parameters():
            tensors["parameters"].append(p.ds_tensor if copy.stage == 3 else p.data)
            tensors["gathered"].append(p.data)
            tensors["gradients"] += [p.grad, getattr(p, "grad_accum", None)]
        for _, master in copy._partitions():
            tensors["fp32 masters"].append(master)
            tensors["gradients"].append(master.grad)
        for state in copy._inner().state.values():
            tensors["Adam moments"] += [state["exp_avg"], state["exp_avg_sq"]]
        if copy.stage in (1, 2):
            for gradients in optimizer.averaged_gradients.values():
                tensors["gradients"] += [getattr(gradients, "flat_partition", None), *(gradients or [])]
        if copy.stage == 3:
            tensors["gradients"].append(optimizer.grad_partitions_flat_buffer)
            tensors["communication buckets"] += [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
        tensors["residual bits"] += copy.residuals.values()
    seen: set[int] = set()
    return {
        line: sum(new_bytes(tensor, seen) for tensor in held if tensor is not None) for line, held in tensors.items()
    }


def new_bytes(tensor: torch.Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()


def main(cases: Path, out: Path) -> None:
    world = start_world()
    results = []
    for case in json.loads(cases.read_text()):
        settings, problems = validate(case)
        assert not problems, problems
        found = torch.tensor(list(measure(settings, world).values()))
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        results.append(dict(zip(LINES, found.tolist(), strict=True)))
        if world.main:
            out.write_text(json.dumps(results))
    world.leave()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
