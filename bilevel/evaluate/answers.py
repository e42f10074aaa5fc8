"""Compare a model's answer with the reference: as whole texts, or by the final answer of a worked solution.

The final answer is the text after the last `####` (GSM8K), or else in the last `\\boxed{...}` (MATH), or else the whole
text. If the reference has a box, its content is compared as a mathematical expression (bilevel.evaluate.mathematics).
Other final answers are compared by their last number, which is read exactly, as a fraction.
"""

import re
from fractions import Fraction

from bilevel.evaluate.mathematics import LONGEST, equal

_MARK = re.compile(r"####([^\n]*)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FRACTION = re.compile(r"(?P<whole>\d?)\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
_POWER = re.compile(r"(?<=[^\W\d])(\})?[\^_]\{?-?\w+\}?")  # cm^2, x_1
_NUMBER = re.compile(  # a minus after a word, a number or a bracket is a hyphen or an operator
    r"""(?: (?<![\w)\]}.]) (?P<sign>[-+]) )?
        (?: [$€£] \s? (?P<minus>-)? )?
        (?<![\d.])
        (?: (?P<whole>\d+) [ -] (?=\d+/\d) )?
        (?P<number> \d{1,3} (?:,\d{3})+ (?![\d,]) (?:\.\d+)? | \d+ (?:\.\d+)? | \.\d+ )
        (?: \s? / \s? (?P<below>\d+) )?""",
    re.VERBOSE,
)


def normalised(text: str) -> str:
    """The text with each run of white space replaced by one space and stripped; case and punctuation are kept."""
    return " ".join(text.split())


def marked(text: str) -> str | None:
    """The text after the last `####`, or else in the last `\\boxed{}` (with matching braces); None without a mark."""
    if found := _MARK.findall(text):
        return found[-1].strip()
    for box in reversed(list(_BOX.finditer(text))):
        depth = 1
        for place in range(box.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[box.end() : place].strip()
    return None


def final_number(text: str) -> Fraction | None:
    """The last number of a solution's final answer, or None. A unit or % sign after it is ignored."""
    answer = marked(text)
    answer = text if answer is None else answer
    for written, read in (("\u2212", "-"), ("{,}", ","), ("\\$", "$"), ("\\!", ""), ("\\,", " ")):
        answer = answer.replace(written, read)
    answer = _FRACTION.sub(lambda m: f"{m['whole']}{' ' * bool(m['whole'])}{m[2] or m[4]}/{m[3] or m[5]}", answer)
    numbers = [value for match in _NUMBER.finditer(_POWER.sub("", answer)) if (value := _value(match)) is not None]
    return numbers[-1] if numbers else None


def _value(match: re.Match[str]) -> Fraction | None:
    """The matched number, or None if it divides by zero."""
    below = int(match["below"] or 1)
    if not below:
        return None
    value = Fraction(match["number"].replace(",", "")) / below + int(match["whole"] or 0)
    return -value if "-" in (match["sign"], match["minus"]) else value


def correct(answers: list[str], references: list[str], how: str) -> list[bool]:
    """Whether each answer agrees with its reference.

    how: `exact` compares texts. `final_number` compares expressions if the reference has a \\boxed{}, and final numbers
    if not. `auto` does the same if the reference marks its answer, and compares texts if not.
    """
    found = [_agree(answer, reference, how) for answer, reference in zip(answers, references, strict=True)]
    pairs = {place: agreed for place, agreed in enumerate(found) if not isinstance(agreed, bool)}
    for place, agreed in zip(pairs, equal(list(pairs.values())), strict=True):
        found[place] = agreed
    return found


def _agree(answer: str, reference: str, how: str) -> bool | tuple[str, str]:
    """Whether an answer agrees with its reference, or the two expressions that decide it."""
    if how != "exact" and not _MARK.search(reference) and (box := marked(reference)) is not None:
        own = marked(answer)
        return (answer[-LONGEST:] if own is None else f"\\boxed{{{own}}}"), box
    number = final_number(reference) if how == "final_number" or (how == "auto" and marked(reference)) else None
    if number is not None:
        return final_number(answer) == number
    return how != "final_number" and normalised(answer) == normalised(reference)


def vote(answer: str, reference: str, how: str) -> object:
    """What two answers to one question have in common if they are the same answer, judged as `correct` would."""
    compared = _agree(answer, reference, how)
    if isinstance(compared, tuple):
        return normalised(compared[0])
    number = None if how == "exact" or (how == "auto" and marked(reference) is None) else final_number(answer)
    return normalised(answer) if number is None else number
