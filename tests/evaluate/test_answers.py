"""Final answers are read as people write them."""

from fractions import Fraction

import pytest

from bilevel.errors import UserError
from bilevel.evaluate import mathematics
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
EXPRESSIONS = {
    True: [
        ("2^{10}", "1024"),
        ("2^10", "1024"),
        (r"1\,000", "1000"),
        ("1000", r"1\,000"),
        (r"1{,}000{,}000", "10^6"),
        ("1\u202f000", "1,000"),
        (r"\dfrac{3}{4}", "0.75"),
        (r"\frac34", r"\frac{3}{4}"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("x + 1", "1+x"),
        ("y=2x+1", "2x+1=y"),
        (r"\left(1,5\right)", "(1, 5)"),
        (r"\{1,2\}", r"\{2,1\}"),
        (r"12\text{ cm}^2", "12"),
        (r"\$3.50", "3.5"),
        (r"60^\circ", "60"),
        ("7\\frac{1}{2}", r"\frac{15}{2}"),
        (r"\text{Monday}", "monday"),
        (r"\text{(A)}", "A"),
    ],
    False: [
        (r"\frac{\sqrt{5}}{2}", r"\frac{\sqrt{3}}{2}"),
        ("(1,5)", "(3,5)"),
        ("(1,2)", "(2,1)"),
        ("[1,2)", "[1,2]"),
        ("2^{10}", "1000"),
        ("16x", "16"),
        ("p - q", "q - p"),
        (r"\infty", r"-\infty"),
        ("0.333", r"\frac{1}{3}"),
        ("12:30", "12:45"),
        ("stop", "pots"),
        (r"\text{east}", r"\text{west}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
        ("", "5"),
    ],
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
def test_correct(here: None, answer: str, reference: str, how: str, expected: bool):
    assert correct([answer], [reference], how) == [expected]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expressions are compared without a process of their own."""
    monkeypatch.setattr(mathematics, "_compared", lambda pairs: [mathematics.same(*pair) for pair in pairs])


@pytest.mark.slow
def test_expressions_in_boxes(here: None):
    pairs = [(pair, expected) for expected, pairs in EXPRESSIONS.items() for pair in pairs]
    answers, references = ([rf"So it is \boxed{{{pair[place]}}}." for pair, _ in pairs] for place in (0, 1))
    expected = [expected for _, expected in pairs]
    for how in ("auto", "final_number"):
        found = correct(answers, references, how)
        assert [pair for pair, now, then in zip(pairs, found, expected, strict=True) if now is not then] == []
    assert correct(answers, references, "exact") == [pair[0] == pair[1] for pair, _ in pairs]


def test_an_answer_without_a_box_is_its_last_expression(here: None):
    answers = ["The answer is 0.75.", "It is $\\frac{6}{8}$", "First $5$, then $\\frac34$.", "4", "", "#### 3/4"]
    assert correct(answers, [r"\boxed{\frac{3}{4}}"] * 6, "auto") == [True, True, True, False, False, True]


def test_gsm8k_stays_exact():
    assert correct(["#### 10", r"\boxed{2^{10}}", "#### 1,024"], ["#### 1024"] * 3, "auto") == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("hostile", ["9^{9^{9^{9}}}", "99999999!", "(" * 3000, "\\frac{" * 400], ids=len)
def test_an_expression_that_nobody_can_evaluate_is_wrong(monkeypatch: pytest.MonkeyPatch, hostile: str):
    monkeypatch.setattr(mathematics, "_SERVE", mathematics._SERVE.replace("m.serve", "m.SECONDS = 2.0; m.serve"))
    references = [r"\boxed{5}", r"\boxed{\frac{1}{2}}"]
    assert correct([rf"\boxed{{{hostile}}}", r"\boxed{0.5}"], references, "auto") == [False, True]


@pytest.mark.slow
def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mathematics, "_SERVE", "import no_such_package; {root!r}")
    with pytest.raises(UserError, match="math-verify does not start: .*no_such_package"):
        correct([r"\boxed{5}"], [r"\boxed{6}"], "auto")


def test_normalised():
    assert normalised("\ta \n\u00a0 b  ") == "a b"
