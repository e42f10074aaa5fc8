"""Errors that a user can cause or see, and how values are shown in their messages."""

import reprlib
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Something the user supplied cannot be right; the message says what and what to do (exit code 2).

    The message can be printed and logged anywhere: text without UTF-8, such as half a surrogate pair, is escaped.
    """

    def __init__(self, message: str):
        super().__init__(message.encode("utf-8", "backslashreplace").decode())


class ConfigError(UserError):
    """All problems of a configuration at once."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"the configuration has {count}:\n" + "\n".join(f"  - {p}" for p in first(problems, 20)))


def first(found: list[Any], most: int, say: Callable[[Any], str] = str) -> list[str]:
    """Lines for the first `most` of many problems, and a line with the number of the others."""
    more = len(found) - most
    return [say(one) for one in found[:most]] + ([f"and {more} more"] if more > 0 else [])


def short(value: Any, most: int = 60) -> str:
    """A value of any size and depth in at most `most` characters, for a message."""
    outline = reprlib.Repr()
    outline.maxlevel, outline.maxlist, outline.maxstring = 3, 12, most
    text = outline.repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def plain(text: str, most: int = 60) -> str:
    """A name as it is typed if it is printable and short enough; otherwise as `short` shows it."""
    return text if text.isprintable() and len(text) <= most else short(text, most)


class DataError(UserError):
    """A data file that cannot be used; the message names the file and the record."""


class TrainingStopped(Exception):
    """Training must not go on; the message says why and what to do."""
