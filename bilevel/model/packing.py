"""Packed rows in a model: which models and machines can have them, and a trial that rows do not see each other.

A packed micro-batch is one sequence of several rows. Only attention lets tokens of a sequence see each other, so it
alone must know where rows begin and end. transformers' flash_attention_2 does; other models get the attention of
bilevel.model.packed_attention.
"""

import inspect

import torch
import transformers

from bilevel.data.batches import MicroBatch
from bilevel.errors import UserError
from bilevel.model.base_copy import ModelCopy
from bilevel.model.loading import drops, trained_shape
from bilevel.model.masks import pass_arguments, unsearched_positions
from bilevel.model.packed_attention import NAME, WIDEST, why_no_varlen
from bilevel.settings.fields import Settings

SEPARATE = ("full_attention", "sliding_attention")  # layers whose tokens see each other through attention only


def why_padded(
    settings: Settings, config: transformers.PretrainedConfig, device: torch.device, dtype: str
) -> str | None:
    """Why the rows of a run are padded; None if they are to be packed. Raises UserError if packing=true cannot be.

    config: the model's own. dtype: of the passes, fp32 or bf16.
    """
    if settings.packing is False:
        return "packing=false"
    reason = (
        _of_settings(settings, config) or _of_model(settings, config) or _of_machine(settings, config, device, dtype)
    )
    if reason is not None and settings.packing:
        raise UserError(f"packing=true: {reason}; leave packing out, and rows are padded")
    if reason is None and settings.packing is None and device.type != "cuda":
        return "on a CPU rows are packed with packing=true only"
    return reason


def _of_settings(settings: Settings, config: transformers.PretrainedConfig) -> str | None:
    """Why these settings cannot have packed rows."""
    if settings.attn_implementation in ("eager", "sdpa"):
        return f"attn_implementation={settings.attn_implementation} cannot keep packed rows apart"
    if drops(trained_shape(settings, config)):
        return "attention of packed rows has no dropout, and the model has (dropout=0 turns it off)"
    return None


def _of_model(settings: Settings, config: transformers.PretrainedConfig) -> str | None:
    """Why models of this shape cannot have packed rows."""
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    name, text = f"{config.model_type} models", config.get_text_config()
    if kind is None or not kind._supports_attention_backend or "position_ids" not in _arguments(kind):
        return f"{name} do not let another attention take the place of their own"
    types = set(getattr(text, "layer_types", None) or SEPARATE[:1])
    if getattr(kind, "_is_stateful", False) or not types.issubset(SEPARATE):
        return f"{name} have layers besides attention that carry something from token to token"
    if settings.attn_implementation == "flash_attention_2":
        return None
    if not kind._supports_sdpa:
        return f"the attention of {name} is more than softmax of scaled products (such as a soft cap)"
    window = getattr(text, "sliding_window", None)
    sliding = "sliding_attention" in types or not getattr(text, "layer_types", None)
    if sliding and window is not None and window < settings.max_length:
        return f"the model's sliding window of {window} tokens is shorter than max_length {settings.max_length}"
    return None


def _arguments(kind: type[transformers.PreTrainedModel]) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)


def _of_machine(
    settings: Settings, config: transformers.PretrainedConfig, device: torch.device, dtype: str
) -> str | None:
    """Why packed rows cannot be computed on this device."""
    if device.type != "cuda":
        return None
    if dtype != "bf16":
        return "on a GPU, attention of packed rows needs dtype=bf16"
    if settings.method == "align":
        return "method=align has passes in fp32, and attention of packed rows on a GPU needs bf16"
    width = _widest_head(config.get_text_config())
    if settings.attn_implementation != "flash_attention_2":
        return why_no_varlen(device, width)
    return f"the model's heads are {width} wide, and flash attention takes {WIDEST}" if width > WIDEST else None


def _widest_head(config: transformers.PretrainedConfig) -> int:
    given = [getattr(config, name, None) or 0 for name in ("head_dim", "global_head_dim")]
    return max(given) or config.hidden_size // config.num_attention_heads


def use_packed_rows(copy: ModelCopy, settings: Settings) -> None:
    """Give the copy an attention that keeps packed rows apart; flash_attention_2 does already."""
    copy.packed = True
    if settings.attn_implementation != "flash_attention_2":
        getattr(copy, "module", copy.model).set_attn_implementation(NAME)  # without DeepSpeed's engine around it


def check_rows_stay_apart(copy: ModelCopy) -> None:
    """Raises UserError if a token of a packed row depends on another row.

    Tried with two rows of four tokens: what does the second one change by when the first has other tokens? It must be
    little beside the change where both are one row of eight.
    """
    model, device = copy.model, copy.world.device
    was_training = model.training
    model.eval()  # evaluation mode draws no random numbers

    def second(first: int, lengths: list[int]) -> torch.Tensor:
        ids = torch.tensor([[first] * 4 + [2, 3, 2, 3]])
        none = torch.zeros(len(lengths), dtype=torch.int64)
        micro = MicroBatch(ids, torch.full_like(ids, -100), none, none, none.double(), torch.tensor(lengths)).to(device)
        with copy.computing(), unsearched_positions():
            logits = model(**pass_arguments(micro), use_cache=False).logits
        return logits[0, 4:].double()

    with torch.no_grad():
        apart, together = (second(0, lengths) - second(1, lengths) for lengths in ([4, 4], [8]))
    model.train(was_training)
    if not apart.norm() <= together.norm() / 20:
        raise UserError(
            "packing: tokens of one packed row depend on another row in this model; use packing=false, and report the "
            "model"
        )
