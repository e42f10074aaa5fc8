"""A model copy under DeepSpeed: ZeRO stages 0 to 3 over any number of processes.

There is one engine per set of trainable parameters. An engine lays out its optimizer, master weights and partitions
once; freezing parameters later neither stops their updates nor frees memory. So when LISA draws other blocks, the
engine is destroyed and a new one is created for the parameters that are trainable now: one parameter group for those
that are always trained, and one per drawn block. Masters and moments of the first group move over. Under bf16 a frozen
block keeps its fp32 masters as bf16 weights plus 16 residual bits each, so no update is lost.

This file uses private names of DeepSpeed, so it works only with the version in requirements.txt.
"""

import copy
import gc
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import distributed
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from bilevel.model.base_copy import Active, ModelCopy, Parameters
from bilevel.model.flops import Passes
from bilevel.model.gathering import with_prefetch
from bilevel.model.loading import check_finite, load_model, save_model
from bilevel.processes import World
from bilevel.settings.fields import Settings

Kept = dict[tuple[int, ...], tuple[torch.Tensor, dict[str, Any]]]
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def start_world() -> World:
    """Join the processes that torchrun or deepspeed launched; without a launcher, a world of one process."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ |= alone
    deepspeed.utils.logger.setLevel("ERROR")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Unused here, and built under a lock: a launch that is killed meanwhile makes all later ones wait forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with redirect_stdout(io.StringIO()):  # it prints which kernels it builds
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return World(rank, int(os.environ["WORLD_SIZE"]), device)


class ZeroCopy(ModelCopy):
    """A model copy under DeepSpeed. config: from bilevel.settings.deepspeed.zero_config.

    residual: where the residual bits of frozen blocks are kept under bf16: device, host, or off (they are lost).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        world: World,
        config: dict[str, Any],
        weight_decay: float = 0.0,
        active: Active | None = None,
        residual: str = "device",
    ):
        self.residual, self.residuals, self.passed = residual, {}, Passes()
        self.module, self.world, self.weight_decay = model, world, weight_decay
        self.config = with_prefetch(config, model)
        self.stage, self.bf16_weights = config["zero_optimization"]["stage"], config["bf16"]["enabled"]
        self.bf16 = self.bf16_weights or "torch_autocast" in config
        self.engine = None
        self.hooks = {module: [set(getattr(module, name)) for name in HOOKS] for module in model.modules()}
        self.activate(*(active or (list(model.parameters()), [])))

    @property
    def model(self) -> torch.nn.Module:
        return self.engine

    @property
    def shape(self) -> transformers.PretrainedConfig:
        return self.module.config

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size)  # DeepSpeed averages over ranks, and we want the sum

    def gradient_norm(self) -> float:
        optimizer = self.engine.optimizer
        if self.stage == 0:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            return float(torch.nn.utils.get_total_norm(gradients))
        norm = (
            optimizer.scaled_global_norm() if self.stage < 3 else combine_grad_norm_groups(optimizer._get_norm_groups())
        )
        return float(norm) if norm >= 0 else math.nan  # DeepSpeed returns -1 for a norm that is not finite

    def step(self, lr: float, norm: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def discard(self) -> None:
        inner = self._inner()
        inner.step = lambda *_, **__: None  # engine.step then clears its buffers, but no parameter moves
        self.engine.step()
        del inner.step

    def activate(self, always_on: Parameters, drawn: list[Parameters]) -> None:
        kept = self._stop({id(p) for p in always_on})
        groups = [{"params": group} for group in (always_on, *drawn) if group]
        active = {id(p) for group in groups for p in group["params"]}
        for p in self.module.parameters():
            p.requires_grad_(id(p) in active)
            p.grad = None
        optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=self.weight_decay, fused=True)
        self.engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=copy.deepcopy(self.config), dist_init_required=False
        )
        self._restore(kept)

    def save(self, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        state = self.whole_state()
        if self.world.main:
            save_model(self.module, folder, tokenizer, state)
        self.world.wait()

    def whole_state(self) -> dict[str, torch.Tensor]:
        """All parameters, gathered one at a time, on the CPU of rank 0; an empty dict on other ranks."""
        state = {}
        for name, p in self.module.state_dict(keep_vars=True).items():
            with whole(p):
                if self.world.main:
                    state[name] = p.detach().cpu().clone()
        return state

    def state_dict(self) -> dict[str, Any]:
        inner = self._inner().state
        parameters = {}
        if self.stage == 3 or self.world.main:  # otherwise all ranks hold the same weights
            parameters = {name: getattr(p, "ds_tensor", p) for name, p in self.module.named_parameters()}
        partitions = [(self._key(ids), partition) for ids, partition in self._partitions()]
        return {
            "parameters": parameters,
            "masters": dict(partitions) if self.stage else {},
            "moments": {key: inner[partition] for key, partition in partitions if partition in inner},
            "residuals": {self._key(ids): bits for ids, bits in self.residuals.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, p in self.module.named_parameters():
            if self.stage == 3:
                p.ds_tensor.data.copy_(state["parameters"][name])
                if p.ds_status == ZeroParamStatus.AVAILABLE:  # a gathered copy exists and is now out of date
                    p.partition(has_been_updated=False)
            else:
                if self.world.main:
                    p.copy_(state["parameters"][name])
                if self.world.size > 1:
                    distributed.broadcast(p.data, 0)
        inner = self._inner().state
        for ids, partition in self._partitions():
            key = self._key(ids)
            if self.stage:
                partition.data.copy_(state["masters"][key])
            if key in state["moments"]:
                inner[partition] = {name: value.to(partition.device) for name, value in state["moments"][key].items()}
        numbers = {name: id(p) for name, p in self.module.named_parameters()}
        for key, bits in state["residuals"].items():
            ids = tuple(numbers[name] for name in key.split(","))
            self.residuals[ids] = bits if self.residual == "host" else bits.to(self.world.device)

    def _key(self, ids: tuple[int, ...]) -> str:
        """Key of a partition in a checkpoint: the names of its parameters."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        return ",".join(names[i] for i in ids)

    def _inner(self) -> torch.optim.Optimizer:
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer

    def _partitions(self) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        """This rank's flat fp32 partitions, which the inner optimizer steps, each with the ids of its parameters."""
        optimizer = self.engine.optimizer
        if self.stage == 0:
            return [((id(p),), p) for group in optimizer.param_groups for p in group["params"]]
        groups = optimizer.fp16_groups if self.stage == 3 else optimizer.bit16_groups
        flat = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        return [(tuple(map(id, group)), master) for group, master in zip(groups, flat, strict=True)]

    def _stop(self, keep: set[int]) -> Kept:
        """Destroy the engine; return masters and moments of the partitions whose parameters are all in `keep`."""
        if self.engine is None:
            return {}
        state, kept = self._inner().state, {}
        for ids, partition in self._partitions():
            if keep.issuperset(ids) and partition in state:
                kept[ids] = partition.detach(), state[partition]
            elif self.bf16_weights and self.residual != "off":
                bits = residual_bits(partition.detach())
                self.residuals[ids] = bits.cpu() if self.residual == "host" else bits
        self.engine.destroy()
        self.engine = None
        for module, before in self.hooks.items():
            for name, known in zip(HOOKS, before, strict=True):
                hooks = getattr(module, name)
                for key in [key for key in hooks if key not in known]:
                    del hooks[key]
        for p in self.module.parameters():
            vars(p).pop("_z3_optimizer", None)  # it would keep the old engine alive until the next one exists
        gc.collect()  # engines contain reference cycles
        for p in self.module.parameters() if self.stage == 3 else ():
            # Copy it out of the buffer shared by all formerly trainable parameters, or it would keep that buffer alive.
            if p.ds_tensor.untyped_storage().nbytes() > p.ds_tensor.nbytes:
                p.ds_tensor.data = p.ds_tensor.data.clone()
        return kept

    def _restore(self, kept: Kept) -> None:
        """Restore masters and moments of kept partitions, and the residual bits of the others."""
        for ids, partition in self._partitions():
            if ids in kept:
                master, state = kept[ids]
                partition.data.copy_(master)
                self._inner().state[partition] = state
            elif ids in self.residuals:
                add_residual_bits(partition.data, self.residuals.pop(ids))


def load_copies(
    settings: Settings,
    world: World,
    shape: transformers.PretrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    config: dict[str, Any],
) -> dict[str, torch.nn.Module]:
    """The models of a run's copies, with equal weights.

    Under ZeRO-3 a pretrained model is partitioned while its checkpoint is read, shard by shard, and a second one is
    filled from the first, partition by partition. No process ever holds a whole model.
    """
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    if config["zero_optimization"]["stage"] < 3 or settings.model_config is not None:
        model = load_model(settings, shape, tokenizer, dtype).to(world.device)
        return {name: copy.deepcopy(model) if number else model for number, name in enumerate(settings.copies)}
    partitioning = HfDeepSpeedConfig(
        copy.deepcopy(config)
    )  # while this object exists, transformers partitions the models it makes
    first, *others = (
        load_model(settings, shape, tokenizer, dtype, read_weights=number == 0)
        for number in range(len(settings.copies))
    )
    del partitioning
    check_finite(first, settings.model_name_or_path, whole)
    with torch.no_grad():
        for copied in others:
            copied.generation_config = first.generation_config
            for mine, other in zip(copied.parameters(), first.parameters(), strict=True):
                mine.ds_tensor.copy_(other.ds_tensor)
                if mine.ds_status == ZeroParamStatus.AVAILABLE:
                    mine.copy_(other)
            for mine, other in zip(copied.buffers(), first.buffers(), strict=True):
                mine.copy_(other)
    return dict(zip(settings.copies, (first, *others), strict=True))


def residual_bits(master: torch.Tensor) -> torch.Tensor:
    """Difference between fp32 weights and their rounding to bf16, in units of the last fp32 bit, as int16.

    Rounding to the nearest bf16 moves a weight by at most half a bf16 step, which is 2^15 fp32 steps. One tie does not
    fit into int16; it ends off by one fp32 step.
    """
    rounded = master.to(torch.bfloat16).float()
    return (master.view(torch.int32) - rounded.view(torch.int32)).clamp_(-(2**15), 2**15 - 1).to(torch.int16)


def add_residual_bits(master: torch.Tensor, bits: torch.Tensor) -> None:
    """Undo the rounding in place: master holds bf16 values as fp32, and its residual bits are added."""
    master.view(torch.int32).add_(bits.to(master.device))


@contextmanager
def whole(parameter: torch.nn.Parameter) -> Iterator[None]:
    """A context in which a parameter that ZeRO-3 has partitioned is whole on every rank, for reading."""
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            yield
    else:
        yield
