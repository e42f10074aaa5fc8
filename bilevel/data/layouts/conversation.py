"""Conversations: OpenAI's messages (role, content) and ShareGPT's (from, value), with tools, thinking and weights."""

from typing import Any

from bilevel.data.layouts.turn import spoken
from bilevel.data.layouts.values import (
    NoAnswer,
    Row,
    checked_text,
    json_or_same,
    no_media,
    optional_text,
    plain_json,
    text,
    typed,
    unused_fields,
)
from bilevel.errors import DataError, short

CHAT_KEYS = ("messages", "conversations", "items")
ROLES = {
    **{"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"},
    **{"developer": "developer", "function_call": "assistant", "tool_call": "assistant"},
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}
CALLS = ("function_call", "tool_call")  # ShareGPT's roles of a turn whose value is the call itself
REASONING = ("reasoning_content", "reasoning", "thinking")
# Whether a turn is learned: OpenAI's weight, axolotl's train and training, ms-swift's loss.
LEARNED = ("weight", "train", "training", "loss")
UNUSED_IN_MESSAGE = ("train_detail", "loss_scale", "refusal")


def conversation(record: dict[str, Any], where: str) -> Row:
    """The turns of a conversation. A `system` field of the record becomes the first turn."""
    has = [key for key in CHAT_KEYS if key in record]
    key = next((key for key in has if record[key] is not None), has[0] if has else None)  # null in a table: not there
    if key is None:
        raise DataError(f"{where}: no {' or '.join(CHAT_KEYS)} field")
    messages = json_or_same(record[key])  # text in a table
    if not isinstance(messages, list) or not messages:
        kind = NoAnswer if messages == [] else DataError
        raise kind(f"{where}: {key} must be a list of messages, got {typed(messages)}")
    no_media(record, where)
    row = Row([], unused=unused_fields(record))
    if system := optional_text(record, "system", where):
        row.turns.append(("system", system))
    for number, message in enumerate(messages):
        _add(row, message, f"{where}, message {number}")
    if [role for role, _ in row.turns[:2]] == ["system", "system"] and system:
        if row.turns[0] != row.turns[1]:
            raise DataError(f"{where}: has a field 'system' and a system message with other words; keep one of the two")
        row.turns.pop(0)
        row.more = _moved(row.more, -1)
    if all(role != "assistant" for role, _ in row.turns):
        raise NoAnswer(f"{where}: no message from the assistant, nothing to learn")
    if tools := _tools(record, where):
        row.more["tools"] = tools
    if variables := _template_kwargs(record, where):
        row.more["template_kwargs"] = variables
    return row


def _add(row: Row, message: Any, place: str) -> None:
    """Append a message's turn to the row, with other fields that a chat template may need."""
    if not isinstance(message, dict):
        raise DataError(f"{place}: expected an object, got {typed(message)}")
    # In a table, a message also has the fields of the others, as null.
    theirs = "role" not in message or (message["role"] is None and "from" in message)
    speaker, field = ("from", "value") if theirs else ("role", "content")
    name = text(message, speaker, place)
    name = name if name in ROLES else name.lower()  # NeMo's User and Assistant
    if name not in ROLES:
        raise DataError(f"{place}: unknown {speaker} {short(message[speaker])}; known are {', '.join(ROLES)}")
    no_media(message, place)
    role, number = ROLES[name], len(row.turns)
    row.unused += unused_fields(message, UNUSED_IN_MESSAGE)
    extra: dict[str, Any] = {}
    if role == "assistant":
        content = _assistant(row, message, name, field, place, extra)
        if not _learned(message, place):
            row.more.setdefault("context", []).append(number)
    else:
        content = _content(message, field, place)
        row.unused += [one for one in LEARNED if message.get(one) in (True, 1)]  # a turn of the user is never learned
    if role == "tool" and name != "tool":
        extra["role"] = name
    for one in ("name", "tool_call_id"):
        if message.get(one) is not None:
            extra[one] = plain_json(message[one], one, place)
    row.turns.append((role, content))
    if extra:
        row.more.setdefault("messages", {})[str(number)] = extra


