"""Turn a conversation into the sequences in which its assistant turns are learned.

A learned turn follows the same text as at generation: the template's text of the messages so far with a generation
prompt, then the response so far. If a template rewrites earlier turns (Qwen3 drops their thinking), one sequence cannot
have this for every turn, so such a turn gets a sequence of its own.

This module runs in the process of bilevel.data.renderer and imports little. bilevel.data.template renders.
"""

import json
import re
from typing import Any

from bilevel.data.layouts.turn import spoken
from bilevel.data.sequence import Sequence, Turn
from bilevel.data.template import Message, Template

REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which templates read it
_PROMPTED_THOUGHT = re.compile(r"<think>\s*(</think>)?\s*\Z")  # at a prompt's end: opened, or closed and empty
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_REST_OF_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)


class Chat:
    """One record and the chat template that renders it."""

    def __init__(self, template: Template, roles: list[str], contents: list[str], more: dict[str, Any]):
        self.template, self.tools, self.variables = template, more.get("tools"), more.get("template_kwargs", {})
        self.notes: list[str] = []
        extras = more.get("messages", {})
        self.messages = [
            self._message(role, content, extras.get(str(number), {}))
            for number, (role, content) in enumerate(zip(roles, contents, strict=True))
        ]
        left_out = set(more.get("context", []))
        self.learned = [i for i, role in enumerate(roles) if role == "assistant" and i not in left_out]
        if self.tools and not template.knows("tools"):
            self.notes.append("tools: the chat template does not write them")
        if self.messages[0]["role"] == "system" and not template.takes_system:
            self._system_to_user()

    def sequences(self, turns: str) -> list[Sequence]:
        """The sequences of the learned turns; the one with the last turn is last. turns: see Settings.turns."""
        learned = self.learned[-1:] if turns == "last" else self.learned
        found: list[Sequence] = []
        for i in reversed(learned):
            sequence = self._turn(i)
            turn, main = sequence.turns[0], found[0] if found else None
            if main and turn.end <= main.turns[-1].prompt and main.text.startswith(sequence.text[: turn.end]):
                main.turns.insert(0, self._continued(turn, main.text))
            elif main and turns == "shared":
                self.notes.append("turns=shared: earlier turns that the chat template rewrites are context only")
            else:
                found.append(sequence)
        return found[::-1]

    def whole(self) -> Sequence:
        """The template's text of all messages, learned from the first token to the last."""
        text = self._text(len(self.messages), ask=False)[0]
        answer, end = self._closing(text)
        return Sequence(text, [Turn(0, [(0, end)], answer, end)])

    def _message(self, role: str, content: str, extra: dict[str, Any]) -> Message:
        """The message for the template. Fields that the template does not know are written into the content."""
        extra = dict(extra)
        name = extra.pop("role", role)
        if name != role and not self.template.knows(name):
            name = role
        if name == "developer" and not self.template.knows(name):
            name = "system"
        message = {"role": name, "content": content}
        if "content" in extra:
            content, thought, calls = (extra.pop(key, None) for key in ("content", "reasoning_content", "tool_calls"))
            if thought:  # under each name that templates read
                message |= {"reasoning_content": thought, "thinking": thought}
                if not self.template.knows(*REASONING):
                    self.notes.append(
                        "reasoning_content: the chat template has no form for it; it is learned in <think>"
                    )
            if calls and self.template.knows("tool_calls"):
                message["tool_calls"], calls = calls, None
            elif calls:
                self.notes.append("tool_calls: the chat template has no form for them; they are written as <tool_call>")
            message["content"] = spoken(content, None, calls)
        return message | extra

    def _system_to_user(self) -> None:
        """Put the text of a system message that the template refuses or leaves out before the first user turn."""
        user = next((i for i, message in enumerate(self.messages) if message["role"] == "user"), None)
        if user is None:
            return
        system, first = self.messages[0], self.messages[user]
        self.messages[user] = first | {"content": f"{system['content']}\n\n{first['content']}"}
        self.messages.pop(0)
        self.learned = [i - 1 for i in self.learned]
        self.notes.append("the chat template has no system turn, so the system text stands before the first user turn")

    def _text(self, count: int, ask: bool) -> tuple[str, list[tuple[int, int]]]:
        """The template's text of the first messages."""
        return self.template.render(self.messages[:count], self.tools, self.variables, ask)

    def _turn(self, i: int) -> Sequence:
        """Turn i in its own context: the generation prompt and the response with the token that ends it."""
        own, stretches = self._text(i + 1, ask=False)
        prompt = self._text(i, ask=True)[0] if i else self._before_first(own)
        body = self._response(prompt, own, self.messages[i])
        if (header := self.template.frame[0]) and body.startswith(header):
            prompt, body = prompt + header, body[len(header) :]
        text = prompt + self._with_thought(prompt, body, self.messages[i])
        answer, end = (max(place, len(prompt)) for place in self._closing(text))
        learned = [(len(prompt), end)]
        if stretches and text == own:
            # A space belongs to the token of the word behind it.
            spaced = [(len(text[:start].rstrip(" ")), stop) for start, stop in stretches if stop > len(prompt)]
            learned = [(max(start, len(prompt)), stop) for start, stop in spaced]
            learned = _joined([*learned, (answer, end)] if learned else [])
        return Sequence(text, [Turn(len(prompt), learned, answer, end)])

    def _before_first(self, own: str) -> str:
        """The text before the content of the first message, if that is the assistant's."""
        answer, content = self._closing(own)[0], self.messages[0]["content"]
        places = [own.rfind(words, 0, answer) for words in (content, content.strip())]
        return own[: next((place for place in places if place >= 0), answer)] if content else own[:answer]

    def _response(self, prompt: str, own: str, message: Message) -> str:
        """The template's text of the answer: after the prompt, or in place of the thinking block at its end."""
        if own.startswith(prompt):
            return own[len(prompt) :]
        if thought := _PROMPTED_THOUGHT.search(prompt):
            before = prompt[: thought.start()].rstrip()
            if own.startswith(before):
                return own[len(before) :].lstrip("\n")
        same = next(
            (n for n, (a, b) in enumerate(zip(prompt, own, strict=False)) if a != b), min(len(prompt), len(own))
        )
        place = own.find(_THOUGHT.sub("", message["content"], count=1).strip(), same)
        if place < 0:
            raise ValueError("its generation prompt is not how it begins an answer")
        return own[place:]

    def _closing(self, text: str) -> tuple[int, int]:
        """Positions where the last answer ends and where its end token ends; equal if it has no end token."""
        behind = self.template.frame[1]
        if behind is not None and text.endswith(behind):
            answer = len(text) - len(behind)
            token = self.template.control.search(text, answer)
            return (token.start() if token else answer), (token.end() if token else answer)
        tokens = list(self.template.control.finditer(text, max(0, len(text) - 200)))
        if tokens and not text[tokens[-1].end() :].strip():
            return tokens[-1].start(), tokens[-1].end()
        return len(text), len(text)

    def _continued(self, turn: Turn, text: str) -> Turn:
        """The turn within a longer sequence, where the token that begins the next turn may also end this one (GLM)."""
        if turn.answer == turn.end and (token := self.template.control.match(text, turn.end)):
            return Turn(turn.prompt, _joined([*turn.learned, token.span()]), turn.end, token.end())
        return turn

    def _with_thought(self, prompt: str, body: str, message: Message) -> str:
        """The response with the message's thinking exactly once, in the form that the end of the prompt asks for."""
        prompted = _PROMPTED_THOUGHT.search(prompt)
        opened, closed = (prompted is not None and (prompted[1] is None) is which for which in (True, False))
        thought = message.get("reasoning_content") or ""
        if not thought and (found := (_REST_OF_THOUGHT if opened else _THOUGHT).match(message["content"])):
            thought = found[1].strip("\n")
        answer = _THOUGHT.sub("", body, count=1) if _THOUGHT.match(body) else body
        if closed:
            if thought:
                self.notes.append("thinking is left out, as the generation prompt has an empty thinking block")
            return answer if answer == body else answer.lstrip("\n")
        if opened:
            if "</think>" in body and body.split("</think>")[0].strip() == thought.strip():
                return body  # the template's own form
            if not thought:
                self.notes.append("without thinking, so the block that the generation prompt opens is closed empty")
            return f"{thought.strip(chr(10))}\n</think>\n\n" + answer.lstrip("\n")
        if thought and thought.strip() not in body:
            return f"<think>\n{thought.strip(chr(10))}\n</think>\n\n" + answer.lstrip("\n")
        return body


def sequences(template: Template, record: dict[str, Any]) -> tuple[list[Sequence], list[str]]:
    """The sequences of a record and notes on it for the user. Raises any exception that the template raises."""
    try:
        chat = Chat(template, record["roles"], record["contents"], record["more"])
        return (chat.sequences(record["turns"]) if record["turns"] else [chat.whole()]), chat.notes
    except Exception:  # a template can raise anything
        # Most templates take the arguments of a call as an object, some only as JSON text.
        more = record["more"]
        calls = [
            call["function"] for extra in more.get("messages", {}).values() for call in extra.get("tool_calls", [])
        ]
        if all(isinstance(call["arguments"], str) for call in calls):
            raise
        for call in calls:
            call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
        return sequences(template, record)


def _joined(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The stretches in order, without empty ones; stretches that touch are merged."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(stretch for stretch in stretches if stretch[0] < stretch[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found
