"""A sample before it is tokenised: one text, and the stretches of it that are learned."""

import dataclasses


@dataclasses.dataclass
class Turn:
    """One turn that is learned; positions in the sequence's text.

    prompt: where the prompt of generation ends and the response begins; learned: [start, end) stretches; answer: where
    the response's own text ends; end: where the token that ends it ends, the same as answer where there is none.
    """

    prompt: int
    learned: list[tuple[int, int]]
    answer: int
    end: int

    def stretches(self) -> list[tuple[int, int, bool]]:
        """The response cut where learned stretches begin and end: (start, end, whether it is learned)."""
        found, place = [], self.prompt
        for start, end in self.learned:
            found += [(place, start, False), (start, end, True)]
            place = end
        return [part for part in (*found, (place, self.end, False)) if part[0] < part[1]]


@dataclasses.dataclass
class Sequence:
    """A text in which special tokens are special, and its turns in order. No BOS of the tokenizer's own is in it.

    No text of a record becomes a special token: `mark` stands inside what would, and is taken out of each stretch.
    """

    text: str
    turns: list[Turn]
    mark: str = ""


def plain(roles: list[str], contents: list[str], eos: str, context: list[int]) -> Sequence:
    """Turns without a chat template: EOS after each response, a `### Role:` heading for each turn that has no prompt.

    Contents are free of special tokens; context: numbers of the turns that are not learned.
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
