"""Final answers are read as people write them."""

from fractions import Fraction

import pytest

from bilevel.evaluate.answers import correct, final_number, marked, normalised

NUMBERS = {
    "Natalia sold 48/2 = 24 clips in May.\n#### 72": 72,
    "#### 1,234,567": 1234567,
    "#### -3": -3,
    "#### \u22123": -3,
    "#### $1,200.50": Fraction("1200.5"),
    "#### -$5": -5,
    "#### $-5": -5,
    "#### 25%": 25,
    "#### 3 apples": 3,
    "#### 0.5": Fraction(1, 2),
    "#### .5": Fraction(1, 2),
    "#### 3/4": Fraction(3, 4),
    "#### 7 1/2": Fraction(15, 2),
    "#### 5\nThat took 9 steps": 5,
    "#### 5\nno:\n#### 6": 6,
    "#### none": None,
    r"so \boxed{42}, as 7 says": 42,
    r"\boxed{\frac{3}{4}}": Fraction(3, 4),
    r"\boxed{-\dfrac{10}{4}}": Fraction(-5, 2),
    r"\boxed{\frac12}": Fraction(1, 2),
    r"\boxed{7\frac{1}{2}}": Fraction(15, 2),
    r"\boxed{12\text{ cm}^2}": 12,
    r"\boxed{12 \mathrm{cm}^{2}}": 12,
    r"\boxed{x_1 = 5}": 5,
    r"\boxed{1{,}000}": 1000,
    r"\boxed{\$3.50}": Fraction(7, 2),
    r"\boxed{1} and \boxed{2}": 2,
    r"\boxed{1} and \boxed{2": 1,
    "The answer is 5.": 5,
    "It costs $3.20 and then $4.": 4,
    "10-5": 5,
    "covid-19": 19,
    "minus -8": -8,
    "(-8)": -8,
    "x=-8": -8,
    "12,34": 34,
    "1,2345": 2345,
    "3 of 1/0": 3,
    "nothing": None,
    "": None,
    "0 or 1e": 1,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_final_number(text: str):
    assert final_number(text) == NUMBERS[text]


def test_marked():
    assert marked(r"\boxed{\text{a}{b}} x") == r"\text{a}{b}"
    assert marked("a\n#### yes \nb") == "yes" and marked("a") is None


@pytest.mark.parametrize(
    ("answer", "reference", "how", "expected"),
    [
        (" two\n words ", "two words", "exact", True),
        ("Two words", "two words", "exact", False),
        ("it is 72", "#### 72", "exact", False),
        ("it is 72.0", "#### 72", "final_number", True),
        ("it is 72", "72 pieces", "auto", False),
        ("it is 72", "... #### 72", "auto", True),
        ("it is 71", "... #### 72", "auto", False),
        ("#### yes", "#### yes", "auto", True),
        ("none", "none", "final_number", False),
        ("0.75", r"\boxed{\frac{3}{4}}", "auto", True),
    ],
)
def test_correct(answer: str, reference: str, how: str, expected: bool):
    assert correct(answer, reference, how) is expected


def test_normalised():
    assert normalised("\ta \n\u00a0 b  ") == "a b"
