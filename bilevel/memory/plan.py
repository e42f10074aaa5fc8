"""The memory plan: what a run will need per GPU, per host and on disk, computed before anything is loaded.

Tensors (parameters, masters, moments, gradients, residual bits) are counted in the layout of bilevel.model.torch_copy
and bilevel.model.zero_copy, padding included; tests/memory/test_plan.py compares the counts with measured bytes.
Activations and logits come from a pass on the meta device (bilevel.memory.activations). Buckets and gathered parameters
are upper bounds. GB = 1e9 bytes.
"""

import dataclasses
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from bilevel.errors import UserError
from bilevel.memory.activations import draw_worst, measure_pass, meta_model, micro_batch
from bilevel.memory.adapted import SIZE, Adapted
from bilevel.memory.remedies import changes
from bilevel.memory.zero_layout import Layout, Parameters
from bilevel.model.frozen_base import base_dtype
from bilevel.model.gathering import with_prefetch
from bilevel.model.lisa import Layers
from bilevel.model.loading import model_shape
from bilevel.settings.deepspeed import zero_config
from bilevel.settings.fields import Settings

GB = 1e9
SHAPES = Path(__file__).parents[2] / "configs" / "models"
RUNTIME = 1.5 * GB  # per GPU: CUDA context 0.5 GB, NCCL and cuBLAS workspaces 0.6 GB, the rest fragmentation
CPU_RUNTIME = 0.7 * GB  # per process on a CPU
GPU_LINE, CPU_LINE = "CUDA, NCCL, allocator", "Python, torch and the other libraries"
HOST_PROCESS = 3 * GB  # per process: Python, torch, CUDA, tokenised data
SHARD = 10 * GB  # the largest weights file of a pretrained model; the hub's default is 5 GB


class Unmeasurable(UserError):
    """A kind of model whose pass cannot be measured on the meta device."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by line. gpu: of one process. Lines of `or_else` never occur together: only the largest counts."""

    title: str
    processes: int
    gpu: dict[str, float]
    or_else: dict[str, float]
    host: dict[str, float]
    at_load: dict[str, float]
    disk: dict[str, float]  # in the run folder
    residual: float  # bytes per GPU, if residual bits are kept on it
    residual_place: str  # device, host, off; none if there are no residual bits
    limit: float | None
    cpu: bool = False  # the processes run on the CPU: `gpu` is memory of the host, and part of `host`
    remedies: tuple[str, ...] = ()

    @property
    def without_residual(self) -> float:
        return sum(self.gpu.values()) + max(self.or_else.values())

    @property
    def with_residual(self) -> float:
        """Bytes per GPU if residual bits were kept on it, whatever the settings say."""
        return self.without_residual + self.residual

    @property
    def total(self) -> float:
        return self.with_residual if self.residual_place == "device" else self.without_residual

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None else self.total <= self.limit

    def on_cpu(self, memory: float) -> "Plan":
        """The plan of the same processes on the CPU of one host, each of which may take so many bytes."""
        lines = {line: size for line, size in self.gpu.items() if line != GPU_LINE} | {CPU_LINE: CPU_RUNTIME}
        on_cpu = dataclasses.replace(self, gpu=lines, limit=memory, cpu=True)
        processes = {"processes": self.processes * on_cpu.total}
        return dataclasses.replace(on_cpu, host=self.host | processes, at_load=self.at_load | processes)


def memory_plan(settings: Settings, processes: int, hosts: int = 1) -> Plan:
    """The plan of a run on this machine, or on the GPUs of gpu_memory_gib. Reads no weights and needs no network.

    processes: in total, one per GPU. Raises Unmeasurable, and UserError.
    """
    here = on_this_cpu(settings)
    dtype = settings.dtype or ("fp32" if here or not (torch.cuda.is_available() or settings.gpu_memory_gib) else "bf16")
    shape = run_shape(settings)
    free = hosts * psutil.virtual_memory().available / processes if here else None
    if settings.gpu_memory_gib is None and torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        settings = dataclasses.replace(settings, gpu_memory_gib=round(total / 2**30, 1))
    try:
        return plan(settings, shape, processes, dtype, hosts, free)
    except RuntimeError as error:  # an operation that does not work on the meta device, such as experts in fp32
        kind = f"a model of type {shape.model_type} in {dtype}"
        raise Unmeasurable(f"{kind} cannot be measured without data: {error}") from None


