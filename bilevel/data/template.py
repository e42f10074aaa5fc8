"""Render a chat template, as transformers' apply_chat_template does (a test compares), and test what it supports.

This module imports little, because it is loaded in a separate process (bilevel.data.renderer) with limits of time and
memory.
"""

import datetime
import functools
import json
import re
import secrets
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]
_TAG = secrets.token_hex(8)  # random, so that no text contains it
_OPEN, _CLOSE = f"\ufdd0{_TAG}\ufdd1", f"\ufdd1{_TAG}\ufdd0"
_WORD = "probe"


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %}, with which a template marks what the assistant writes: puts marks around that text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @staticmethod
    def _marked(caller: Any) -> str:
        return _OPEN + caller() + _CLOSE


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    # jinja's own filter escapes characters that are special in HTML
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **how: json.dumps(
        value, ensure_ascii=ensure_ascii, **how
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class Template:
    """A chat template with the values of its own variables (special tokens, template_kwargs).

    control: matches every added token of the tokenizer.
    """

    def __init__(self, source: str, variables: dict[str, Any], control: re.Pattern[str]):
        environment = _environment()
        self._compiled = environment.from_string(source)
        self.variables, self.control = variables, control
        tree = environment.parse(source)
        self._words = {node.attr for node in tree.find_all(nodes.Getattr)}
        self._words |= {node.name for node in tree.find_all(nodes.Name)}
        self._words |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}

    def knows(self, *names: str) -> bool:
        """Whether the template names one of these fields, variables or roles."""
        return not self._words.isdisjoint(names)

    def render(
        self, messages: list[Message], tools: list[Message] | None, variables: dict[str, Any], ask: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the stretches [start, end) of it in {% generation %} blocks; ask: add_generation_prompt."""
        text = self._compiled.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=ask,
            **(self.variables | variables),
        )
        if _TAG not in text:
            return text, []
        clean, stretches, starts = "", [], []
        for part in re.split(f"({_OPEN}|{_CLOSE})", text):
            if part == _OPEN:
                starts.append(len(clean))
            elif part == _CLOSE:
                stretches.append((starts.pop(), len(clean)))
            else:
                clean += part
        return clean, stretches

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system message."""
        user = {"role": "user", "content": _WORD}
        try:
            return "system rule" in self.render([{"role": "system", "content": "system rule"}, user], None, {}, True)[0]
        except Exception:  # a template raises what it likes
            return False

    @functools.cached_property
    def frame(self) -> tuple[str, str | None]:
        """The header before an answer ("" if the generation prompt has it) and the text after the last answer.

        The text after the answer is None if it cannot be determined.
        """
        asked, answered = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": _WORD}]
        try:
            prompt, own = (
                self.render(*which, None, {}, ask)[0] for which, ask in (((asked,), True), ((asked + answered,), False))
            )
            plain = self.render(asked, None, {}, False)[0]
        except Exception:  # a template raises what it likes
            return "", None
        before, found, behind = own.rpartition(_WORD)
        header = before[len(prompt) :] if found and prompt == plain and before.startswith(prompt) else ""
        return header.rstrip(" "), behind if found else None  # a space belongs to the answer's first token
