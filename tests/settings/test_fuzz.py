"""Arbitrary input to the readers: the documented result or the documented error, soon and in little memory.

The suite runs a fixed choice of examples. The long run draws new ones, that many in all:

    FUZZ_EXAMPLES=100000 FUZZ_LARGE=1 python -m pytest tests/settings/test_fuzz.py

FUZZ_LARGE measures memory on files of 20 MB instead of 1.
"""

import hashlib
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, tokenizer_of

from bilevel.data.layouts.conversation import CHAT_KEYS, ROLES
from bilevel.data.records import read_rows
from bilevel.data.rows import read_place
from bilevel.data.sources import Reading, file_source, find_sources
from bilevel.data.special import ANCHOR
from bilevel.data.tokenise import IGNORE, Tokeniser
from bilevel.errors import DataError, UserError
from bilevel.settings.command_line import _yaml, load_settings, read_yaml
from bilevel.settings.fields import FIELDS, Settings
from bilevel.settings.rules import validate
from bilevel.settings.written import dump

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SECONDS, CHARACTERS = 2, 4000  # the longest example, of CPU time, and the longest message
MESSAGES = 20  # problems at most in one error of the configuration
FORMATS = ("auto", "alpaca", "chat", "text")


def examples(few: int, share: float) -> settings:
    """`few` in the suite, this share of all in the long run."""
    return settings(
        max_examples=max(1, round(share * EXAMPLES)) if EXAMPLES else few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or None after the documented error."""
    start = time.process_time()  # whatever else the machine does
    try:
        return call(*arguments)
    except UserError as error:
        text = str(error)
        assert len(text) < CHARACTERS and text.encode() and text.strip()
        return None
    finally:
        assert time.process_time() - start < SECONDS


# what is drawn

TEXT = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(
    ["", "\ud800", "\0", "<|endoftext|>", "</s><s>", ANCHOR, f"{ANCHOR}0\ue000", "a" * 300, "\u2028", "null", "1e400"]
)
CLEAN = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(["<|im_end|>", ANCHOR, f"{ANCHOR}0\ue000"])
KEYS = st.sampled_from(
    ["instruction", "input", "output", "text", "is_noisy", "role", "content", "from", "value", *CHAT_KEYS]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([10**4000, -(10**4000)])
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | TEXT, inner, max_size=5),
    max_leaves=12,
)
ROLE = st.sampled_from([*ROLES, "robot"])


def nearly(good: st.SearchStrategy) -> st.SearchStrategy:
    """Mostly what is right there, now and then anything."""
    return st.one_of(good, good, good, good, JSON)


MESSAGE = st.fixed_dictionaries({"role": nearly(ROLE), "content": nearly(CLEAN)}) | st.fixed_dictionaries(
    {"from": nearly(ROLE), "value": nearly(CLEAN)}
)
NOISE = {"is_noisy": nearly(st.none() | st.booleans())}
ALPACA = st.fixed_dictionaries(
    {"instruction": nearly(CLEAN), "output": nearly(CLEAN)}, optional={"input": nearly(CLEAN), **NOISE}
)
CHAT = st.builds(
    lambda key, turns, rest: {key: turns, **rest},
    st.sampled_from(CHAT_KEYS),
    nearly(st.lists(nearly(MESSAGE), max_size=4)),
    st.fixed_dictionaries({}, optional=NOISE),
)
PLAIN = st.fixed_dictionaries({"text": nearly(CLEAN)}, optional=NOISE)
RECORDS = st.one_of(*(st.lists(kind, max_size=5) for kind in (ALPACA, CHAT, PLAIN)), st.lists(JSON, max_size=4), JSON)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file of records as an array or as lines, whole or with bytes cut out, put in or turned over; or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    records, ascii = draw(RECORDS), draw(st.booleans())
    if isinstance(records, list) and draw(st.booleans()):
        end = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
        text = end.join(json.dumps(record, ensure_ascii=ascii) for record in records)
    else:
        text = json.dumps(records, ensure_ascii=ascii, indent=draw(st.none() | st.just(1)))
    data = text.encode("utf-8", "surrogatepass")
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        at, size = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = (
            data[:at]
            + draw(st.binary(max_size=3) | st.sampled_from([b"[" * 2000, b'"', b"}", b"\0"]))
            + data[at + size :]
        )
    return data


def parsed(data: bytes) -> list[Any]:
    """The records of a file, by the library alone: all at once, the lines split by hand."""
    text = data.decode("utf-8-sig")
    if text.lstrip(" \t\n\r").startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.replace("\r", "\n").split("\n") if line.strip()]


def texts(record: dict[str, Any], format: str) -> list[str]:
    """Every text of a record that must come through unchanged."""
    if format == "text":
        return [record["text"]]
    if format == "alpaca":
        return [record["instruction"], record.get("input") or "", record["output"]]
    turns = next(record[key] for key in CHAT_KEYS if key in record)
    return [turn["content"] if "role" in turn else turn["value"] for turn in turns]


def check_rows(rows: list[dict[str, Any]], data: bytes) -> None:
    records = parsed(data)
    assert [row["index"] for row in rows] == list(range(len(records))) and rows
    for row, record in zip(rows, records, strict=True):
        assert row["is_noisy"] is record.get("is_noisy")
        kind = {"prompt": "alpaca", "text": "text"}.get(row["roles"][0], "chat")
        wanted = texts(record, kind)
        if kind == "alpaca":
            assert row["contents"][1] == wanted[2] and all(text in row["contents"][0] for text in wanted[:2])
        else:
            assert list(row["contents"]) == wanted
        assert len(row["roles"]) == len(row["contents"])


# records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def generated(path: Path, format: str) -> list[dict[str, Any]]:
    """The rows of a file without a record that cannot be read. Raises DataError."""
    batches = read_place(str(path), Reading(format), hashlib.sha256(path.read_bytes()).hexdigest())
    rows = [row for batch in batches for row in batch.to_pylist()]
    for row in rows:
        if row["problem"]:
            raise DataError(row["problem"])
    return rows


@examples(200, 0.5)
@given(data=files(), format=st.sampled_from(FORMATS))
def test_any_file(folder: Path, data: bytes, format: str) -> None:
    (folder / "any.json").write_bytes(data)
    rows = outcome(generated, folder / "any.json", format)
    if rows is not None:
        check_rows(rows, data)


@examples(40, 0.01)
@given(data=files(), format=st.sampled_from(FORMATS))
def test_any_file_through_the_cache(folder: Path, data: bytes, format: str) -> None:
    (folder / "cached.json").write_bytes(data)
    table = outcome(read_rows, file_source(folder / "cached.json", Reading(format)))
    if table is not None:
        check_rows(list(table), data)
    assert (table is None) == (outcome(generated, folder / "cached.json", format) is None)


@examples(150, 0.04)
@given(patterns=st.lists(TEXT | st.text("*?[]{}/.ab\0\ud800"), max_size=4))
def test_any_pattern(folder: Path, patterns: list[str]) -> None:
    """Under the test's own folder."""
    found = outcome(find_sources, [f"{folder}/{pattern}" for pattern in patterns])
    assert found is None or found == sorted(set(found), key=lambda source: source.stem)


# tokens

TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CLEAN), min_size=1, max_size=5)
ROW = st.one_of(
    st.tuples(st.just("text"), CLEAN).map(lambda turn: [turn]),
    st.tuples(CLEAN, CLEAN).map(lambda both: [("prompt", both[0]), ("response", both[1])]),
    TURNS,
)


