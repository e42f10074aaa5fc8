"""The tokenizer and the model of a run: read from a folder or the hub, or built new (bilevel.model.build).

The rest of the code does not know which of the two it works with.
"""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from bilevel.data.records import read_rows
from bilevel.data.sources import Source
from bilevel.errors import UserError, first
from bilevel.files import remove_unfinished, whole_file
from bilevel.model.build import new_model, new_shape, new_tokenizer
from bilevel.model.check import check_report
from bilevel.model.frozen_base import keep_layout
from bilevel.model.pretrained import read_pretrained, read_tokenizer
from bilevel.model.response_end import with_end, with_ends
from bilevel.settings.fields import Settings


def load_tokenizer(settings: Settings, sources: list[Source]) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer; for a new model, one of model_config.vocab_size tokens trained on sources.

    Raises UserError if there is no tokenizer, or if it cannot be that of the model.
    """
    if settings.model_name_or_path is not None:
        return read_tokenizer(settings.model_name_or_path)
    rows = [read_rows(source) for source in sources]
    return new_tokenizer(rows, settings.model_config["vocab_size"])


def model_shape(settings: Settings) -> transformers.PretrainedConfig:
    """The model's configuration, without reading weights. Raises UserError if max_length exceeds its positions."""
    if settings.model_name_or_path is not None:
        config = read_pretrained(transformers.AutoConfig, settings.model_name_or_path)
    else:
        config = new_shape(settings.model_config)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.max_length > longest:
        raise UserError(
            f"max_length {settings.max_length}: the model has only {longest} positions; use {longest} or less"
        )
    return config


def load_model(
    settings: Settings,
    config: transformers.PretrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    read_weights: bool = True,
    stored: dict[str, Any] | None = None,
) -> torch.nn.Module:
    """The model in training mode, with an embedding for every token of the tokenizer.

    A pretrained model has `dtype`; with read_weights=False its weights are arbitrary, for the caller to fill. A new
    model is fp32, and its weights depend on the seed. config: the model's own configuration; it is not changed. stored:
    arguments of from_pretrained in place of dtype, for a model under adapters (bilevel.model.frozen_base); its dtype
    holds for a new model, too. Raises UserError.
    """
    from bilevel.model.adapters import add_adapters
    from bilevel.model.cpu_kernels import speed_up  # slow imports, which a wrong configuration should not wait for

    own_dropouts, config = dropouts(config), trained_shape(settings, config)
    if settings.model_name_or_path is not None and not read_weights:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=settings.attn_implementation
        )
    elif settings.model_name_or_path is not None:
        model, report = read_pretrained(
            transformers.AutoModelForCausalLM,
            settings.model_name_or_path,
            config=config,
            attn_implementation=settings.attn_implementation,
            output_loading_info=True,
            **(stored or {"dtype": dtype}),
        )
        check_report(report, settings.model_name_or_path)
        keep_layout(model)
        check_finite(model, settings.model_name_or_path)
    else:
        model = new_model(config, tokenizer, settings.attn_implementation, settings.seed)
        model = model.to(stored["dtype"]) if stored else model
    if settings.lisa_layers is not None and (frozen := [n for n, p in model.named_parameters() if not p.requires_grad]):
        raise UserError(
            f"lisa_layers: {len(frozen)} parameters of this model are frozen ({frozen[0]}, ...), but LISA would train "
            "them; merge adapters into the model first, or train without LISA"
        )
    if (known := model.get_input_embeddings().num_embeddings) < len(tokenizer):
        if settings.lora_rank is not None:
            new = ", ".join(first(tokenizer.convert_ids_to_tokens(range(known, len(tokenizer))), 5))
            raise UserError(
                f"lora_rank: the tokenizer has {len(tokenizer) - known} tokens without an embedding in the model "
                f"({new}), and adapters would leave them random; take the model's own tokenizer, or train without "
                "adapters"
            )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if settings.gradient_checkpointing:
        # No determinism check: under ZeRO-3 it fails on parameters that have been partitioned again since.
        model.activation_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})
    if settings.lora_rank is not None:
        model.adapters = add_adapters(model, settings)
    model.own_dropouts, model.taught_ends = own_dropouts, []  # for save_model; make_copies fills the second
    return speed_up(model).train()


def check_finite(model: torch.nn.Module, name: str, whole: Callable = contextlib.nullcontext) -> None:
    """Raises UserError if the model's own weights hold NaN or infinity.

    whole: the context in which a parameter can be read. Without it, parameters that ZeRO-3 has partitioned are empty.
    """
    bad = []
    for parameter, values in model.named_parameters():
        with whole(values):
            if not values.isfinite().all():
                bad.append(parameter)
    if bad:
        raise UserError(
            f"model_name_or_path {name!r}: {len(bad)} of its tensors hold NaN or infinity ({bad[0]}, ...), so no loss "
            "can be computed; take another copy of the model"
        )


def save_model(
    model: "transformers.PreTrainedModel",  # quoted, because evaluating this name takes seconds
    folder: Path,
    tokenizer: transformers.PreTrainedTokenizerBase,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the model, with its original dropout values, and the tokenizer. weights: written instead of the model's.

    Generation with what is written stops at the tokens that training taught as the end of a response. What a killed
    process left half written there is removed.
    """
    if folder.is_dir():
        remove_unfinished(folder)
    trained, model.config = model.config, copy.deepcopy(model.config)
    for name, rate in model.own_dropouts.items():
        setattr(model.config, name, rate)
    model.generation_config = with_ends(model.generation_config, model.taught_ends)
    model.save_pretrained(folder, state_dict=weights)
    model.config = trained
    with_end(tokenizer, model.taught_ends).save_pretrained(folder)


def save_adapter(
    model: "transformers.PreTrainedModel",
    name: str,
    parameters: dict[str, torch.Tensor],
    folder: Path,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    """Write one adapter as a folder that peft's PeftModel.from_pretrained reads, and the tokenizer.

    It names its base model. generation_config.json says where generation stops, as in save_model.
    """
    if folder.is_dir():
        remove_unfinished(folder)
    folder.mkdir(exist_ok=True)
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    state = {f"base_model.model.{full.replace(f'.{name}.', '.')}": p.detach() for full, p in parameters.items()}
    with whole_file(folder / "adapter_model.safetensors") as file:
        safetensors.torch.save_file({key: p.contiguous().cpu() for key, p in state.items()}, file, {"format": "pt"})
    with_ends(model.generation_config, model.taught_ends).save_pretrained(folder)
    with_end(tokenizer, model.taught_ends).save_pretrained(folder)
    config.save_pretrained(folder)


def trained_shape(settings: Settings, config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """A copy of the model's configuration in which every dropout has the value of the setting `dropout`."""
    config = copy.deepcopy(config)
    if settings.dropout is not None:
        for name in dropouts(config):
            setattr(config, name, settings.dropout)
    return config


def drops(config: transformers.PretrainedConfig) -> bool:
    """Whether a causal language model of this configuration uses dropout. Values for other heads do not count."""
    others = ("classifier", "summary")
    return any(rate > 0 for name, rate in dropouts(config).items() if not name.startswith(others))


def dropouts(config: transformers.PretrainedConfig) -> dict[str, float]:
    """The dropout values in a configuration by name, such as resid_pdrop or attention_dropout."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, (int, float))
    }
