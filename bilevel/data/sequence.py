"""A sample before it is tokenised: its text and the parts of it that are learned."""

import dataclasses


@dataclasses.dataclass
class Turn:
    """One learned turn, as positions in the text of its sequence.

    prompt: where the generation prompt ends and the response begins; learned: stretches [start, end); answer: where the
    text of the response ends; end: where the token that ends the response ends, equal to answer if there is none.
    """

    prompt: int
    learned: list[tuple[int, int]]
    answer: int
    end: int

    def stretches(self) -> list[tuple[int, int, bool]]:
        """The response, cut where learned stretches begin and end: (start, end, whether it is learned)."""
        found, place = [], self.prompt
        for start, end in self.learned:
            found += [(place, start, False), (start, end, True)]
            place = end
        return [part for part in (*found, (place, self.end, False)) if part[0] < part[1]]


@dataclasses.dataclass
class Sequence:
    """A text and its learned turns in order. Special tokens in it are special; the tokenizer's own BOS is not included.

    mark: a character inside each text of a record that would become a special token; removed before tokenising.
    """

    text: str
    turns: list[Turn]
    mark: str = ""


def plain(roles: list[str], contents: list[str], eos: str, context: list[int]) -> Sequence:
    """Turns without a chat template: EOS after each response, and a `### Role:` heading before each turn of a chat.

    Contents contain no special tokens. context: numbers of the assistant turns that are not learned.
    """
    text, turns = "", []
    for number, (role, content) in enumerate(zip(roles, contents, strict=True)):
        text += "\n\n" if number and role != "response" else ""
        text += "" if role in ("prompt", "response") else f"### {role.capitalize()}:\n"
        start = len(text)
        text += content
        if role in ("response", "assistant"):
            answer = len(text)
            text += eos
            if number not in context:
                turns.append(Turn(start, [(start, len(text))], answer, len(text)))
    return Sequence(text, turns)


def whole_text(text: str) -> Sequence:
    """A text without a prompt, all of which is learned."""
    return Sequence(text, [Turn(0, [(0, len(text))], len(text), len(text))])
