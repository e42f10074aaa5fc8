"""The Alpaca layout: instruction, input, output; system and history as LLaMA-Factory has them."""

from typing import Any

from bilevel.data.layouts.values import (
    RESPONSE,
    UNUSED,
    Row,
    checked_text,
    json_or_same,
    no_media,
    optional_text,
    text,
    typed,
    unused_fields,
)
from bilevel.errors import DataError


def alpaca(record: dict[str, Any], where: str) -> Row:
    """Prompts with headings (### Instruction: ...), each with its response: `history` first, then the record's own.

    The text of `system` comes before the first heading.
    """
    no_media(record, where)
    extra = optional_text(record, "input", where)
    asked = [(question, "", answer) for question, answer in history(record, where)]
    asked.append((text(record, "instruction", where), extra, text(record, "output", where)))
    turns = []
    for question, extra, answer in asked:
        turns += [("prompt", _prompt(question, extra)), ("response", answer)]
    if system := optional_text(record, "system", where):
        turns[0] = ("prompt", f"{system}\n\n{turns[0][1]}")
    return Row(turns, unused=unused_fields(record, (*UNUSED, "tools")))


def dolly(record: dict[str, Any], where: str) -> Row:
    """The same with Dolly's names: context for input, response for output."""
    names = {"context": "input", "response": "output"}
    for theirs, ours in names.items():
        if ours in record and record.get(theirs) is not None and record[ours]:
            raise DataError(f"{where}: has fields {theirs!r} and {ours!r}; keep one of the two")
    return alpaca({names.get(name, name): value for name, value in record.items() if name not in names.values()}, where)


def _prompt(instruction: str, extra: str) -> str:
    parts = [("Instruction", instruction)] + ([("Input", extra)] if extra else [])
    return "\n\n".join(f"### {title}:\n{content}" for title, content in parts) + RESPONSE


def history(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Earlier turns from the field `history`: what was asked, and the response."""
    pairs = json_or_same(record.get("history") or [])
    if not isinstance(pairs, list):
        raise DataError(f"{where}: 'history' must be a list of [instruction, response] pairs, got {typed(pairs)}")
    turns = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{where}: 'history' {number} must be a pair [instruction, response], got {typed(pair)}")
        question, answer = (checked_text(part, f"history {number}", where) for part in pair)
        turns.append((question, answer))
    return turns
