"""What copies under ZeRO must do besides: stop together, save, load from shards, leave nothing behind."""

import copy
import ctypes
import functools
import gc
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from deepspeed.runtime.engine import DeepSpeedEngine
from zero_common import (
    BLOCKS,
    SHARES,
    TOKENIZER,
    TRAIN,
    UNUSED,
    VALIDATION,
    budget,
    make_model,
    partition_small,
    settings,
    whole_state,
    zero_copy,
)

from bilevel.data.batches import Batch
from bilevel.model.lisa import Layers
from bilevel.model.zero_copy import ZeroCopy, load_copies
from bilevel.processes import World
from bilevel.settings.deepspeed import CONFIGS, zero_config
from bilevel.step.f2sa import penalty_step
from bilevel.step.result import NonFiniteLoss
from bilevel.weights.learned import SourceWeights

PARTS = ("train", "validation")
NUMBERS = {"nu": 1.0, "lr_y": 1e-4, "seed": 0}  # of penalty_step


def stop(world: World, folder: Path) -> list[dict[str, Any]]:
    """One rank alone sees a loss, or the gradient of a loss, that is not finite; then two good steps follow."""
    report = []
    offload = folder / "zero2_offload.json"
    if world.main:
        zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
        offload.write_text(json.dumps({"zero_optimization": zero}))
    world.wait()
    layouts = [{"zero_stage": stage} for stage in range(4)]
    layouts += [{"deepspeed": str(file)} for file in (offload, CONFIGS / "zero3_offload.json")]
    for layout, what in itertools.product(layouts, ("loss", "gradient")):
        model = make_model(tied=False)
        model.get_input_embeddings().weight.data[UNUSED] = math.inf
        hit, spared = (Pair(world, model, layout) for _ in range(2))
        hit.step(0), spared.step(0)
        before = hit.state()
        error = hit.bad_step(what)
        after = hit.state()
        moved = [name for name, old in before.items() if differ(old, after[name])]
        row = {"layout": str(layout), "what": what, "moved": moved, "seen": int(hit.x.seen.sum())}
        row["suspects"] = error and {part: ids.tolist() for part, ids in error.suspects.items()}
        row["stopped_ranks"] = int(world.sum(torch.tensor(int(error is not None))))
        for copy_of in hit.copies.values():
            copy_of.discard()
        for step in (1, 2):
            hit.step(step), spared.step(step)
        states = spared.state(), hit.state()
        row["apart"] = [name for name, value in states[0].items() if differ(value, states[1][name])]
        report.append(row)
    return report


class Pair:
    """u, w and x, and steps of them on good batches and on a bad one."""

    def __init__(self, world: World, model: torch.nn.Module, layout: dict[str, Any]):
        self.world, self.x = world, SourceWeights(TRAIN.source_ids, SHARES, 1.0, "adam")
        self.copies = {name: zero_copy(world, copy.deepcopy(model), **layout) for name in "uw"}

    def batches(self, step: int) -> list[Batch]:
        ids = torch.arange(step, step + 10)
        return [samples.batch(ids, budget(self.world), self.world) for samples in (TRAIN, VALIDATION)]

    def step(self, step: int) -> None:
        penalty_step(**self.copies, weights=self.x, **dict(zip(PARTS, self.batches(step), strict=True)), **NUMBERS)
        self.x.step(0.1)

    def bad_step(self, what: str) -> NonFiniteLoss | None:
        """The last rank's first validation row, or all gradients there, are not finite."""
        train, validation = self.batches(1)
        w = self.copies["w"]
        if self.world.rank == self.world.size - 1:
            if what == "loss":
                validation.micro_batches[0].input_ids[0, 0] = UNUSED
            else:
                w.losses = functools.partial(lambda losses, *a: InfiniteGradient.apply(losses(*a)), w.losses)
        try:
            penalty_step(**self.copies, weights=self.x, train=train, validation=validation, **NUMBERS)
        except NonFiniteLoss as error:
            return error
        finally:
            vars(w).pop("losses", None)
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """All parameters on rank 0, and x."""
        parameters = {f"{name} {key}": v for name, c in self.copies.items() for key, v in whole_state(c).items()}
        return parameters | {"x": self.x.x.float()}


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses: torch.Tensor) -> torch.Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.equal(a.view(torch.int32), b.view(torch.int32))  # bit by bit


