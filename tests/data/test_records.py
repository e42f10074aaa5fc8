"""bilevel/data/records.py: formats, errors that name file and record, the cache."""

import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bilevel.data.containers import json_text, kinds
from bilevel.data.records import read_rows
from bilevel.data.sources import Reading, file_source, find_sources
from bilevel.errors import DataError

ALPACA = {"instruction": "Say hi", "input": "", "output": "hi"}
CHAT = [("user", "Say hi"), ("assistant", "hi")]
Write = Callable[..., Path]


def rows(path: Path, format: str = "auto") -> list[tuple[list[str], list[str]]]:
    return [(row["roles"], row["contents"]) for row in read_rows(file_source(path, Reading(format)))]


def chat(key: str = "messages", role: str = "role", content: str = "content", turns=CHAT) -> dict:
    return {key: [{role: speaker, content: text} for speaker, text in turns]}


def message(path: Path, format: str = "auto") -> str:
    """The error that reading the file gives; every one names the file."""
    with pytest.raises(DataError) as caught:
        read_rows(file_source(path, Reading(format)))
    assert str(path) in str(caught.value)
    return str(caught.value)


# formats


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ({"input": "in French"}, "### Instruction:\nSay hi\n\n### Input:\nin French\n\n### Response:\n"),
        ({"input": ""}, "### Instruction:\nSay hi\n\n### Response:\n"),
        ({"input": None}, "### Instruction:\nSay hi\n\n### Response:\n"),
        ({}, "### Instruction:\nSay hi\n\n### Response:\n"),
    ],
)
def test_alpaca(write: Write, extra: dict, prompt: str) -> None:
    path = write("a.json", [{"instruction": "Say hi", "output": " hi\n", **extra}])
    assert rows(path) == [(["prompt", "response"], [prompt, " hi\n"])]


@pytest.mark.parametrize("key", ["messages", "conversations", "items"])
@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
def test_chat_keys(write: Write, key: str, role: str, content: str) -> None:
    assert rows(write("c.json", [chat(key, role, content)])) == [(["user", "assistant"], ["Say hi", "hi"])]


def test_chat_role_names(write: Write) -> None:
    names = ["system", "user", "assistant", "human", "gpt"]
    path = write("c.json", [chat(turns=[(name, name) for name in names])])
    assert rows(path) == [(["system", "user", "assistant", "user", "assistant"], names)]


def test_text(write: Write) -> None:
    assert rows(write("t.json", [{"text": " once upon\na time\n"}])) == [(["text"], [" once upon\na time\n"])]


def test_format_is_detected_per_file_and_can_be_overridden(write: Write) -> None:
    both = {**ALPACA, **chat(), "text": "plain"}
    assert [rows(write(f"{i}.json", [record]))[0][0] for i, record in enumerate([ALPACA, chat(), {"text": "x"}])] == [
        ["prompt", "response"],
        ["user", "assistant"],
        ["text"],
    ]
    path = write("both.json", [both])
    assert [rows(path, format)[0][0][0] for format in ("auto", "alpaca", "chat", "text")] == [
        "prompt",
        "prompt",
        "user",
        "text",
    ]


def test_is_noisy_and_index(write: Write) -> None:
    path = write("a.json", [ALPACA, {**ALPACA, "is_noisy": True}, {**ALPACA, "is_noisy": False}])
    assert read_rows(file_source(path))["is_noisy"][:] == [None, True, False]
    assert read_rows(file_source(path))["index"][:] == [0, 1, 2]


LINES = "\n".join(json.dumps({"text": text}) for text in "ab")


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": "a"}, {"text": "b"}], indent=2),
        "\ufeff" + json.dumps([{"text": "a"}, {"text": "b"}]),
        "\n \n" + json.dumps([{"text": "a"}, {"text": "b"}]) + "\n\n",
        LINES,
        LINES + "\n",
        "\ufeff" + LINES,
        "\n" + LINES.replace("\n", "\n\n   \n") + "\n\n",
        LINES.replace("\n", "\r\n"),
    ],
    ids=["array", "array-bom", "array-blank", "lines", "newline", "lines-bom", "lines-blank", "lines-crlf"],
)
def test_array_and_lines(write: Write, content: str) -> None:
    assert rows(write("t.jsonl", content)) == [(["text"], ["a"]), (["text"], ["b"])]


