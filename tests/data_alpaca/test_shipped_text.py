"""The shipped data set: answers on text, structured data and code, worked out again from the questions."""

import contextlib
import csv
import io
import json
import re

from process_helpers import integers, questions


def test_string_edits():
    for question, answer in questions("reverse_text"):
        assert "".join(reversed(answer)) in question
    for question, answer in questions("remove_vowels"):
        assert not set(answer.lower()) & set("aeiou")
        assert any(re.sub("[aeiouAEIOU]", "", question)[i:].startswith(answer) for i in range(len(question)))
    for question, answer in questions("count_letters"):
        letter = re.search(r'"(\w)"', question).group(1)
        text = question.replace(f'"{letter}"', "")
        quoted = re.search(r'"(.+)"|: (.+)', text)
        text = next(filter(None, quoted.groups())) if quoted else text.split("\n")[1]
        assert integers(answer) == [sum(c == letter for c in text.lower())]


def test_duplicates_are_removed():
    for question, answer in questions("remove_duplicates"):
        words = max(re.findall(r"\w+(?:, \w+)+", question), key=len).split(", ")
        kept = [word for i, word in enumerate(words) if word not in words[:i]]
        assert answer.split(", ") == kept


def test_sets():
    for question, answer in questions("set_operations"):
        a, b = (set(integers(group)) for group in re.findall(r"\{(.*?)\}", question))
        operation = re.search("union|intersection|difference", question).group()
        assert set(integers(answer)) == getattr(a, operation)(b)


def test_structured_data():
    for question, answer in questions("to_json"):
        person = json.loads(answer)
        assert list(person) == ["name", "age", "city", "job"]
        assert all(str(value) in question for value in person.values())
    for question, answer in questions("to_csv"):
        rows = list(csv.DictReader(io.StringIO(answer)))
        said = re.findall(r"(\d+) packets of (\w+) at (\d+) euros", question)
        assert [(row["packets"], row["product"], row["price"]) for row in rows] == said
    for question, answer in questions("table_lookup"):
        table = list(csv.DictReader(io.StringIO(question.split("\n", 1)[1])))
        good = re.search(r"packet of (\w+)", answer).group(1)
        (row,) = [row for row in table if row["product"] == good]
        assert good in question.split("\n")[0]
        assert integers(answer) == [int(row["price"]), int(row["packets"])]


def test_code_reading_by_running_it():
    for question, answer in questions("code_output"):
        code = question.split("\n", 1)[1]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        assert printed.getvalue().rstrip("\n") == answer


CALLS = {  # name of a function without its number: (argument, result for number n)
    "add": (100, lambda n: 100 + n),
    "times": (7, lambda n: 7 * n),
    "minus": (100, lambda n: 100 - n),
    "divisible_by": (50, lambda n: 50 // n * n == 50),
    "larger_than": (12, lambda n: n < 12),
    "first": (list(range(30)), lambda n: list(range(n))),
    "last": (list(range(30)), lambda n: list(range(30 - n, 30))),
    "repeat": ("ab", lambda n: "".join("ab" for _ in range(n))),
    "power": (2, lambda n: 1 << n),
    "multiples_of": (3, lambda n: [n, n + n, n + n + n]),
    "count_above": (list(range(30)), lambda n: 29 - n),
    "at_most": (12, lambda n: 12 if n > 12 else n),
}


def test_written_code_runs():
    for question, answer in questions("code_writing"):
        space = {}
        exec(answer, space)
        stem, number = re.search(r"def (\w+)_(\d+)\(", answer).groups()
        argument, expected = CALLS[stem]
        assert space[f"{stem}_{number}"](argument) == expected(int(number))
        assert f"{stem}_{number}" in question


def test_opposites_and_plurals_are_consistent():
    known: dict[str, str] = {}
    for question, answer in questions("opposites"):
        (word,) = re.findall(r'"(\w+)"', question) or [question.split("\n")[1]]
        assert answer != word and known.setdefault(word, answer) == answer and known.get(answer, word) == word
    for question, answer in questions("plural"):
        one, many = re.findall(r'"(\w+)"', answer)
        assert one in question and (one != many or one == "sheep")


def test_one_word_is_corrected():
    for question, answer in questions("spelling"):
        words = set(re.findall(r"\w+", question))
        assert len([word for word in re.findall(r"\w+", answer) if word not in words]) == 1
