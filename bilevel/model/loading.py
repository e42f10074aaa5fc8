"""The tokenizer and the model: from a hub id or a folder, or built from numbers. Nobody else may care which."""

import copy
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers

from bilevel.data.cache import say_unusable
from bilevel.data.records import read_rows
from bilevel.errors import UserError, short
from bilevel.files import cache_folder, whole_file
from bilevel.settings.fields import Settings

if TYPE_CHECKING:  # read_rows imports it: a model that cannot be is told before
    import datasets

EOS = "<|endoftext|>"
TOKENIZER_VERSION = 1  # part of the cache key; raise it when the tokenizer changes for the same rows
_LONG_WORD = re.compile(r"\s{1000}|\S{1000}")


def load_tokenizer(settings: Settings, train_files: list[Path]) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer; for a new model a byte-level BPE of model_config.vocab_size trained on train_files."""
    if settings.model_name_or_path is not None:
        return _pretrained(transformers.AutoTokenizer, settings.model_name_or_path)
    rows = [read_rows(file, settings.format) for file in train_files]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe(rows, settings.model_config["vocab_size"]),
        eos_token=EOS,
        bos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def _byte_bpe(rows: "list[datasets.Dataset]", vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on the texts of all rows, cached where they are."""
    parts = [table._fingerprint for table in rows] + [vocab_size, TOKENIZER_VERSION, tokenizers.__version__]
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    file = cache_folder() / "tokenizers" / f"{key}.json"
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception:  # there is none yet, or not a whole one; tokenizers knows no narrower error
        pass
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(_texts(rows), vocab_size=vocab_size, special_tokens=[EOS], show_progress=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as new:
            new.write_text(bpe._tokenizer.to_str(pretty=True), encoding="utf-8")
    except OSError as error:
        say_unusable(error)
    return bpe._tokenizer


def model_shape(settings: Settings) -> transformers.PretrainedConfig:
    """The model's own configuration; no weights are read."""
    if settings.model_name_or_path is not None:
        config = _pretrained(transformers.AutoConfig, settings.model_name_or_path)
    else:
        numbers = dict(settings.model_config)
        kind = numbers.pop("model_type")
        if str(kind) not in transformers.CONFIG_MAPPING:
            near = difflib.get_close_matches(str(kind), list(transformers.CONFIG_MAPPING), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "gpt2 and llama are two that are"
            raise UserError(f"model_config: {short(kind)} is no model_type that transformers knows; {hint}")
        try:
            config = transformers.AutoConfig.for_model(kind, **numbers)
        except (ValueError, TypeError) as error:
            raise UserError(f"model_config: {error}") from None
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.max_length > longest:
        raise UserError(f"max_length {settings.max_length}: the model has {longest} positions; use at most that many")
    return config


def load_model(
    settings: Settings,
    config: transformers.PretrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    read_weights: bool = True,
) -> torch.nn.Module:
    """The model in training mode, with an embedding for each of the tokenizer's tokens.

    A pretrained one has `dtype`, and any weights when read_weights is off; a new one is fp32 and drawn from the seed.
    config: the model's own, which stays as it is.
    """
    from bilevel.model.adapters import add_adapters
    from bilevel.model.cpu_kernels import speed_up  # here and there, what a shape that cannot be need not wait for

    own_dropouts, config = dropouts(config), trained_shape(settings, config)
    if settings.model_name_or_path is not None and not read_weights:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=settings.attn_implementation
        )
    elif settings.model_name_or_path is not None:
        model = _pretrained(
            transformers.AutoModelForCausalLM,
            settings.model_name_or_path,
            config=config,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
        )
    else:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        torch.manual_seed(settings.seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=settings.attn_implementation)
    if settings.lisa_layers is not None and (frozen := [n for n, p in model.named_parameters() if not p.requires_grad]):
        raise UserError(
            f"lisa_layers: {len(frozen)} parameters of the model come frozen ({frozen[0]}, ...), and LISA would train "
            "them; merge adapters into the model first, or train without LISA"
        )
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if settings.gradient_checkpointing:
        # Without the check: where it looks, ZeRO-3 has partitioned again the parameters that were whole before.
        model.activation_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})
    if settings.lora_rank is not None:
        add_adapters(model, settings.lora_rank, settings.lora_alpha, settings.seed)
    model.own_dropouts = own_dropouts
    return speed_up(model).train()


def save_model(
    model: "transformers.PreTrainedModel",  # a name that takes seconds to import
    folder: Path,
    tokenizer: transformers.PreTrainedTokenizerBase,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a loaded model, with the dropouts that it came with, and its tokenizer. weights: if not those it holds."""
    trained, model.config = model.config, copy.deepcopy(model.config)
    for name, rate in model.own_dropouts.items():
        setattr(model.config, name, rate)
    model.save_pretrained(folder, state_dict=weights)
    model.config = trained
    tokenizer.save_pretrained(folder)


def trained_shape(settings: Settings, config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """A copy of the model's own configuration, with `dropout` for every dropout in it."""
    config = copy.deepcopy(config)
    if settings.dropout is not None:
        for name in dropouts(config):
            setattr(config, name, settings.dropout)
    return config


def drops(config: transformers.PretrainedConfig) -> bool:
    """Whether a causal language model of this configuration drops anything while it trains; it has no other head."""
    others = ("classifier", "summary")
    return any(rate > 0 for name, rate in dropouts(config).items() if not name.startswith(others))


def dropouts(config: transformers.PretrainedConfig) -> dict[str, float]:
    """Every number in the configuration whose name says dropout, such as resid_pdrop or attention_dropout."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, (int, float))
    }


def _pretrained(kind: Any, name: str, **arguments: Any) -> Any:
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **arguments)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"model_name_or_path {name!r}: {first} (a folder needs config.json, the weights and the tokenizer; "
            "a hub id needs a network or a filled cache)"
        ) from None


def _texts(rows: "list[datasets.Dataset]") -> Iterator[str]:
    """What a new tokenizer is trained on. Words are cut at 1,000: training grows with the square of a word."""
    for table in rows:
        for batch in table.select_columns("contents").iter(1000):
            for text in itertools.chain.from_iterable(batch["contents"]):
                yield from re.findall(r"\s{0,1000}\S{0,1000}", text) if _LONG_WORD.search(text) else [text]