def test_blank_lines_at_the_beginning_take_no_memory_and_no_place(tmp_path: Path) -> None:
    """They may be gigabytes; a mistake behind them is told where it stands in the file."""
    path = tmp_path / "blank.jsonl"
    path.write_text("\n \t\n" * 200_000 + '{"text": "a"}\n')
    tracemalloc.start()
    try:
        with path.open("rb") as file:
            found = list(json_text.unparsed(file, path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [b'{"text": "a"}\n'] and peak < 100_000
    for text in ('\n  \n\n [{"text": "a"},\n x]', '\n\n  \n {"text":\n "a"}\n x'):
        path.write_text(text)
        with pytest.raises(json.JSONDecodeError) as wrong:
            json.loads(text if "[" in text else text.replace('{"text":\n "a"}', "      \n    "))
        assert f"line {wrong.value.lineno}, column {wrong.value.colno}" in message(path)


def test_line_separators_inside_a_record_do_not_end_it(write: Write) -> None:
    text = "a\u2028b\u2029c\x85d\x0be"
    path = write("t.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n" + json.dumps({"text": "f"}))
    assert rows(path) == [(["text"], [text]), (["text"], ["f"])]


def test_other_fields_may_hold_anything(write: Write) -> None:
    others = [1, "x", None, [1, "a", {}], {"deep": [[]]}, 1e400, 2**70, "\ud800"]
    path = write("a.json", json.dumps([{**ALPACA, "extra": extra} for extra in others] + [ALPACA]))
    assert rows(path) == [(["prompt", "response"], ["### Instruction:\nSay hi\n\n### Response:\n", "hi"])] * 9


# errors


@pytest.mark.parametrize(
    ("content", "record", "words"),
    [
        ('[{"text": "a"}, {"text": "b"}, {"text": oops}]', 2, "not JSON"),
        ('[{"text": "a"} {"text": "b"}]', 1, "not JSON"),
        ('[{"text": "a"}, {"text": "b"},]', 2, "not JSON"),
        ('[{"text": "a"}, {"te', 1, "not JSON"),
        ("[", 0, "not JSON"),
        ('{"text": "a"}\n\n{"text": "b"}\n{"text": \n', 2, "not JSON"),
        ("instruction,output\nSay hi,hi\n", 0, "not JSON"),
        ('{\n  "text": "a"\n', 0, "not JSON"),
        ('{\n  "text": "a"\n}\n{\n  "text" "b"\n}', 1, "not JSON"),
        ('[{"text": "a"}, "b"]', 1, "expected an object with fields, got str"),
        ('{"text": "a"}\nnull', 1, "expected an object with fields, got NoneType"),
        ('[{"text": "a"}, ["b"]]', 1, "expected an object with fields, got list"),
        ("17", 0, "expected an object"),
        ('{"data": [{"text": "a"}]}', 0, "format not recognised from its fields ['data']"),
        ("[{}]", 0, "format not recognised"),
        ([{"promt": "hi", "completion": "ho"}], 0, "is promt meant to be prompt?"),
        (
            [{"Instruction": "hi", "respnse": "ho"}],
            0,
            "is Instruction meant to be instruction?; is respnse meant to be resp",
        ),
        ([{"output": "hi"}], 0, "format not recognised from its fields ['output']"),
        ([ALPACA, {"instruction": "Say hi"}], 1, "no field 'output'"),
        ([ALPACA, {"output": "hi"}], 1, "no field 'instruction'"),
        ([ALPACA, {"text": "hi"}], 1, "no field 'instruction'"),
        ([ALPACA, {**ALPACA, "output": None}], 1, "'output' must be text, got NoneType"),
        ([ALPACA, {**ALPACA, "output": 3}], 1, "'output' must be text, got int 3"),
        ([ALPACA, {**ALPACA, "instruction": ["x"] * 99}], 1, "'instruction' must be text, got list"),
        ([ALPACA, {**ALPACA, "input": 0}], 1, "'input' must be text, got int 0"),
        ([ALPACA, {**ALPACA, "is_noisy": "yes"}], 1, "is_noisy must be true or false, got 'yes'"),
        (json.dumps([ALPACA, {**ALPACA, "output": "\ud83d"}]), 1, "surrogate"),
        ([{"text": "a"}, {"text": {}}], 1, "'text' must be text, got dict"),
        ([chat(), {"messages": "hi"}], 1, "messages must be a list of messages, got str 'hi'"),
        ([chat(), {"messages": []}], 1, "messages must be a list of messages"),
        ([chat(), {"text": "hi"}], 1, "no messages or conversations or items field"),
        ([chat(), {"messages": ["hi"]}], 1, "message 0: expected an object, got str 'hi'"),
        ([chat(), {"messages": [{"role": "user"}]}], 1, "message 0: no field 'content'"),
        ([chat(), {"messages": [{"content": "x"}]}], 1, "message 0: no field 'from'"),
        ([chat(), chat(turns=[*CHAT, ("assistant", None)])], 1, "message 2: 'content' must be text"),
        ([chat(), chat(turns=[*CHAT, ("robot", "x")])], 1, "message 2: unknown role 'robot'; known are system, user"),
        ([chat(), chat(turns=[(["user"], "x")])], 1, "message 0: 'role' must be text"),
        ([chat(), chat(turns=[("user", "x"), ("system", "y")])], 1, "no message from the assistant"),
    ],
)
def test_error_names_file_and_record(write: Write, content: object, record: int, words: str) -> None:
    text = message(write("bad.json", content))
    assert re.search(rf"bad\.json, records? {record}\b", text) and words in text, text
    assert len(text) < 500


@pytest.mark.parametrize("content", ["", " \n\n", "\ufeff", "[]", " [ ]\n"])
def test_empty_file(write: Write, content: str) -> None:
    assert "holds no record" in message(write("empty.json", content))


@pytest.mark.parametrize("content", [b'[{"text": "\xff"}]', json.dumps([{"text": "a"}]).encode("utf-16")])
def test_not_utf8(write: Write, content: bytes) -> None:
    assert "not UTF-8" in message(write("latin.json", content))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"text": ' * 100_000, '[{"text": ' + "9" * 5000 + "}]"])
def test_what_the_json_library_refuses(write: Write, content: str) -> None:
    assert "cannot be read" in message(write("deep.json", content))


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in message(tmp_path / "gone.json")


@pytest.mark.parametrize("format", ["alpaca", "chat", "text"])
def test_override_that_does_not_fit(write: Write, format: str) -> None:
    record = {"alpaca": chat(), "chat": {"text": "x"}, "text": ALPACA}[format]
    assert "record 0" in message(write("x.json", [record]), format)


# find_files


def test_find_files_sorts_by_stem_and_takes_each_once(write: Write, tmp_path: Path, monkeypatch) -> None:
    for name in ("z/a.json", "a/c.json", "m/b.jsonl", "m/deep/d.json"):
        write(name, [ALPACA])
    monkeypatch.chdir(tmp_path)
    patterns = ["*/*.json*", "a/c.json", f"{tmp_path}/a/../a/c.json", "**/*.json"]
    assert [path.name for path in find_sources(patterns)] == ["a.json", "b.jsonl", "c.json", "d.json"]
    assert find_sources([]) == []


def test_find_files_takes_a_name_with_brackets_as_it_stands(write: Write) -> None:
    path = write("part[1].json", [ALPACA])
    assert find_sources([str(path)]) == [file_source(path)]


def test_two_files_with_one_stem(write: Write) -> None:
    one, two = write("x/train.json", [ALPACA]), write("x/train.jsonl", [ALPACA])
    with pytest.raises(DataError) as caught:
        find_sources([str(one), str(two)])
    assert str(caught.value).startswith(f"{one} and {two} would both be source 'train': rename one")


def test_no_match_names_all_patterns_and_process_py(write: Write, tmp_path: Path) -> None:
    write("data/process.py", "")
    patterns = [f"{tmp_path}/data/mixed/train_*.json", f"{tmp_path}/data/no.json", f"{tmp_path}/other/*.json"]
    with pytest.raises(DataError) as caught:
        find_sources(patterns)
    problems = str(caught.value).split("no file matches ")[1:]
    assert [repr(pattern) in problem for pattern, problem in zip(patterns, problems, strict=True)] == [True] * 3
    assert [f"run `python {tmp_path}/data/process.py` first" in problem for problem in problems] == [True, True, False]


# cache


@pytest.fixture
def parsed(monkeypatch) -> list[str]:
    """The files that were parsed, one entry for each time."""
    seen: list[str] = []
    original = kinds.unparsed

    def unparsed(place: str, content: str, count: object) -> Iterator[bytes | kinds.Item]:
        seen.append(Path(place).name)
        return original(place, content, count)

    monkeypatch.setattr(kinds, "unparsed", unparsed)
    return seen


def test_second_read_comes_from_the_cache(write: Write, parsed: list[str]) -> None:
    path = write("cached.json", [{"text": "cached"}])
    assert rows(path) == rows(path) == [(["text"], ["cached"])]
    assert parsed == ["cached.json"]


def test_changed_file_or_format_is_read_anew(write: Write, parsed: list[str]) -> None:
    for content in ("one", "two", "one"):
        assert rows(write("changed.json", [{**chat(), "text": content}]), "text") == [(["text"], [content])]
    assert len(parsed) == 2
    assert rows(write("changed.json", [{**chat(), "text": "one"}]), "chat")[0][0] == ["user", "assistant"]
    assert len(parsed) == 3


def test_error_is_not_cached(write: Write, parsed: list[str]) -> None:
    path = write("broken.json", [{"text": 1}])
    assert message(path) == message(path)
    assert len(parsed) == 2
    assert rows(write("broken.json", [{"text": "mended"}])) == [(["text"], ["mended"])]
