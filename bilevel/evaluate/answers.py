"""Answers in text, read and compared: whole texts, or the number in which a worked solution ends.

A final answer is what stands behind the last `####` (GSM8K) or, without one, in the last `\\boxed{...}` (MATH); where
there is neither mark, the whole text. Its last number is read exactly, as a fraction.
"""

import re
from fractions import Fraction

_MARK = re.compile(r"####([^\n]*)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FRACTION = re.compile(r"(?P<whole>\d?)\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
_POWER = re.compile(r"(?<=[^\W\d])(\})?[\^_]\{?-?\w+\}?")  # cm^2, x_1
_NUMBER = re.compile(  # a minus behind a word, a number or a bracket is a hyphen or an operator
    r"""(?: (?<![\w)\]}.]) (?P<sign>[-+]) )?
        (?: [$€£] \s? (?P<minus>-)? )?
        (?<![\d.])
        (?: (?P<whole>\d+) [ -] (?=\d+/\d) )?
        (?P<number> \d{1,3} (?:,\d{3})+ (?![\d,]) (?:\.\d+)? | \d+ (?:\.\d+)? | \.\d+ )
        (?: \s? / \s? (?P<below>\d+) )?""",
    re.VERBOSE,
)


def normalised(text: str) -> str:
    """The text with every stretch of white space as one space, and none at its ends; case and marks stay."""
    return " ".join(text.split())


def marked(text: str) -> str | None:
    """What stands behind the last `####` or else in the last `\\boxed{}`, braces within it matched; None without."""
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
    """The number in which a solution ends; None without one. A unit or % sign behind it is not looked at."""
    answer = marked(text)
    answer = text if answer is None else answer
    for written, read in (("\u2212", "-"), ("{,}", ","), ("\\$", "$"), ("\\!", ""), ("\\,", " ")):
        answer = answer.replace(written, read)
    answer = _FRACTION.sub(lambda m: f"{m['whole']}{' ' * bool(m['whole'])}{m[2] or m[4]}/{m[3] or m[5]}", answer)
    numbers = [value for match in _NUMBER.finditer(_POWER.sub("", answer)) if (value := _value(match)) is not None]
    return numbers[-1] if numbers else None


def _value(match: re.Match[str]) -> Fraction | None:
    """None where something is divided by zero."""
    below = int(match["below"] or 1)
    if not below:
        return None
    value = Fraction(match["number"].replace(",", "")) / below + int(match["whole"] or 0)
    return -value if "-" in (match["sign"], match["minus"]) else value


def correct(answer: str, reference: str, how: str) -> bool:
    """Whether an answer is the reference's: `exact` as normalised text, `final_number` by their last numbers.

    `auto` takes the number where the reference marks one, else the text.
    """
    number = final_number(reference) if how == "final_number" or (how == "auto" and marked(reference)) else None
    if number is not None:
        return final_number(answer) == number
    return how != "final_number" and normalised(answer) == normalised(reference)
