"""Check that a run's model can be built or read, before data are tokenised. No weights are read for it.

A folder's tensors are compared by name, shape and kind with the model that its config.json describes. transformers'
loading report makes the comparison; it knows which tensors a model does not need (tied heads, old buffers).
"""

import difflib
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from bilevel.errors import UserError, first, short
from bilevel.model.frozen_base import is_four_bit
from bilevel.model.pretrained import read_pretrained, said
from bilevel.settings.fields import Settings

SHOWN = 3  # names in a message
_OLD_BUFFERS = re.compile(r"\.masked_bias$")  # constants that transformers 3 saved in GPT-2 and its relatives
_WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")


def check_model(settings: Settings, config: transformers.PretrainedConfig) -> None:
    """Raises UserError if the model cannot be built from its configuration, or if its folder's weights do not fit."""
    name = settings.model_name_or_path
    where = "model_config" if name is None else f"model_name_or_path {name!r}"
    _check_activations(config, where)
    if name is None:
        try:
            with torch.device("meta"):
                transformers.AutoModelForCausalLM.from_config(config)
        except Exception as error:  # a model class can raise anything on numbers that it cannot use
            raise UserError(f"{where}: no model has these numbers: {said(error)}") from error
        return
    if is_four_bit(settings, config) and settings.base_dtype is None:
        return  # its tensors are packed; load_model checks them when it reads them
    model, report = read_pretrained(
        transformers.AutoModelForCausalLM,
        name,
        config=config,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_report(report, name, _integer_tensors(model, Path(name)))


def check_report(report: dict[str, Any], name: str, others: list[str] | None = None) -> None:
    """Raises UserError if a loading report of transformers has faults, or if there are others."""
    if faults := [*_faults(report), *(others or [])]:
        raise UserError(
            f"model_name_or_path {name!r}: the weights do not fit the model of its config.json, so parts of it would "
            f"be random: {'; '.join(faults)}.{_renamed(report)} Take a complete copy of the model, or correct its "
            "config.json"
        )


def _faults(report: dict[str, Any]) -> list[str]:
    """What a loading report of transformers says, by kind of fault, with a few names each."""
    unexpected = [name for name in report["unexpected_keys"] if not _OLD_BUFFERS.search(name)]
    shapes = [
        f"{name} is {_shape(there)} instead of {_shape(wanted)}" for name, there, wanted in report["mismatched_keys"]
    ]
    return [
        *_named("missing", report["missing_keys"]),
        *_named("not in the model", unexpected),
        *_named("of another shape", shapes),
        *_named("not readable", report["error_msgs"]),
    ]


def _named(fault: str, names: Any) -> list[str]:
    """A text with the number of tensors and the first names; nothing without names."""
    if not names:
        return []
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return [f"{count} {fault} ({', '.join(first(sorted(names), SHOWN))})"]


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a number"


def _renamed(report: dict[str, Any]) -> str:
    """A hint if the tensors fit once the first part of their names is left out, as those of a wrapped model do."""
    prefixes = {name.partition(".")[0] for name in report["unexpected_keys"]}
    bare = {name.partition(".")[2] for name in report["unexpected_keys"]}
    if len(prefixes) != 1 or not bare & report["missing_keys"]:
        return ""
    return f" They were saved from a wrapped model: rename them without {prefixes.pop()!r}."


def _integer_tensors(model: torch.nn.Module, folder: Path) -> list[str]:
    """A fault for parameters that a folder stores as integers, which would be taken for the weights themselves."""
    from transformers.modeling_utils import load_state_dict  # a second and more

    names = set(model.state_dict()) - {name for name, _ in model.named_buffers()}
    files = next((found for kind in _WEIGHT_FILES if (found := sorted(folder.glob(kind)))), [])
    stored = {name: tensor for file in files for name, tensor in load_state_dict(str(file), "meta").items()}
    wrong = [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in stored.items()
        if not tensor.is_floating_point() and not names.isdisjoint((name, f"{model.base_model_prefix}.{name}"))
    ]
    return _named("of integers (quantized?)", wrong)


def _check_activations(config: transformers.PretrainedConfig, where: str) -> None:
    """Raises UserError if transformers does not know an activation function of the configuration."""
    from transformers.activations import ACT2FN  # a second and more

    for name, value in config.to_dict().items():
        if not re.fullmatch(r"hidden_act|(hidden_)?activation(_function)?", name) or not isinstance(value, str):
            continue
        if value not in ACT2FN:
            near = difflib.get_close_matches(value, list(ACT2FN), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "one that it knows is gelu"
            raise UserError(f"{where}: transformers does not know the {name} {short(value)}; {hint}")
