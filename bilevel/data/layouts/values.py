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


def text(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise DataError(f"{where}: no field {field!r}; it has {field_names(record)}")
    return checked_text(record[field], field, where)


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