def on_this_cpu(settings: Settings) -> bool:
    """Whether the run is meant for the CPU of this machine."""
    return settings.backend == "torch" and settings.gpu_memory_gib is None and not torch.cuda.is_available()


def run_shape(settings: Settings) -> transformers.PretrainedConfig:
    """The model's configuration: the one in configs/models if there is one, else the one that the run will load."""
    shipped = SHAPES / f"{(settings.model_name_or_path or '').replace('/', '--')}.json"
    if settings.model_name_or_path is not None and shipped.is_file():
        settings = dataclasses.replace(settings, model_name_or_path=str(shipped))
    return model_shape(settings)


def plan(
    settings: Settings,
    shape: transformers.PretrainedConfig,
    processes: int,
    dtype: str,
    hosts: int = 1,
    cpu_memory: float | None = None,
) -> Plan:
    """The plan of the run. If it exceeds the limit, it includes remedies.

    cpu_memory: bytes that each process may take, if the processes run on a CPU.
    """

    def estimate(changed: Settings, model: torch.nn.Module, config: dict[str, Any]) -> Plan:
        found = _estimate(changed, model, processes, dtype, hosts, config)
        return found if cpu_memory is None else found.on_cpu(cpu_memory)

    config = zero_config(settings, dtype) if settings.backend == "deepspeed" else {}
    model = meta_model(settings, shape, dtype)
    found = estimate(settings, model, config)
    if found.fits is not False:
        return found
    remedies = []
    for words, changed, changed_config in changes(settings, model, config):
        other = estimate(changed, meta_model(changed, shape, dtype), changed_config)
        saved = (found.total - other.total) / GB
        if saved > 0.05:
            verdict = "fits" if other.fits else "does not fit yet"
            remedies.append(f"{words}: saves {saved:.1f} GB, then {other.total / GB:.1f} GB in total, {verdict}")
    return dataclasses.replace(found, remedies=tuple(remedies))


def _estimate(
    settings: Settings, model: torch.nn.Module, processes: int, dtype: str, hosts: int, config: dict[str, Any]
) -> Plan:
    """The plan of these settings; config is DeepSpeed's, empty under plain torch. Freezes parameters of the model."""
    groups, frozen = _groups(settings, model)
    layout = _layout(settings, dtype, processes, with_prefetch(config, model))
    one_pass = measure_pass(settings, model)
    size = sum(p.numel() for p in model.parameters())
    adapters = Adapted.of(settings, model, dtype) if settings.lora_rank is not None else None
    gpu = adapters.gpu() if adapters else layout.gpu(model, groups)
    gpu |= {
        "gathered and reduced in a pass": adapters.casts if adapters else layout.passing(model, groups),
        "activations": one_pass.kept,
        GPU_LINE: RUNTIME,
    }
    or_else = {
        "logits and loss": one_pass.logits,
        "backward pass of a block": one_pass.backward,
        "fp32 copy of gradients in the step": _step_copy(layout, groups) - one_pass.kept,
    }
    keeps_bits = layout.stage > 0 and dtype == "bf16" and settings.lisa_layers is not None
    residual = layout.copies * 2 * sum(map(layout.partition, frozen)) if keeps_bits else 0
    host = {"processes": HOST_PROCESS * processes} | layout.host(model, groups)
    if residual and settings.lisa_residual == "host":
        host["residual bits"] = residual * processes
    checkpoint = adapters.checkpoint() if adapters else layout.checkpoint(model, groups)
    if settings.lisa_residual != "off":
        checkpoint += residual * processes
    host["checkpoint being written"] = checkpoint
    disk = {
        "checkpoints kept": settings.checkpoints_kept * checkpoint,
        "next checkpoint being written": checkpoint,
        "model": _saved(settings, adapters, size * layout.parameter_size),
    }
    host = {line: size / hosts for line, size in host.items()}
    whole = (min(SHARD, SIZE[dtype] * adapters.whole) if adapters else size * layout.parameter_size) * processes
    at_load = {
        "processes": host["processes"],
        "pretrained weights, read once": min(SHARD, whole) if layout.stage == 3 else whole / hosts,
    }
    if layout.offloaded("param"):
        at_load["offloaded parameters"] = host["offloaded parameters"]
    limit = settings.gpu_memory_gib * 2**30 if settings.gpu_memory_gib else None
    return Plan(
        _title(settings, size, dtype, layout),
        processes,
        gpu,
        {line: max(0.0, need) for line, need in or_else.items()},
        host,
        at_load,
        disk,
        residual,
        settings.lisa_residual if residual else "none",
        limit,
    )


