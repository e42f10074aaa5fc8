"""Which layout a record has, by the names of its fields, and what reads it."""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

from bilevel.data.layouts.alpaca import alpaca, dolly
from bilevel.data.layouts.conversation import CHAT_KEYS, conversation
from bilevel.data.layouts.pairs import PAIRS, prompt_completion, question_answer
from bilevel.data.layouts.plain_text import plain_text
from bilevel.data.layouts.values import Row, field_names
from bilevel.errors import DataError, plain

Read = Callable[[dict[str, Any], str], Row]  # from a record, and what messages call it
REMEDY = "say which fields hold prompt and response with --fields '{prompt: NAME, response: NAME}'"
LONGEST_NAME = 40  # characters of a name that may be misspelt

# Fields of other trainers' records that are not read, and the way out.
WAYS_OUT = {
    "chosen": "of a preference pair, the response is chosen",
    "segments": "of segments, write the last learned text as completion and the text before it as prompt",
    "input_ids": "tokens cannot be read; give the records with their text",
    "completions": "of a list of completions or steps, write a record with prompt and completion for each",
    "conversation": "of a conversation in pairs, write the texts as messages with role and content",
    "paired_conversations": "of several conversations in a record, write each as a record",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the records of a file are read; `words` say it to the user, `names` are its fields.

    pair: whether it is one of several pairs of fields, which must be the only one that fits.
    """

    words: str
    names: tuple[str, ...]
    read: Read
    pair: bool = False


LAYOUTS = {
    "alpaca": Layout("alpaca (instruction, input, output)", ("instruction", "input", "output"), alpaca),
    "chat": Layout("chat (messages)", CHAT_KEYS, conversation),
    "text": Layout("text", ("text",), plain_text),
}


def detect(record: dict[str, Any], where: str, fields: dict[str, str]) -> Layout:
    """The layout of a record, whose fields have been renamed by `fields`. Raises DataError if none or several fit.

    The layout with most of the names that the user has given wins.
    """
    found = _fitting(record)
    named = [len(fields.keys() & set(layout.names)) for layout in found]
    found = [layout for layout, count in zip(found, named, strict=True) if count == max(named)]
    if found and (len(found) == 1 or not found[0].pair):
        return found[0]
    if found:
        several = " or ".join(layout.words for layout in found)
        raise DataError(f"{where}: its fields {field_names(record)} could be read as {several}; {REMEDY}")
    hint = "".join(f"; {way}" for field, way in WAYS_OUT.items() if field in record)
    raise DataError(
        f"{where}: format not recognised from its fields {field_names(record)}; expected instruction and output "
        f"(alpaca), one of {', '.join(CHAT_KEYS)} (chat), text, or a pair of fields such as prompt and completion, "
        f"question and answer{_misspelt(record)}; {REMEDY}{hint}"
    )


def _misspelt(record: dict[str, Any]) -> str:
    """The fields that names of the record come close to, such as prompt for promt, in words."""
    near = {name: found for name in record if (found := _nearest(name))}
    return "".join(f"; is {plain(name)} meant to be {found}?" for name, found in near.items())


@functools.lru_cache(1024)  # the records of a file have the same names
def _nearest(name: str) -> str | None:
    """The name of a field that this is nearly, or None."""
    known = {known for layout in LAYOUTS.values() for known in layout.names}.union(*PAIRS)
    if name in known or len(name) > LONGEST_NAME:
        return None
    return next(iter(difflib.get_close_matches(name, sorted(known), 1, cutoff=0.8)), None)


def _fitting(record: dict[str, Any]) -> list[Layout]:
    """The layouts whose fields the record has, first those that win over pairs of fields."""
    # In a table, a field that a record does not have is null.
    for has in ({name for name, value in record.items() if value is not None}, set(record)):
        found = [LAYOUTS["alpaca"]] if {"instruction", "output"} <= has else []
        found += [LAYOUTS["chat"]] if has & set(CHAT_KEYS) else []
        found += [LAYOUTS["text"]] if "text" in has else []
        found += [_pair(*pair) for pair in PAIRS if set(pair) <= has]
        if found:
            return found
    return []


def _pair(asked: str, answer: str) -> Layout:
    names = (asked, answer, "context", "system", "system_prompt")
    if (asked, answer) == ("prompt", "completion"):
        return Layout("prompt and completion, one after the other as they are", names, prompt_completion, pair=True)
    if (asked, answer) == ("instruction", "response"):
        return Layout("alpaca (instruction, context, response)", names, dolly, pair=True)
    words = f"{asked} (user turn) and {answer} (assistant turn)"
    return Layout(words, names, question_answer(asked, answer), pair=True)
