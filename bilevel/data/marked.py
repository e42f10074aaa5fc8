"""Samples as text in which the learned tokens are marked, for people to look at."""

from itertools import groupby
from typing import TYPE_CHECKING

from bilevel.data.tokenise import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BRACKETS = ("[[", "]]")
GREEN = ("\x1b[32m", "\x1b[0m")  # on a terminal


def marked(
    tokenizer: "PreTrainedTokenizerBase", ids: list[int], labels: list[int], marks: tuple[str, str] = BRACKETS
) -> str:
    """The text of a sample's tokens, special ones included, with each learned stretch between the two marks."""
    parts = stretches(tokenizer, ids, labels)
    return "".join(f"{marks[0]}{text}{marks[1]}" if learned else text for text, learned in parts)


def stretches(tokenizer: "PreTrainedTokenizerBase", ids: list[int], labels: list[int]) -> list[tuple[str, bool]]:
    """The text of a sample's tokens, cut where learned stretches begin and end: (text, whether it is learned)."""
    text, found, end = "", [], 0
    for learned, stretch in groupby(labels, lambda label: label != IGNORE):
        end += len(list(stretch))
        # Decoded from the beginning, because many tokenizers drop the space before the first word of a text.
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found.append((whole[len(text) :], learned))
        text = whole
    return found
