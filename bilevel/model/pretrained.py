"""Read parts of a pretrained model, from a folder or the hub, with one message for whatever is wrong with them."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from bilevel.errors import UserError, short

HINT = (
    "a folder must hold config.json, the complete weights and the tokenizer; a hub id needs a network connection or a "
    "filled cache"
)
_MOST = 300  # characters of a library's message
_OWN_WORDS = (OSError, ValueError)  # errors whose text says what is wrong without the name of the error


def read_pretrained(kind: Any, name: str, **arguments: Any) -> Any:
    """kind.from_pretrained(name), for an Auto class of transformers. Raises UserError for any fault of the folder."""
    if kind is not transformers.AutoTokenizer and (Path(name) / "adapter_config.json").is_file():
        raise UserError(
            f"model_name_or_path {name!r}: it holds an adapter (adapter_config.json), not a whole model; merge the "
            "adapter into its base model (peft: merge_and_unload), and give the folder of the merged model"
        )
    with read_by_a_library(name):
        return kind.from_pretrained(name, trust_remote_code=False, **arguments)


def base_of(name: str) -> str | None:
    """The base model of a folder with an adapter, as its adapter_config.json names it; None for other models.

    Raises UserError if it names none.
    """
    file = Path(name) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not what peft writes: {short(str(error))}") from None
    if not base:
        raise UserError(f"{file} names no base model (base_model_name_or_path): write its hub id or folder into it")
    return base


@contextlib.contextmanager
def read_by_a_library(name: str) -> Iterator[None]:
    """Whatever a library raises in this context at the files of a model becomes a UserError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise errors of any kind on a broken file
        raise UserError(f"model_name_or_path {name!r}: {said(error)} ({HINT})") from error


def said(error: Exception) -> str:
    """What a library's error says, in one line; the name of the error stands before a text that needs it."""
    refused = isinstance(error, StrictDataclassError)  # a value that a configuration refuses; its cause says which
    error = error.__cause__ if refused and isinstance(error.__cause__, Exception) else error
    text = " ".join(str(error).split("\n\n")[0].split())
    text = text if len(text) <= _MOST else text[: _MOST - 3] + "..."
    if text and (refused or isinstance(error, _OWN_WORDS)):
        return text
    return f"{type(error).__name__}: {text}" if text else short(error)


def read_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model, or of an adapter's folder.

    Raises UserError if it has no vocabulary, or tokens without an embedding in the model.
    Added tokens may lie beyond the model's embeddings; bilevel.model.loading gives them new ones.
    """
    tokenizer = read_pretrained(transformers.AutoTokenizer, name)
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    own = [number for token, number in tokenizer.get_vocab().items() if token not in added]
    if not own:
        raise UserError(
            f"model_name_or_path {name!r}: there is no tokenizer, or one without a vocabulary; put the files of the "
            "model's own tokenizer there (tokenizer.json and tokenizer_config.json)"
        )
    rows = getattr(
        read_pretrained(transformers.AutoConfig, base_of(name) or name).get_text_config(), "vocab_size", None
    )
    if rows is not None and max(own) >= rows:
        raise UserError(
            f"model_name_or_path {name!r}: the tokenizer has tokens up to number {max(own)}, but the model has "
            f"embeddings for only {rows} (vocab_size in config.json), so the tokenizer is that of another model; put "
            "the model's own there"
        )
    with read_by_a_library(name):
        tokens = tokenizer("a", add_special_tokens=False)["input_ids"]  # some damages show at the first text
    if not tokens:
        raise UserError(
            f"model_name_or_path {name!r}: the tokenizer makes no token of the letter a, so it is damaged; put the "
            "files of the model's own tokenizer there (tokenizer.json and tokenizer_config.json)"
        )
    return tokenizer