@pytest.mark.slow
@examples(300, 0.15)
@given(
    kind=st.sampled_from([*KINDS]),
    rows=st.lists(ROW, min_size=1, max_size=4),
    max_length=st.integers(2, 60),
    loss_on=st.sampled_from(["response", "all"]),
)
def test_any_rows_to_tokens(kind: str, rows: list[list[tuple[str, str]]], max_length: int, loss_on: str) -> None:
    tokenizer = tokenizer_of(kind)
    roles, contents = ([[turn[i] for turn in row] for row in rows] for i in (0, 1))
    batch = {"roles": roles, "contents": contents, "index": [*range(len(rows))], "is_noisy": [None] * len(rows)}
    out = Tokeniser(tokenizer, max_length, loss_on)(batch)
    assert out["index"] == sorted(out["index"]) and set(out["index"]) <= set(batch["index"])
    for index, ids, labels, problem in zip(out["index"], out["input_ids"], out["labels"], out["problem"], strict=True):
        if problem is not None:  # Llama-2's template takes no system message but the first, before a user's turn
            assert kind == "llama2" and "system" in roles[index] and not ids and not labels
            continue
        assert 2 <= len(ids) == len(labels) <= max_length
        assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
        assert any(label != IGNORE for label in labels[1:])
        if roles[index][0] in ("prompt", "text"):  # no template: BOS and EOS are all that is special
            special = [token for token in ids if token in tokenizer.all_special_ids]
            assert special in ([], *[[t] for t in (tokenizer.bos_token_id, tokenizer.eos_token_id)]) or (
                special == [tokenizer.bos_token_id, tokenizer.eos_token_id]
            )


# settings

NAMES = st.sampled_from([*FIELDS]) | TEXT
GIVEN = {"train_data": ["a"], "val_data": ["b"], "model_name_or_path": "m"}
VALUES = (
    JSON | st.integers(-2, 2) | st.sampled_from(["a", "auto", "1", "true", "cosine", ["a"], {"model_type": "gpt2"}])
)
SETTINGS = st.dictionaries(NAMES, VALUES, max_size=6) | st.dictionaries(st.sampled_from([*FIELDS]), VALUES, max_size=2)


def check_settings(found: Settings) -> None:
    """What dump writes is read again as the same."""
    again, problems = validate(_yaml(dump(found)))
    assert not problems and again == found


