"""The settings of a run that say what its data are and how records are read."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass


def setting(group: str, help: str, default: Any = ..., **rules) -> Any:
    return Field(default=default, description=help, json_schema_extra={"group": group}, **rules)


# 4096 is the longest path. With a limit, pydantic also refuses text that cannot be encoded in UTF-8.
RULES = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, str_max_length=4096)


# Names of fields in all layouts (bilevel.data.layouts), and of a message's fields.
FIELD_NAMES = ("instruction", "input", "output", "messages", "text", "prompt", "completion", "response", "question")
FIELD_NAMES += ("answer", "problem", "solution", "query", "context", "system", "history", "tools", "is_noisy")
FIELD_NAMES += ("role", "content")

# Filters of records (bilevel.data.filters), and what is said of a record that one leaves out.
FILTERS = {
    "alternating_turns": "its turns do not alternate between user and assistant",
    "no_empty_turns": "one of its turns is empty",
}

TAGS = ("list", "mapping")  # the two forms of a data setting, which messages do not name


def _data(least: int) -> Any:
    """The type of a data setting with at least so many entries: a list, or a mapping from names to lists."""
    listed = Annotated[list[str], Field(min_length=least), Tag("list")]
    named = dict[str, Annotated[list[str], Field(min_length=1)]]
    mapped = Annotated[named, Field(min_length=least), Tag("mapping")]
    return Annotated[listed | mapped, Discriminator(lambda value: TAGS[isinstance(value, dict)])]


@dataclass(config=RULES, kw_only=True)
class DataSettings:
    """The first fields of Settings."""

    train_data: _data(1) = setting(
        "data",
        "training files, glob patterns, folders or hub:org/name:config:split@revision, each with #N for N of its "
        "records; each file or folder is one source, or give the names: {web: [a.jsonl, b.jsonl], math: hub:org/name}",
    )
    val_data: _data(0) = setting(
        "data",
        "validation data, written as train_data: the data you trust (upper level); method=fixed needs none",
        [],
    )
    test_data: _data(0) = setting("data", "held-out data, written as train_data, for evaluation only", [])
    val_in_training: bool = setting(
        "data", "with method=fixed: also train on the validation records, each with weight 1", False
    )
    format: Literal["auto", "alpaca", "chat", "text"] = setting(
        "data", "record format of all files; auto detects it from the first record of each file", "auto"
    )
    fields: dict[Literal[*FIELD_NAMES], str] | None = setting(
        "data",
        "names of your fields, such as {prompt: q, response: a}; the keys are names of docs/your-data.md, role and "
        "content are those of a message",
        None,
        min_length=1,
    )
    prompt_suffix: str | None = setting(
        "data", "text for a line of its own at the end of each prompt, such as Please reason step by step.", None
    )
    skip_bad_records: int = setting(
        "data", "number of records of each source that are left out, and named, if they cannot be read", 0, ge=0
    )
    filters: list[Literal[*FILTERS]] = setting(
        "data",
        "records to leave out before #N draws: alternating_turns leaves out those in which user and assistant do not "
        "take turns (a system turn may come first), no_empty_turns those with an empty turn",
        [],
    )
    max_characters: int | None = setting(
        "data", "leave out records whose turns have more characters together, before #N draws", None, ge=1
    )
    max_length: int = setting(
        "data", "maximum length of a sample, in tokens; longer samples are cut on the right", 512, ge=2
    )
    loss_on: Literal["response", "all"] = setting(
        "data", "tokens that enter the loss: only the responses (with EOS), or all tokens", "response"
    )
    turns: Literal["all", "shared", "last"] = setting(
        "data",
        "assistant turns to learn: all (a turn whose context the chat template later rewrites becomes a sample of its "
        "own), shared (those that fit into one text with the last), or the last of each record",
        "all",
    )
    template_kwargs: dict[str, Any] | None = setting(
        "data", "variables of the chat template, such as {enable_thinking: false}; those of a record win", None
    )
    special_tokens_in_text: bool = setting(
        "data", "in text records, read special tokens such as <|im_start|> as these tokens, not as letters", False
    )
