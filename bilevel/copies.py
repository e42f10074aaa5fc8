"""The two copies of a run and the processes they live in, as the settings' backend wants them."""

import copy
import functools

import torch
import transformers

from bilevel.backend import ModelCopy, TorchCopy
from bilevel.config import Settings
from bilevel.lisa import Lisa
from bilevel.model import load_model
from bilevel.world import World


def start_world(settings: Settings) -> World:
    """The processes of the run; under plain torch this one alone, on the GPU when there is one."""
    if settings.backend == "deepspeed":
        from bilevel import zero  # DeepSpeed takes seconds to import

        return zero.start_world()
    return World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def two_copies(
    settings: Settings,
    world: World,
    shape: transformers.PretrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> tuple[dict[str, ModelCopy], Lisa | None]:
    """u and w, equal at the start, and what LISA lets them train."""
    s = settings
    dtype = s.dtype or ("bf16" if world.device.type == "cuda" else "fp32")
    if s.backend == "deepspeed":
        from bilevel.zero import ZeroCopy, load_two, zero_config

        config = zero_config(s, dtype)
        models = load_two(s, world, shape, tokenizer, config)
        make = functools.partial(ZeroCopy, world=world, config=config, residual=s.lisa_residual)
    else:
        model = load_model(s, shape, tokenizer).to(world.device)
        models = {"u": model, "w": copy.deepcopy(model)}
        make = functools.partial(TorchCopy, clip_grad_norm=s.clip_grad_norm, bf16=dtype == "bf16")
    lisa = Lisa(s, models) if s.lisa_layers is not None else None
    copies = {
        name: make(model, weight_decay=s.weight_decay, active=lisa.active(name) if lisa else None)
        for name, model in models.items()
    }
    return copies, lisa
