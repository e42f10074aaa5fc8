"""The tokens that training teaches as the end of a response, written to where generation reads its stop tokens."""

import copy

import transformers

from bilevel.data.records import read_rows
from bilevel.data.sources import Reading, find_sources
from bilevel.data.tokenise import make_tokeniser
from bilevel.settings.fields import Settings

RECORDS = 200  # looked at in each file, evenly spread


def taught_ends(settings: Settings, tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end learned turns in the training data, and in validation data that is trained on."""
    tokeniser, found = make_tokeniser(tokenizer, settings), {}
    for data in [settings.train_data] + [settings.val_data] * settings.reads_validation:
        for source in find_sources(data, Reading.of(settings)):
            rows = read_rows(source)
            found |= dict.fromkeys(tokeniser.ends(rows[:: max(1, len(rows) // RECORDS)]))
    return list(found)


def stop_tokens(config: transformers.GenerationConfig) -> list[int]:
    """The tokens at which generation stops."""
    ids = config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def with_ends(config: transformers.GenerationConfig, ends: list[int]) -> transformers.GenerationConfig:
    """The generation configuration with these stop tokens besides its own."""
    own = stop_tokens(config)
    if set(ends) <= set(own):
        return config
    config = copy.deepcopy(config)
    config.eos_token_id = [*own, *(token for token in ends if token not in own)]
    return config


def with_end(tokenizer: transformers.PreTrainedTokenizerBase, ends: list[int]) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer, whose EOS token is the one that ends every response, if there is only one.

    It is left alone if its chat template writes the EOS token, because the template's text would change.
    """
    if len(ends) != 1 or ends[0] == tokenizer.eos_token_id or "eos_token" in str(tokenizer.chat_template):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer
