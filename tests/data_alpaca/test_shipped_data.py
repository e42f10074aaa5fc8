"""The shipped data set: its size and make-up, and answers on numbers and dates, worked out again from the questions."""

import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from datetime import date, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import pytest
from process_helpers import FOLDER, SHIPPED, integers, questions, records

GENERATE = FOLDER / "generator" / "generate.py"
RECORDS = records(SHIPPED)
SMALL_NUMBERS = [
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def a_date(text: str) -> date:
    return datetime.strptime(re.search(r"\d+ [A-Z][a-z]+ \d{4}", text).group(), "%d %B %Y").date()


def generated(tmp_path: Path, *flags: str) -> bytes:
    out = tmp_path / "made.json"
    command = [sys.executable, "-B", str(GENERATE), "--out", str(out), *flags]
    subprocess.run(command, check=True, capture_output=True)
    return out.read_bytes()


@pytest.mark.slow
def test_generator_makes_the_shipped_bytes(tmp_path):
    assert generated(tmp_path / "new") == SHIPPED.read_bytes() == generated(tmp_path / "new")
    assert generated(tmp_path, "--seed", "1") != SHIPPED.read_bytes()
    with pytest.raises(subprocess.CalledProcessError):  # the file is left as it is
        generated(tmp_path, "--seed", "2")
    assert generated(tmp_path, "--seed", "1")


@pytest.mark.slow
def test_chosen_kinds_and_more_records_of_each(tmp_path):
    records = json.loads(generated(tmp_path, "--tasks", "plural", "capitals", "--per_task", "120"))
    assert Counter(record["task"] for record in records) == {"plural": 120, "capitals": 120}
    shipped = [record for record in RECORDS if record["task"] == "plural"]
    assert all(record in records for record in shipped), "the first 80 are those of the shipped set"
    no = tmp_path / "no.json"
    for flags in (["--per_task", "10"], ["--tasks", "capitals", "--per_task", "9999", "--out", str(no)]):
        done = subprocess.run([sys.executable, "-B", str(GENERATE), *flags], capture_output=True)
        assert done.returncode == 2 and not no.exists()


def test_size_and_make_up():
    assert len(RECORDS) >= 4500 and SHIPPED.stat().st_size <= 1_500_000
    kinds = Counter(record["task"] for record in RECORDS)
    assert len(kinds) >= 30 and max(kinds.values()) <= 1.2 * min(kinds.values())
    assert statistics.mean(len(record["output"]) for record in RECORDS) >= 40
    assert 0.3 <= statistics.mean(bool(record["input"]) for record in RECORDS) <= 0.7


def test_records_are_whole_and_unique():
    for record in RECORDS:
        assert list(record) == ["instruction", "input", "output", "task"]
        assert all(value == value.strip() for value in record.values())
        assert record["instruction"] and record["output"] and record["task"]
        assert not re.search(r"\{[a-z]+\}", record["instruction"])
    assert len({(record["instruction"], record["input"]) for record in RECORDS}) == len(RECORDS)


def test_arithmetic():
    for question, answer in questions("arithmetic"):
        a, sign, b = re.search(r"(\d+) ([-+*/]) (\d+)", question).groups()
        a, b = Fraction(a), Fraction(b)
        assert Fraction(answer) == {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]


def test_equations_in_word_problems_and_bills():
    for task in ("word_problem", "shopping_bill"):
        for question, answer in questions(task):
            equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer)
            assert equations
            for a, sign, b, result in equations:
                a, b, result = int(a), int(b), int(result)
                assert {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)}[sign] == result
            given = set(integers(question)) | {int(equation[3]) for equation in equations}
            assert {int(n) for equation in equations for n in equation[::2]} <= given
            if task == "shopping_bill":
                assert integers(answer)[-1] == sum(int(equation[3]) for equation in equations)


def test_fractions_and_percent():
    for question, answer in questions("simplify_fraction"):
        value = Fraction(re.search(r"\d+/\d+", question).group())
        assert str(value) == answer
    for question, answer in questions("percent"):
        (rate,) = re.findall(r"(\d+)(?:%| per ?cent)", question)
        (base,) = set(integers(question)) - {int(rate)} or {int(rate)}
        assert int(rate) * base == 100 * integers(answer)[-1]


