"""A copy of the model under DeepSpeed: ZeRO stages 0 to 3 over any number of processes.

One engine per set of active parameters. An engine's optimizer, masters and partitions are laid out once for the
parameters it is given, and freezing some of them later neither stops them nor frees anything. So when LISA draws other
blocks the engine is taken down and a new one made of what is active now, with a parameter group for what is always on
and one for each drawn block; the always-on group's masters and moments move over. Under bf16 a block that rests keeps
its fp32 master as bf16 weights and 16 residual bits each, so that no update is lost.

Pinned to the DeepSpeed of requirements.txt: this file reads some of its private names.
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
from bilevel.model.loading import load_model, save_model
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
    """Join the processes that a launcher started (torchrun, deepspeed); alone, a world of one."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ |= alone
    deepspeed.utils.logger.setLevel("ERROR")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Not used here, and built under a lock: a launch killed meanwhile would leave it, and all later ones wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with redirect_stdout(io.StringIO()):  # it tells of the kernels it builds
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return World(rank, int(os.environ["WORLD_SIZE"]), device)


class ZeroCopy(ModelCopy):
    """A copy under DeepSpeed. config: DeepSpeed's own, with everything that bilevel decides filled in.

    residual: where resting blocks' residual bits are kept under bf16, device, host or off (then they are lost).
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
        self.module, self.world, self.config, self.weight_decay = model, world, config, weight_decay
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
        self.engine.backward(loss * self.world.size)  # DeepSpeed takes the mean over ranks

    def gradient_norm(self) -> float:
        optimizer = self.engine.optimizer
        if self.stage == 0:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            return float(torch.nn.utils.get_total_norm(gradients))
        norm = (
            optimizer.scaled_global_norm() if self.stage < 3 else combine_grad_norm_groups(optimizer._get_norm_groups())
        )
        return float(norm) if norm >= 0 else math.nan  # DeepSpeed says -1 for a norm that is not finite

    def step(self, lr: float, norm: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def discard(self) -> None:
        inner = self._inner()
        inner.step = lambda *_, **__: None  # the engine clears its buffers as ever, and nothing moves
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
        """All parameters whole, on the CPU of rank 0; elsewhere empty. Gathered one at a time."""
        state = {}
        for name, p in self.module.state_dict(keep_vars=True).items():
            with whole(p):
                if self.world.main:
                    state[name] = p.detach().cpu().clone()
        return state

    def state_dict(self) -> dict[str, Any]:
        inner = self._inner().state
        parameters = {}
        if self.stage == 3 or self.world.main:  # else all ranks have the same
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
                if p.ds_status == ZeroParamStatus.AVAILABLE:  # whole, and now out of date
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
        """The parameters of a partition by their names."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        return ",".join(names[i] for i in ids)

    def _inner(self) -> torch.optim.Optimizer:
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer

    def _partitions(self) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        """What the inner optimizer steps: this rank's flat fp32 partitions, each with the ids of its parameters."""
        optimizer = self.engine.optimizer
        if self.stage == 0:
            return [((id(p),), p) for group in optimizer.param_groups for p in group["params"]]
        groups = optimizer.fp16_groups if self.stage == 3 else optimizer.bit16_groups
        flat = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        return [(tuple(map(id, group)), master) for group, master in zip(groups, flat, strict=True)]

    def _stop(self, keep: set[int]) -> Kept:
        """Take the engine down; returns masters and moments of the partitions whose parameters are all to be kept."""
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
            vars(p).pop("_z3_optimizer", None)  # the engine's, which would live on until the next has been made
        gc.collect()  # engines are full of cycles
        for p in self.module.parameters() if self.stage == 3 else ():
            # Out of the buffer that it shares with all that was active, which it would keep alive while it rests.
            if p.ds_tensor.untyped_storage().nbytes() > p.ds_tensor.nbytes:
                p.ds_tensor.data = p.ds_tensor.data.clone()
        return kept

    def _restore(self, kept: Kept) -> None:
        """Give the partitions that were there before their masters and moments back, and the others their last bits."""
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
    """The run's copies, equal. Under ZeRO-3 a pretrained model is partitioned as its checkpoint is read, shard by
    shard, and a second one is filled partition by partition from the first: no process ever holds a whole one."""
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    if config["zero_optimization"]["stage"] < 3 or settings.model_config is not None:
        model = load_model(settings, shape, tokenizer, dtype).to(world.device)
        return {name: copy.deepcopy(model) if number else model for number, name in enumerate(settings.copies)}
    partitioning = HfDeepSpeedConfig(copy.deepcopy(config))  # transformers partitions what it makes while this lives
    first, *others = (
        load_model(settings, shape, tokenizer, dtype, read_weights=number == 0)
        for number in range(len(settings.copies))
    )
    del partitioning
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
    """What fp32 weights have beyond their rounding to bf16, in units of their last bit: int16.

    Rounding to the nearest bf16 moves a weight by at most half a bf16 step, 2^15 fp32 steps; the one tie that an int16
    cannot hold is off by one fp32 step.
    """
    rounded = master.to(torch.bfloat16).float()
    return (master.view(torch.int32) - rounded.view(torch.int32)).clamp_(-(2**15), 2**15 - 1).to(torch.int16)


def add_residual_bits(master: torch.Tensor, bits: torch.Tensor) -> None:
    """Undo the rounding: master holds bf16 values as fp32 and gets its residual bits back, in place."""
    master.view(torch.int32).add_(bits.to(master.device))


@contextmanager
def whole(parameter: torch.nn.Parameter) -> Iterator[None]:
    """Inside, a parameter that ZeRO-3 has partitioned is whole on every rank, to be read."""
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            yield
    else:
        yield
