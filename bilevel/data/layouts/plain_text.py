"""The layout of plain text: one field, `text`."""

from typing import Any

from bilevel.data.layouts.values import Row, text


def plain_text(record: dict[str, Any], where: str) -> Row:
    return Row([("text", text(record, "text", where))])