def save(world: World, folder: Path) -> list[dict[str, Any]]:
    """Step, save, and say what logits the saved model must have."""
    ids = torch.arange(8).reshape(1, 8)
    report = []
    for family, stage, lisa in (("gpt2", 3, True), ("llama", 3, False), ("gpt2", 2, False)):
        model = make_model(family)
        active = Layers(model).active((1,), True) if lisa else None
        trained = zero_copy(world, model, active=active, zero_stage=stage)
        for micro in TRAIN.batch(torch.arange(10), budget(world), world).micro_batches:
            trained.backward(trained.losses(micro, 0).sum(), last=True)
            trained.step(1e-2, trained.gradient_norm())
        target = folder / f"saved_{family}_{stage}"
        trained.save(target, TOKENIZER)
        trained.model.eval()
        with torch.no_grad():
            logits = trained.model(input_ids=ids).logits
            start = make_model(family).eval()(input_ids=ids).logits
        report.append({"folder": str(target), "ids": ids.tolist(), "logits": logits.tolist(), "start": start.tolist()})
    return report


def load(world: World, folder: Path) -> list[dict[str, Any]]:
    """Both copies of a pretrained model in several shards, straight after loading."""
    pretrained = folder / "pretrained"
    if world.main:
        make_model(tied=False, num_hidden_layers=3).save_pretrained(pretrained, max_shard_size="100KB")
    world.wait()
    shape = transformers.AutoConfig.from_pretrained(pretrained)
    report = []
    for stage, dtype in itertools.product((2, 3), ("fp32", "bf16")):
        chosen = settings(zero_stage=stage, model_name_or_path=str(pretrained))
        config = partition_small(zero_config(chosen, dtype))
        loaded = load_copies(chosen, world, shape, TOKENIZER, config)
        held = [world.gather(holdings(model)) for model in loaded.values()]
        apart = storages(loaded["u"]).isdisjoint(storages(loaded["w"]))
        apart = all(world.gather(apart))
        row = {"stage": stage, "dtype": dtype, "folder": str(pretrained), "held": held, "apart": apart}
        for name, model in loaded.items():
            state = whole_state(ZeroCopy(model, world, config))
            row[name] = str(folder / f"loaded_{name}_{stage}_{dtype}.pt")
            if world.main:
                torch.save(state, row[name])
        report.append(row)
    return report


def holdings(model: torch.nn.Module) -> dict[str, Any]:
    """How many numbers this process has in its partitions and in whole parameters, and of which types."""
    shares = [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]
    return {
        "partitions": sum(share.numel() for share in shares),
        "whole": sum(p.numel() for p in model.parameters()),
        "dtypes": sorted({str(tensor.dtype) for tensor in (*shares, *model.parameters())}),
    }


def storages(model: torch.nn.Module) -> set[int]:
    """Where this process's parameters, their partitions and buffers lie."""
    tensors = [*model.parameters(), *model.buffers(), *(getattr(p, "ds_tensor", p) for p in model.parameters())]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.untyped_storage().nbytes()}


def leak(world: World, folder: Path) -> list[dict[str, Any]]:
    """Memory, engines and hooks over a hundred switches, with a step after each."""
    report = []
    for stage in (2, 3):
        model = make_model(vocab_size=8_000)  # an embedding of 4 MB, and as much for its master and for each moment
        layers = Layers(model)
        trained = zero_copy(world, model, active=layers.active((0,), True), zero_stage=stage)
        micro = TRAIN.batch(torch.arange(4), budget(world), world).micro_batches[0]
        rows, start = [], time.perf_counter()
        for switch in range(1, 101):
            trained.activate(*layers.active((switch % BLOCKS,), True))
            trained.backward(trained.losses(micro, 0).sum(), last=True)
            trained.step(1e-4, trained.gradient_norm())
            if switch % 10 == 0:
                rows.append({"switch": switch, "ranks": world.gather(usage(model))})
        trained._stop(set())
        left = usage(model)
        report.append({"stage": stage, "rows": rows, "left": left, "seconds": time.perf_counter() - start})
    return report


def usage(model: torch.nn.Module) -> dict[str, int]:
    """What this process holds: resident bytes, live engines, hooks, and the bytes behind the parameters' shares."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory back to the system, so that what is resident is what is held
    shares = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    behind = {share.untyped_storage().data_ptr(): share.untyped_storage().nbytes() for share in shares}
    dictionaries = [vars(module) for module in model.modules()]
    on_parameters = [hooks for p in model.parameters() for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    return {
        "rss": psutil.Process().memory_info().rss,
        "engines": sum(isinstance(thing, DeepSpeedEngine) for thing in gc.get_objects()),
        "hooks": sum(len(value) for names in dictionaries for name, value in names.items() if "hook" in name and value),
        "parameter_hooks": sum(len(hooks) for hooks in on_parameters if hooks),
        "storage": sum(behind.values()),
        "own": sum(share.nbytes for share in shares),
    }