def _groups(settings: Settings, model: torch.nn.Module) -> tuple[list[Parameters], list[Parameters]]:
    """The optimizer's parameter groups in the worst draw of blocks, and the frozen blocks; sets requires_grad."""
    if settings.lora_rank is not None:
        return [[p for p in model.parameters() if p.requires_grad]], []
    groups, frozen = [list(model.parameters())], []
    if settings.lisa_layers is not None:
        layers = Layers(model)
        drawn = draw_worst(settings, layers)
        always_on, blocks = layers.active(drawn, settings.lisa_train_embeddings)
        groups = [group for group in (always_on, *blocks) if group]
        frozen = [block for i, block in enumerate(layers.blocks) if i not in drawn]
    active = {id(p) for group in groups for p in group}
    for p in model.parameters():
        p.requires_grad_(id(p) in active)
    return groups, frozen


def _layout(settings: Settings, dtype: str, processes: int, config: dict[str, Any]) -> Layout:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 0:
        both = settings.backend == "torch" and settings.order == 2  # u's step is open until w's training pass is over
        casts = 0 if dtype == "fp32" else 1 + both
        return Layout(0, processes, zero, 4, 4, casts=casts, copies=len(settings.copies) or 1)
    kept = (config.get("data_types") or {}).get("grad_accum_dtype") or dtype
    gradient = SIZE["bf16" if "b" in kept else "fp32"]
    return Layout(stage, processes, zero, SIZE[dtype], gradient, copies=len(settings.copies) or 1)


def _saved(settings: Settings, adapters: Adapted | None, whole: float) -> float:
    """Bytes of model/ in the run folder."""
    if settings.save_model == "none":
        return 0
    return adapters.saved(settings) if adapters else whole


def _step_copy(layout: Layout, groups: list[Parameters]) -> float:
    """Bytes of the fp32 copy that ZeRO's step makes of one model copy's gradients, one group at a time."""
    if not layout.stage or layout.offloaded("optimizer"):
        return 0
    return 4 * max(layout.partition(group) for group in groups)


def _title(settings: Settings, size: int, dtype: str, layout: Layout) -> str:
    rows, length = micro_batch(settings)
    how = [dtype]
    how.append("plain torch" if settings.backend == "torch" else f"ZeRO stage {layout.stage}")
    if layout.stage == 3:
        live, ahead = (layout.setting(name, 0) / 1e9 for name in ("max_live_parameters", "prefetch_bucket_size"))
        how[-1] += f" ({ahead:.2g}B parameters gathered ahead, while fewer than {live:.2g}B are)"
    if settings.lisa_layers is not None:
        frozen = "" if settings.lisa_train_embeddings else ", embeddings frozen"
        how.append(f"LISA with {settings.lisa_layers} blocks{frozen}")
    if settings.lora_rank is not None:
        how.append(f"LoRA of rank {settings.lora_rank} on a model in {base_dtype(settings, dtype)}")
    how.append(f"micro-batches up to {rows} x {length} tokens")
    how.append(f"gradient checkpointing {'on' if settings.gradient_checkpointing else 'off'}")
    name = settings.model_name_or_path or settings.model_config["model_type"]
    copies = "two copies" if layout.copies == 2 else "one copy"
    if settings.lora_rank is not None:
        copies = "two adapters on one copy" if layout.copies == 2 else "one adapter on one copy"
    return f"{name}, {size / 1e9:.2f}B parameters, {copies}: {', '.join(how)}"
