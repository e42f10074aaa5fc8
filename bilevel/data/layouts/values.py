"""Shared by the readers of all layouts: Row, and checks whose errors name the field and the record."""

import dataclasses
import json
import re
from typing import Any

from bilevel.errors import DataError, short

_SURROGATE = re.compile(r"[\ud800-\udfff]")
MEDIA = (
    "image",
    "images",
    "audio",
    "audios",
    "video",
    "videos",
)  # fields with images, audio and video in other trainers
# Fields that other trainers use and this one does not; a run names them at its start.
UNUSED = ("chosen", "rejected", "rejected_response", "kto_tag", "loss_scale", "parallel_tool_calls")
OF_MESSAGE = ("role", "content")  # names in `fields` that stand for fields of a message
OPTIONAL = ("system", "system_prompt", "context", "input", "history", "tools", "is_noisy")  # may be missing in a record
RESPONSE = "\n\n### Response:\n"  # ends an Alpaca prompt


class NoAnswer(DataError):
    """A conversation in which the assistant says nothing. The filter alternating_turns leaves it out."""


@dataclasses.dataclass
class Row:
    """A record in the form that all formats share: role and text of each turn, and other input of a chat template.

    more has any of: messages (turn number as text -> fields of that message: content, reasoning_content, tool_calls,
    name, ...), tools, template_kwargs, context (numbers of the assistant turns that are not learned).
    unused: fields that other trainers use and that are not used here.
    """

    turns: list[tuple[str, str]]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    unused: list[str] = dataclasses.field(default_factory=list)


def present(record: dict[str, Any], field: str, where: str) -> Any:
    """The value of a field that every record of the layout must have."""
    if field not in record:
        raise DataError(f"{where}: no field {field!r}; it has {field_names(record)}")
    return record[field]


def text(record: dict[str, Any], field: str, where: str) -> str:
    return checked_text(present(record, field, where), field, where)


def optional_text(record: dict[str, Any], field: str, where: str) -> str:
    """The text of a field that may be missing or null."""
    return "" if record.get(field) is None else text(record, field, where)


def checked_text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} must be text, got {typed(value)}")
    if _SURROGATE.search(value):
        raise DataError(f"{where}: {field!r} holds half of a surrogate pair, which is no text")
    return value


def plain_json(value: Any, field: str, where: str) -> Any:
    """The value, after a check that it can be written as UTF-8 JSON."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {field!r} cannot be given to a chat template ({error})") from None
    return value


def json_or_same(value: Any) -> Any:
    """The value of a JSON text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def renamed(record: dict[str, Any], fields: dict[str, str], where: str) -> dict[str, Any]:
    """The record with the names that this tool knows; fields: from these names to the record's own.

    `role` and `content` are fields of each message. Raises DataError for a field that is missing.
    """
    found = {name: value for name, value in record.items() if name not in fields.values()}
    for name, theirs in fields.items():
        if name not in OF_MESSAGE and theirs in record:
            found[name] = record[theirs]
        elif name not in OF_MESSAGE and name not in OPTIONAL:
            raise DataError(f"{where}: no field {theirs!r}, which `fields` names {name}; it has {field_names(record)}")
    if of_message := {fields[name]: name for name in OF_MESSAGE if name in fields}:
        for name, value in found.items():
            if isinstance(value, list):
                found[name] = [
                    {of_message.get(key, key): one for key, one in part.items()} if isinstance(part, dict) else part
                    for part in value
                ]
    return found


def add_suffix(row: Row, suffix: str) -> None:
    """Put the suffix on a line of its own at the end of each prompt, before the heading of the response."""
    if row.turns[0][0] == "text":
        row.unused.append("prompt_suffix (text has no prompt)")
    for number, (role, words) in enumerate(row.turns):
        if role == "user":
            row.turns[number] = (role, f"{words}\n{suffix}")
        elif role == "prompt":
            asked = words.removesuffix(RESPONSE)
            row.turns[number] = (role, f"{asked}\n{suffix}{words[len(asked) :]}")


def no_media(record: dict[str, Any], where: str) -> None:
    """Raises DataError if the record or message has images, audio or video, which a text model cannot learn."""
    if found := [field for field in MEDIA if record.get(field)]:
        raise DataError(
            f"{where}: has {', '.join(found)}; only text can be trained on, so remove the field or the record"
        )


def unused_fields(record: dict[str, Any], names: tuple[str, ...] = UNUSED) -> list[str]:
    return [name for name in names if record.get(name) not in (None, "", [], {})]


def field_names(record: dict[str, Any]) -> str:
    return short(sorted(record), 200)


def typed(value: Any) -> str:
    return f"{type(value).__name__} {short(value)}"
