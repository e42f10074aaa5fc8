"""How the frozen model under adapters is stored: fp32, bf16 or 4 bit (base_dtype), and models that come quantised.

4 bit is nf4 with double quantisation by bitsandbytes (Dettmers et al. 2023, "QLoRA"): half a byte per weight, and 0.127
bits for its scale. The error is the same for u and w, which share the model, so it does not enter their gaps. int8 of
bitsandbytes is not offered: it rounds activations, which differ between the copies.
"""

import importlib.util
from typing import Any

import torch
import transformers

from bilevel.errors import UserError
from bilevel.settings.fields import Settings

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def base_dtype(settings: Settings, passes: str) -> str:
    """How the model is stored: the setting, or the dtype of the passes (fp32 or bf16) if it is null."""
    return settings.base_dtype or passes


def is_four_bit(settings: Settings, config: transformers.PretrainedConfig) -> bool:
    """Whether the model is stored in 4 bit, as base_dtype says or as it comes."""
    return settings.base_dtype == "nf4" or _quantised_by(config) is not None


def is_merged(settings: Settings, four_bit: bool) -> bool:
    """Whether model/ is a whole model with the adapter merged in: lora_merge, or if it is null, unless in 4 bit."""
    return not four_bit if settings.lora_merge is None else settings.lora_merge


def loading_arguments(
    settings: Settings, config: transformers.PretrainedConfig, passes: str, device: torch.device
) -> dict[str, Any]:
    """Arguments of from_pretrained for a model under adapters. passes: fp32 or bf16. Raises UserError."""
    kind = _quantised_by(config)
    stored = TYPES[passes if settings.base_dtype in (None, "nf4") else settings.base_dtype]
    arguments = {"dtype": stored, "device_map": {"": device}}  # the host holds one file of weights at a time
    if kind is None and settings.base_dtype != "nf4":
        return arguments
    _require_bitsandbytes()
    if kind is not None:
        return arguments
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=stored,
    )
    return arguments | {"quantization_config": quantised}


def keep_layout(model: torch.nn.Module) -> None:
    """Keep packed weights as they were read, on a CPU too.

    On processors with AVX512-BF16 bitsandbytes 0.50 packs them anew in the first pass without gradients. After that no
    gradient passes through them, in training mode either, and their scales are rounded to bf16.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def check_quantised(settings: Settings, config: transformers.PretrainedConfig) -> None:
    """Raises UserError if the model comes quantised in a way that cannot be trained."""
    kind = _quantised_by(config)
    if kind is None:
        return
    name = settings.model_name_or_path
    if kind != "4 bit of bitsandbytes":
        raise UserError(
            f"model_name_or_path {name!r}: its weights are quantised ({kind}), and gradients cannot pass through them; "
            "take the model as it was before, with base_dtype=nf4 and lora_rank to train it in 4 bit"
        )
    if settings.lora_rank is None:
        raise UserError(
            f"model_name_or_path {name!r}: its weights are quantised to 4 bit, so only adapters can be trained: give "
            "lora_rank, such as 16, or take the model as it was before"
        )
    if settings.base_dtype not in (None, "nf4"):
        raise UserError(
            f"model_name_or_path {name!r}: its weights are quantised to 4 bit, so base_dtype={settings.base_dtype} "
            "cannot be; leave it out"
        )


def _quantised_by(config: transformers.PretrainedConfig) -> str | None:
    """What the model's configuration says about its quantisation; None if it is not quantised."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("load_in_4bit"):
        return "4 bit of bitsandbytes"
    return (
        "8 bit of bitsandbytes" if found.get("load_in_8bit") else str(found.get("quant_method", "of an unknown kind"))
    )


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("a model in 4 bit needs bitsandbytes: pip install bitsandbytes==0.50.0 (see requirements.txt)")