def test_primes():
    sieve = set(range(2, 201)) - {a * b for a in range(2, 101) for b in range(2, 200 // a + 1)}
    for question, answer in questions("prime_or_not"):
        n = integers(question)[0]
        assert (n in sieve) == (answer == f"{n} is prime.")
        if n not in sieve:
            assert integers(answer)[-2] * integers(answer)[-1] == n


def test_even_and_odd():
    for question, answer in questions("even_or_odd"):
        rest = 0 if "even" in question else 1
        assert integers(answer) == [n for n in integers(question) if n % 2 == rest]
        assert answer


def test_roman_numerals():
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    for question, answer in questions("roman_numerals"):
        text = f"{question} {answer}"
        (number,) = integers(text)
        roman = max(re.findall(r"\b[IVXLCDM]+\b", text), key=len)
        digits = [values[letter] for letter in roman]
        following = [*digits[1:], 0]
        assert sum(-a if a < b else a for a, b in zip(digits, following, strict=True)) == number
        assert not re.search(r"IIII|XXXX|CCCC|VV|LL|DD", roman)


def test_number_words():
    small = {word: n for n, word in enumerate(SMALL_NUMBERS, 1)} | {word: 10 * n for n, word in enumerate(TENS, 2)}
    for question, answer in questions("number_words"):
        total = part = 0
        for word in re.split(r"[ -]", answer.replace(" and ", " ")):
            if word == "thousand":
                total, part = 1000 * part, 0
            else:
                part = 100 * part if word == "hundred" else part + small[word]
        assert [total + part] == integers(question)


def test_sequences():
    for question, answer in questions("sequence"):
        terms = integers(question)[-4:] if "," in question else []
        following = integers(answer)
        assert len(terms) == 4 and len(following) == 3
        whole = terms + following
        steps = [b - a for a, b in zip(whole, whole[1:], strict=False)]
        second = {b - a for a, b in zip(steps, steps[1:], strict=False)}
        ratios = {Fraction(b, a) for a, b in zip(whole, whole[1:], strict=False)}
        assert len(second) == 1 or len(ratios) == 1


def test_sorting():
    for question, answer in questions("sort_numbers"):
        assert integers(answer) == sorted(integers(question), reverse="from largest to smallest" in question)
    for question, answer in questions("sort_words"):
        words = re.search(r"\w+(, \w+){3,}", question.replace("order, ", "")).group().split(", ")
        assert answer.split(", ") == sorted(words, reverse="reverse" in question)


def test_comparison():
    for question, answer in questions("compare_numbers"):
        numbers = {Fraction(n) for n in re.findall(r"\d+\.\d+|\d+", question)}
        big, small = (Fraction(n) for n in re.findall(r"\d+\.\d+|\d+", answer))
        assert big > small and {big, small} == numbers


def test_units():
    metres = {"kilometres": 1000, "metres": 1, "centimetres": Fraction(1, 100), "millimetres": Fraction(1, 1000)}
    feet = {"yards": 36, "feet": 12, "inches": 1}
    grams = {"tonnes": 1_000_000, "kilograms": 1000, "grams": 1}
    seconds = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    others = [{"litres": 1000, "millilitres": 1}, {"years": 12, "months": 1}]
    for question, answer in questions("unit_conversion"):
        a, unit_a, b, unit_b = re.fullmatch(r"(\d+) (\w+) are (\d+) (\w+)\.", answer).groups()
        (scale,) = [s for s in (metres, feet, grams, seconds, *others) if unit_a in s and unit_b in s]
        assert int(a) * scale[unit_a] == int(b) * scale[unit_b]
        assert a in question and unit_a in question and unit_b in question


def test_statistics():
    for question, answer in questions("statistics"):
        numbers = integers(question)
        assert integers(answer) == [min(numbers), max(numbers), sum(numbers), statistics.mean(numbers)]


def test_dates():
    for question, answer in questions("weekday_of_date"):
        assert a_date(question).strftime("%A") == answer
    for question, answer in questions("date_format"):
        iso = re.search(r"\d{4}-\d\d-\d\d", f"{question} {answer}").group()
        other = question.replace("5 May 2001", "") if answer == iso else answer
        assert date.fromisoformat(iso) == a_date(other)
    for question, answer in questions("date_arithmetic"):
        days = int(re.search(r"(\d+) days", question).group(1))
        days *= 1 if f"{days} days after" in question else -1
        assert a_date(answer) == a_date(question) + timedelta(days=days)


def test_weekday_shift():
    monday = date(2024, 1, 1)
    for question, answer in questions("weekday_shift"):
        (start,) = [d for d in (monday + timedelta(i) for i in range(7)) if d.strftime("%A") in question]
        (n,) = integers(question)
        assert answer.endswith(f"a {(start + timedelta(n)).strftime('%A')}.")


def test_times():
    def moment(text: str) -> datetime:
        return datetime.strptime(text, "%H:%M")

    for question, answer in questions("arrival_time"):
        start, hours, minutes = re.search(r"(\d\d:\d\d).*?(\d+) h (\d+) min", question).groups()
        end = moment(start) + timedelta(hours=int(hours), minutes=int(minutes))
        assert re.search(r"\d\d:\d\d", answer).group() == end.strftime("%H:%M")
    for question, answer in questions("duration"):
        start, end = re.findall(r"\d\d:\d\d", question)
        hours, minutes = re.search(r"(\d+) h (\d+) min", answer).groups()
        assert moment(end) - moment(start) == timedelta(hours=int(hours), minutes=int(minutes))
    for question, answer in questions("timetable"):
        now = moment(re.search(r"\d\d:\d\d", question).group())
        plan = re.findall(r"(?:, |: |\n|^)([a-z ]+) \((\d+) min\)", question)
        assert len(plan) == len(answer.splitlines())
        for (name, minutes), line in zip(plan, answer.splitlines(), strict=True):
            after = now + timedelta(minutes=int(minutes))
            assert line == f"{now:%H:%M} - {after:%H:%M} {name}"
            now = after