def _assistant(row: Row, message: dict[str, Any], name: str, field: str, place: str, extra: dict[str, Any]) -> str:
    """The text of an assistant turn with its reasoning and calls; `extra` receives them as separate fields."""
    reasoning = next((optional_text(message, one, place) for one in REASONING if message.get(one)), None)
    calls = _calls(message, place)
    missing = message.get(field) is None and (calls or reasoning)
    content = "" if missing else _content(message, field, place)
    whole = spoken(content, reasoning, calls)
    if name in CALLS:
        value = json_or_same(content)
        found = value if isinstance(value, list) else [value]
        if all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in found) and found:
            calls, content = [_call(call, place) for call in found], ""
        else:
            row.unused.append(f"{name} (no JSON of a call, so it is read as text)")
    if reasoning:
        extra["reasoning_content"] = reasoning
    if calls:
        extra["tool_calls"] = calls
    if extra:
        extra["content"] = content
    return whole


def _content(message: dict[str, Any], field: str, place: str) -> str:
    """A message's text; a list of text parts is joined."""
    parts = message.get(field)
    if not isinstance(parts, list):
        return text(message, field, place)
    found = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, str):
            found.append(checked_text(part, field, place))
        elif kind == "text" and isinstance(part, dict):
            found.append(text(part, "text", place))
        else:
            raise DataError(f"{place}: {field!r} holds a part of type {short(kind)}; only text can be trained on")
    return "".join(found)


def _calls(message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """The message's tool calls; OpenAI's older `function_call` is one of them."""
    calls = message.get("tool_calls") or []
    if old := message.get("function_call"):
        calls = [{"function": old}]
    if not isinstance(calls, list):
        raise DataError(f"{place}: 'tool_calls' must be a list, got {typed(calls)}")
    return [_call(call, place) for call in calls]


def _call(call: Any, place: str) -> dict[str, Any]:
    """A call as chat templates take it: {type, function: {name, arguments}, id}, with arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: a tool call needs a function with a name, got {typed(call)}")
    arguments = json_or_same(function.get("arguments", {}))
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    one = {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return plain_json(one, "tool_calls", place)


def _learned(message: dict[str, Any], place: str) -> bool:
    for field in LEARNED:
        value = message.get(field)
        if value is not None and value not in (0, 1):
            raise DataError(
                f"{place}: {field!r} must be 0 or 1, false or true, got {typed(value)}; a turn is learned or it is not"
            )
        if value is not None and not value:
            return False
    return True


def _tools(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The record's tools as chat templates take them: {type: function, function: {name, ...}}."""
    field = next((field for field in ("tools", "functions") if record.get(field)), None)
    if field is None:
        return []
    tools = json_or_same(record[field])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: {field!r} must be a list of objects, or its JSON, got {typed(record[field])}")
    return plain_json([t if "function" in t else {"type": "function", "function": t} for t in tools], field, where)


def _template_kwargs(record: dict[str, Any], where: str) -> dict[str, Any]:
    field = next((field for field in ("template_kwargs", "chat_template_kwargs") if record.get(field)), None)
    if field is None:
        return {}
    if not isinstance(record[field], dict):
        raise DataError(f"{where}: {field!r} must be an object, got {typed(record[field])}")
    return plain_json(record[field], field, where)


def _moved(more: dict[str, Any], by: int) -> dict[str, Any]:
    """The same `more` when the numbers of the turns have changed by `by`."""
    moved = dict(more)
    if "context" in more:
        moved["context"] = [number + by for number in more["context"]]
    if "messages" in more:
        moved["messages"] = {str(int(number) + by): extra for number, extra in more["messages"].items()}
    return moved