@examples(200, 0.12)
@given(values=SETTINGS)
def test_any_mapping(values: dict[str, Any]) -> None:
    found, problems = validate(GIVEN | values)
    assert problems or found
    assert len(problems) <= MESSAGES and all(len(p) < CHARACTERS and p.encode("utf-8") for p in problems)
    if not problems:
        check_settings(found)


PIECES = st.sampled_from(
    [
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!float ",
        "!!binary ",
        "!!timestamp ",
        "!!bool ",
        "!!set ",
        "? ",
        "- ",
        ": ",
        "\n",
    ]
    + [
        "2001-99-99",
        "''",
        "0x" + "f" * 5000,
        "1:" * 500 + "1",
        "[" * 400,
        "{a: " * 400,
        "{",
        "}",
        "[",
        "]",
        "lr_x",
        "'",
    ]
    + ["train_data", "model_config", "  ", "#", "|\n", ">\n", "!!python/object/apply:os.system ", "%YAML 9.9\n---\n"]
)
YAML = (
    st.lists(PIECES | TEXT, max_size=14).map("".join).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | SETTINGS.map(lambda values: yaml.dump(GIVEN | values, allow_unicode=True).encode("utf-8", "surrogatepass"))
    | st.binary(max_size=100)
)


@examples(100, 0.1)
@given(data=YAML)
def test_any_configuration_file(folder: Path, data: bytes) -> None:
    (folder / "any.yaml").write_bytes(data)
    values = outcome(read_yaml, str(folder / "any.yaml"))
    assert values is None or all(isinstance(key, str) for key in values)
    found = outcome(load_settings, ["--config", str(folder / "any.yaml")])
    if found:
        check_settings(found[0])


WORDS = (
    st.sampled_from([f"--{name}" for name in FIELDS])
    | PIECES
    | TEXT
    | st.sampled_from(["--config", "--dry_run", "--", "-1", "--lr_x=1", "{a: 1}", "[a, [b]]", "{", "null", "/dev/null"])
)
LINE = ["--train_data", "a", "--val_data", "b", "--model_name_or_path", "m"]


@examples(100, 0.08)
@given(words=st.lists(WORDS, max_size=6), whole=st.booleans())
def test_any_command_line(words: list[str], whole: bool) -> None:
    words = [word for word in words if not word.startswith(("--help", "-h"))]
    try:
        found = outcome(load_settings, LINE * whole + words)
    except SystemExit as stop:  # argparse, on an option without its value
        assert stop.code == 2
        return
    if found:
        check_settings(found[0])


# memory

SIZE = 20_000_000 if os.environ.get("FUZZ_LARGE") else 1_000_000
FILES: dict[str, Callable[[int], str]] = {
    "brackets": lambda n: "[" * n,
    "braces": lambda n: '{"a":' * (n // 5),
    "empty-objects": lambda n: "[" + "{}," * (n // 3) + "{}]",
    "empty-lists": lambda n: "[" + "[]," * (n // 3) + "[]]",
    "deep-records": lambda n: "[" + ",".join(['{"text":"","a":' + "[" * 20 + "]" * 20 + "}"] * (n // 60)) + "]",
    "tiny-records": lambda n: "[" + ",".join(['{"text":""}'] * (n // 12)) + "]",
    "tiny-lines": lambda n: '{"text":""}\n' * (n // 12),
    "wide-lines": lambda n: '{"text":"😀"}\n' * (n // 16),
    "wide-records": lambda n: "[" + ",".join(['{"text":"😀"}'] * (n // 16)) + "]",
    "ends": lambda n: "\n" * n,
    "spaces": lambda n: " " * n,
    "escapes": lambda n: '[{"text":"' + "\\u0041" * (n // 6) + '"}]',
    "wide-escapes": lambda n: '{"text":"' + "\\ud83d\\ude00" * (n // 12) + '"}',
    "one-wide-character": lambda n: '[{"text":"' + "x" * n + '😀"}]',
    "one-of-objects": lambda n: '[{"text":"","a":[' + "{}," * (n // 3) + "{}]}]",
    "one-of-lists": lambda n: '{"text":"","a":[' + "[]," * (n // 3) + "[]]}",
    "one-of-pairs": lambda n: '[{"text":"","a":[' + '{"ab":"cd"},' * (n // 12) + "0]}]",
    "one-of-keys": lambda n: "{" + ",".join(f'"{i}":0' for i in range(n // 10)) + ',"text":""}',
    "half-text-half-objects": lambda n: '[{"text":"' + "x" * (n // 2) + '","a":[' + "{}," * (n // 6) + "{}]}]",
    "sparse-objects": lambda n: '[{"text":"","a":[' + (" " * 60 + "{},") * (n // 63) + "{}]}]",
    "bad-end": lambda n: "[" + ",".join(['{"text":"x"}'] * (n // 13)) + ",]",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_memory(folder: Path, kind: str) -> None:
    """At most ten times the file, and a little."""
    path = folder / "memory.json"
    path.write_text(FILES[kind](SIZE), encoding="utf-8")
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    tracemalloc.start()
    try:
        for _ in read_place(str(path), Reading("text"), content):
            pass
    except DataError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10 * path.stat().st_size + 4_000_000
