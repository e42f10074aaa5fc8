"""A new model from the numbers in model_config: its configuration, its tokenizer, its random weights."""

import dataclasses
import difflib
import hashlib
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers

from bilevel.data.cache import say_unusable
from bilevel.errors import UserError, short
from bilevel.files import cache_folder, whole_file
from bilevel.model.pretrained import said

if TYPE_CHECKING:  # importing datasets takes a second, and model_config is checked before it is needed
    import datasets

EOS = "<|endoftext|>"
TOKENIZER_VERSION = 1  # part of the cache key; raise it when the same rows give another tokenizer
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SIZES += ("intermediate_size", "max_position_embeddings")
_LONG_WORD = re.compile(r"\s{1000}|\S{1000}")


def new_shape(model_config: dict[str, Any]) -> transformers.PretrainedConfig:
    """The configuration that these numbers describe. Raises UserError."""
    numbers = dict(model_config)
    kind = numbers.pop("model_type")
    if str(kind) not in transformers.CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(transformers.CONFIG_MAPPING), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "two that it knows are gpt2 and llama"
        raise UserError(f"model_config: transformers does not know the model_type {short(kind)}; {hint}")
    try:
        config = transformers.AutoConfig.for_model(kind, **numbers)
    except Exception as error:  # its checks of values raise errors of kinds of their own
        raise UserError(f"model_config: {said(error)}") from None
    if problems := [*_unknown(config, numbers), *_impossible(config)]:
        raise UserError(f"model_config: {'; '.join(problems)}")
    return config


def _unknown(config: transformers.PretrainedConfig, numbers: dict[str, Any]) -> list[str]:
    """A problem for each key that neither the configuration nor the code of its model knows."""
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    ignored = vars(config).keys() | transformers.GenerationConfig().to_dict().keys()  # other keys have been converted
    problems = []
    for name in numbers:
        if name not in known and name in ignored and not re.search(rf"\b{re.escape(name)}\b", _code(config)):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"model_type {config.model_type} has no {short(name)}{hint}")
    return problems


def _code(config: transformers.PretrainedConfig) -> str:
    """The source of the model's module: some read a number that is no field of their configuration."""
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return inspect.getsource(inspect.getmodule(mapping[type(config)])) if type(config) in mapping else ""


def _impossible(config: transformers.PretrainedConfig) -> list[str]:
    """A problem for each size below 1, and for numbers of heads that do not divide what they share."""
    names = {name: config.attribute_map.get(name, name) for name in _SIZES}
    sizes = {name: value for name in _SIZES if type(value := getattr(config, name, None)) is int}
    problems = [f"{names[name]} {value} must be at least 1" for name, value in sizes.items() if value < 1]
    pairs = [("num_key_value_heads", "num_attention_heads")]
    if not getattr(config, "head_dim", None):  # else the width of a head is independent of the model's
        pairs.append(("num_attention_heads", "hidden_size"))
    return problems or [
        f"{names[part]} {sizes[part]} does not divide {names[whole]} {sizes[whole]}; give a number that does"
        for part, whole in pairs
        if part in sizes and whole in sizes and sizes[whole] % sizes[part]
    ]


def new_tokenizer(rows: "list[datasets.Dataset]", vocab_size: int) -> transformers.PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on the texts of all rows, or read from the cache."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe(rows, vocab_size),
        eos_token=EOS,
        bos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def new_model(
    config: transformers.PretrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    attn_implementation: str | None,
    seed: int,
) -> torch.nn.Module:
    """A model in fp32 with random weights drawn from the seed. The tokenizer's BOS and EOS are written into config."""
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)


def _byte_bpe(rows: "list[datasets.Dataset]", vocab_size: int) -> tokenizers.Tokenizer:
    """The trained BPE. Its cache key consists of the rows, the vocabulary size and the versions."""
    parts = [table._fingerprint for table in rows] + [vocab_size, TOKENIZER_VERSION, tokenizers.__version__]
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    file = cache_folder() / "tokenizers" / f"{key}.json"
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception:  # the file is missing or incomplete; tokenizers raises no narrower error
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


def _texts(rows: "list[datasets.Dataset]") -> Iterator[str]:
    """Texts for the tokenizer, with words cut to 1,000 characters: BPE training is quadratic in a word's length."""
    for table in rows:
        for batch in table.select_columns("contents").iter(1000):
            for text in itertools.chain.from_iterable(batch["contents"]):
                yield from re.findall(r"\s{0,1000}\S{0,1000}", text) if _LONG_WORD.search(text) else [text]
