"""Two fields, one with what is asked and one with the answer, under the names that datasets use."""

from collections.abc import Callable
from typing import Any

from bilevel.data.layouts.alpaca import history
from bilevel.data.layouts.conversation import conversation
from bilevel.data.layouts.values import Row, no_media, optional_text, present, text, typed, unused_fields
from bilevel.errors import DataError

PAIRS = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("problem", "solution"),
    ("query", "response"),
    ("instruction", "response"),
    ("input", "output"),
]
SYSTEM = ("system", "system_prompt")
CONTEXT = ("context",)
# Fields of such records that hold more text than what is read.
MORE = ("answer", "solution", "reasoning", "rationale", "explanation", "choices", "options", "tools")


def question_answer(asked: str, answer: str) -> Callable[[dict[str, Any], str], Row]:
    """A reader of a user turn from the field `asked` and an assistant turn from `answer`.

    The text of `system` or `system_prompt` becomes a system turn; that of `context` stands before the question. The
    pairs of `history` are turns before it.
    """

    def read(record: dict[str, Any], where: str) -> Row:
        no_media(record, where)
        systems = [words for field in SYSTEM if (words := optional_text(record, field, where))]
        contexts = [words for field in CONTEXT if (words := optional_text(record, field, where))]
        question = "\n\n".join([*contexts, text(record, asked, where)])
        turns = [("system", words) for words in systems[:1]]
        for earlier, said in history(record, where):
            turns += [("user", earlier), ("assistant", said)]
        turns += [("user", question), ("assistant", text(record, answer, where))]
        unused = [field for field in MORE if field != answer and record.get(field)]
        return Row(turns, unused=unused_fields(record) + unused + list(SYSTEM[1:] if len(systems) > 1 else ()))

    return read


def prompt_completion(record: dict[str, Any], where: str) -> Row:
    """The prompt and its completion as they are, or the conversation that the two hold if they are lists of messages.

    Of such a conversation, only what the completion holds is learned.
    """
    prompt, completion = (present(record, name, where) for name in ("prompt", "completion"))
    if isinstance(prompt, list) or isinstance(completion, list):
        said = [*_messages(prompt, "prompt", where), *_messages(completion, "completion", where)]
        rest = {name: value for name, value in record.items() if name not in ("prompt", "completion")}
        return conversation(rest | {"messages": said}, where)
    no_media(record, where)
    turns = [("prompt", text(record, "prompt", where)), ("response", text(record, "completion", where))]
    if system := optional_text(record, "system", where):
        turns[0] = ("prompt", f"{system}\n\n{turns[0][1]}")
    return Row(turns, unused=unused_fields(record))


def _messages(value: Any, field: str, where: str) -> list[Any]:
    """The messages of one of the two fields; those of a prompt are not learned."""
    if isinstance(value, str):
        value = [{"role": "user" if field == "prompt" else "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {field!r} must be text or a list of messages, got {typed(value)}")
    if field == "completion":
        return value
    return [message | {"weight": 0} if isinstance(message, dict) and _speaks(message) else message for message in value]


def _speaks(message: dict[str, Any]) -> bool:
    return (message.get("role") or message.get("from")) in ("assistant", "gpt", "function_call", "tool_call")
