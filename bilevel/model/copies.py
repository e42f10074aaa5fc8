"""The model copies of a run and its processes, for the chosen backend (torch or DeepSpeed)."""

import copy
import functools

import torch
import transformers

from bilevel.errors import UserError
from bilevel.model.base_copy import ModelCopy
from bilevel.model.lisa import Lisa
from bilevel.model.loading import load_model
from bilevel.model.response_end import taught_ends
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import World
from bilevel.settings.deepspeed import zero_config
from bilevel.settings.fields import Settings


def start_world(settings: Settings) -> World:
    """The processes of the run. Under plain torch there is one, on the GPU if the machine has one."""
    if settings.backend == "deepspeed":
        from bilevel.model import zero_copy as zero  # DeepSpeed takes seconds to import

        return zero.start_world()
    return World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def make_copies(
    settings: Settings,
    world: World,
    shape: transformers.PretrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    steps_done: int = 0,
) -> tuple[dict[str, ModelCopy], Lisa | None]:
    """The copies by name, with equal weights, and LISA (or None) at its state after steps_done steps."""
    s = settings
    if not s.copies:
        return {}, None
    dtype = chosen_dtype(s, world.device)
    if s.backend == "deepspeed":
        from bilevel.model.zero_copy import ZeroCopy, load_copies

        config = zero_config(s, dtype)
        models = load_copies(s, world, shape, tokenizer, config)
        make = functools.partial(ZeroCopy, world=world, config=config, residual=s.lisa_residual)
    else:
        model = load_model(s, shape, tokenizer).to(world.device)
        models = {name: copy.deepcopy(model) if number else model for number, name in enumerate(s.copies)}
        make = functools.partial(TorchCopy, clip_grad_norm=s.clip_grad_norm, bf16=dtype == "bf16")
    ends = taught_ends(s, tokenizer)
    for model in models.values():
        model.taught_ends = ends
    lisa = Lisa(s, models, steps_done) if s.lisa_layers is not None else None
    copies = {}
    for name, model in models.items():
        active = lisa.active(name) if lisa else None
        if s.lora_rank is not None:
            active = [p for p in model.parameters() if p.requires_grad], []
        copies[name] = make(model, weight_decay=s.weight_decay, active=active)
    return copies, lisa


def chosen_dtype(settings: Settings, device: torch.device) -> str:
    """The dtype setting, or if it is null, bf16 on a GPU that supports it, else fp32. Raises UserError."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.dtype == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError(f"dtype=bf16: {torch.cuda.get_device_name(device)} does not support bf16; use dtype=fp32")
    return settings.dtype or ("bf16" if has_bf16 else "fp32")
