"""The model copies of a run and its processes, for the chosen backend (torch or DeepSpeed)."""

import copy
import functools

import torch
import transformers

from bilevel import processes
from bilevel.errors import UserError
from bilevel.model.base_copy import ModelCopy
from bilevel.model.lisa import Lisa
from bilevel.model.loading import drops, load_model, trained_shape
from bilevel.model.packing import check_rows_stay_apart, use_packed_rows, why_padded
from bilevel.model.response_end import taught_ends
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import World
from bilevel.settings.deepspeed import zero_config
from bilevel.settings.fields import Settings


def start_world(settings: Settings) -> World:
    """The processes of the run, each on a GPU of its own if the machine has some."""
    if settings.backend == "deepspeed":
        from bilevel.model import zero_copy as zero  # DeepSpeed takes seconds to import

        return zero.start_world()
    return processes.start_world()


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
    packed = why_padded(s, shape, world.device, dtype) is None
    if s.lora_rank is not None:
        copies = _adapter_copies(s, world, shape, tokenizer, dtype)
        return (_packed(copies, s) if packed else copies), None
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
        copies[name] = make(model, weight_decay=s.weight_decay, active=active)
    return (_packed(copies, s) if packed else copies), lisa


def _packed(copies: dict[str, ModelCopy], settings: Settings) -> dict[str, ModelCopy]:
    """The copies, changed so that they take packed rows. Raises UserError if the model mixes them."""
    for each in copies.values():
        use_packed_rows(each, settings)
    check_rows_stay_apart(copies["w"])
    return copies


def _adapter_copies(
    settings: Settings,
    world: World,
    shape: transformers.PretrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    dtype: str,
) -> dict[str, ModelCopy]:
    """The copies by name as adapters on one frozen model. Raises UserError."""
    from bilevel.model.adapter_copy import AdapterCopy
    from bilevel.model.frozen_base import is_four_bit, is_merged, loading_arguments

    s = settings
    stored = loading_arguments(s, shape, dtype, world.device)
    model = load_model(s, shape, tokenizer, stored=stored).to(world.device)
    model.taught_ends = taught_ends(s, tokenizer)
    together = equal_masks_together(s, shape) and model.adapters.rows_stay_apart()
    return {
        name: AdapterCopy(
            *(model, name, world, s.weight_decay, s.clip_grad_norm),
            bf16=dtype == "bf16",
            one_pass=together,
            token_budget=s.micro_batch_tokens,
            merged=is_merged(s, is_four_bit(s, shape)),
        )
        for name in s.copies
    }


def equal_masks_together(settings: Settings, shape: transformers.PretrainedConfig) -> bool:
    """Whether u and w have equal dropout masks in one pass: only without dropout, as each row has masks of its own."""
    return settings.lora_dropout == 0 and not drops(trained_shape(settings, shape))


def chosen_dtype(settings: Settings, device: torch.device) -> str:
    """The dtype setting, or if it is null, bf16 on a GPU that supports it, else fp32. Raises UserError."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.dtype == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError(f"dtype=bf16: {torch.cuda.get_device_name(device)} does not support bf16; use dtype=fp32")
    return settings.dtype or ("bf16" if has_bf16 else "fp32")
