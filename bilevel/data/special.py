"""Special tokens: text of a record never becomes one, and those in a template's text are encoded as single ids."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from bilevel.data.sequence import Sequence

ANCHOR = "\ue0b1"  # a private-use character that no token joins to its neighbours
# How the templates of well-known families begin and end a turn.
_FAMOUS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|system|end|start|message|endoftext)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜(?:User|Assistant)｜>"
)


class Guard:
    """The special tokens of a tokenizer. A call breaks them up in texts, also in lists and dicts of texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        texts = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self.ids = {text: tokenizer.convert_tokens_to_ids(text) for text in texts}
        self._spelt = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        # Some special tokens include the white space beside them, as in the tokenizer.
        left, right = ({text for text, token in added.items() if getattr(token, side)} for side in ("lstrip", "rstrip"))
        patterns = [r"\s*" * (t in left) + re.escape(t) + r"\s*" * (t in right) for t in texts]
        self.split = re.compile(f"({'|'.join(patterns) or '(?!)'})")
        # SentencePiece tokenizers put a space before the beginning of a text. Text that continues another is therefore
        # tokenised after a mark, which is then cut off.
        bare = self.encode(["a"])[0]
        self.anchor = ANCHOR if tokenizer.convert_ids_to_tokens(bare[0]).startswith(("▁", "Ġ")) else ""
        special = tokenizer(tokenizer.eos_token + "a", add_special_tokens=False)["input_ids"]
        self.after_special = "" if special[1:] == bare else self.anchor

    def __call__(self, value: Any) -> tuple[Any, str]:
        """The same value with a mark inside whatever spells a special token, and the mark ("" if nothing does)."""
        if not self._spelt.search(text := _all_text(value)):
            return value, ""
        mark = next(chr(code) for code in range(0xE000, 0x10FFFE) if chr(code) not in text)
        return self._marked(value, mark), mark

    def marks(self, text: str) -> str:
        """Up to three special tokens or marks of well-known chat templates that a text holds; "" for none."""
        found = (match[0] for pattern in (self._spelt, _FAMOUS) for match in pattern.finditer(text))
        return ", ".join(list(dict.fromkeys(found))[:3])

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._spelt.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, dict):
            return {key: self._marked(each, mark) for key, each in value.items()}
        return [self._marked(each, mark) for each in value] if isinstance(value, list) else value


class Segments:
    """The tokens of stretches of some sequences; the texts between special tokens are encoded all at once.

    A stretch begins and ends where a turn's prompt, response, learned parts or end does.
    """

    def __init__(self, guard: Guard, sequences: list[Sequence]):
        self.guard = guard
        self._ids: dict[tuple[str, str], list[int]] = {}
        self._parts: dict[tuple[int, int, int], list[int | tuple[str, str]]] = {}
        self._kept = sequences  # kept alive, so that no other sequence gets the id of one
        for sequence in sequences:
            for turn in sequence.turns:
                self._split(sequence, 0, turn.prompt)
                self._split(sequence, turn.answer, turn.end)
                for start, end, _ in turn.stretches():
                    self._split(sequence, start, end)
            self._split(sequence, sequence.turns[-1].end, len(sequence.text))
        for prefix in {prefix for prefix, _ in self._ids}:
            texts = [text for before, text in self._ids if before == prefix]
            skip = len(guard.encode([prefix])[0]) if prefix else 0
            for text, ids in zip(texts, guard.encode([prefix + text for text in texts]), strict=True):
                self._ids[prefix, text] = ids[skip:]

    def ids(self, sequence: Sequence, start: int, end: int) -> list[int]:
        found: list[int] = []
        for part in self._parts[id(sequence), start, end]:
            if isinstance(part, int):
                found.append(part)
            else:
                found += self._ids[part]
        return found

    def _split(self, sequence: Sequence, start: int, end: int) -> None:
        """Split into ids of special tokens and texts between them, each with the prefix it is encoded after."""
        key = (id(sequence), start, end)
        if key in self._parts:
            return
        guard, parts = self.guard, self._parts.setdefault(key, [])
        prefix = "" if not start else guard.after_special if self._after_special(sequence, start) else guard.anchor
        for number, text in enumerate(guard.split.split(sequence.text[start:end])):
            if number % 2:
                parts.append(guard.ids[text if text in guard.ids else text.strip()])
                prefix = guard.after_special
            elif text := text.replace(sequence.mark, "") if sequence.mark else text:
                parts.append((prefix, text))
                self._ids[prefix, text] = []

    def _after_special(self, sequence: Sequence, place: int) -> bool:
        """Whether a special token ends here."""
        before = sequence.text[max(0, place - 200) : place]
        return any(found.end() == len(before) for found in self.guard.split.finditer(before))


def _all_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    each = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return "\n".join(map(_all_text, each))
