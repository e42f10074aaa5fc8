"""bilevel/data/filters.py: which records filters leave out, before any are drawn, and what is said of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bilevel.data.records import read_rows, records_of, row_notes
from bilevel.data.sources import Reading, Source, file_source
from bilevel.errors import DataError


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ASKED, SAID, SYSTEM = ("user", "Why?"), ("assistant", "So."), ("system", "Be brief.")
GOOD = [chat(ASKED, SAID), chat(SYSTEM, ASKED, SAID), chat(ASKED, SAID, ASKED, SAID)]
NO_TURNS = [chat(ASKED, ASKED, SAID), chat(ASKED, SAID, SAID), chat(ASKED, SAID, ASKED, SAID, SYSTEM, SAID)]
EMPTY = [chat(("user", " "), SAID), chat(ASKED, ("assistant", "")), chat(ASKED, ("assistant", ""), ASKED, SAID)]
BOTH = ("alternating_turns", "no_empty_turns")


def kept(source: Source) -> list[int]:
    return read_rows(source)["index"][:]


def test_turns_must_alternate_and_none_be_empty(write: Callable[..., Path]):
    """As in the papers' code, which reads at least one question and one answer."""
    file = write("a.json", GOOD + NO_TURNS + EMPTY)
    assert kept(file_source(file)) == list(range(9))
    assert kept(file_source(file, Reading(filters=BOTH[:1]))) == [0, 1, 2, 6, 7, 8]
    assert kept(file_source(file, Reading(filters=BOTH[1:]))) == [0, 1, 2, 3, 4, 5]
    both = file_source(file, Reading(filters=BOTH))
    assert kept(both) == [0, 1, 2] and records_of(both) == 9
    assert row_notes(both)[:2] == [
        "3 left out by filters: its turns do not alternate between user and assistant",
        "3 left out by filters: one of its turns is empty",
    ]


def test_conversations_without_an_answer_are_left_out_with_the_others(write: Callable[..., Path]):
    """Without the filter they are mistakes."""
    file = write("a.json", [{"messages": []}, chat(ASKED), *GOOD, chat(ASKED, ASKED)])
    with pytest.raises(DataError, match="no message from the assistant"):
        kept(file_source(file, Reading(filters=BOTH[1:])))
    source = file_source(file, Reading(filters=BOTH))
    assert kept(source) == [2, 3, 4] and row_notes(source)[0].startswith("3 left out by filters: its turns do not")


def test_other_layouts(write: Callable[..., Path]):
    pairs = write("p.json", [{"question": "a", "answer": "b"}, {"question": "a", "answer": ""}])
    alpaca = write("i.json", [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}])
    text = write("t.json", [{"text": "a"}, {"text": " "}])
    assert [kept(file_source(file, Reading(filters=BOTH))) for file in (pairs, alpaca, text)] == [[0]] * 3


def test_length_in_characters(write: Callable[..., Path]):
    file = write("a.json", [{"question": "x" * n, "answer": "y"} for n in range(1, 6)])
    source = file_source(file, Reading(max_characters=4))
    assert kept(source) == [0, 1, 2] and row_notes(source)[0] == "2 left out by filters: longer than max_characters 4"


def test_records_are_drawn_among_those_that_are_left(write: Callable[..., Path]):
    """#N counts what is left, and problems are not counted as filtered."""
    lines = [json.dumps(record) for record in (GOOD + EMPTY) * 10] + ["{broken"]
    file = str(write("a.jsonl", "\n".join(lines)))
    reading = Reading(filters=BOTH, skip_bad_records=1)
    drawn = kept(Source("a", "a.jsonl", (file,), reading, take=20))
    assert len(drawn) == 20 and all(index % 6 < 3 for index in drawn)
    with pytest.raises(DataError, match="#31 asks for more records than it has, 30"):
        kept(Source("a", "a.jsonl", (file,), reading, take=31))


def test_a_source_of_which_nothing_is_left(write: Callable[..., Path]):
    source = file_source(write("a.json", EMPTY), Reading(filters=BOTH))
    with pytest.raises(DataError, match="no record is left: 3 left out by filters: one of its turns is empty"):
        kept(source)
