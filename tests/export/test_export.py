"""bilevel/export/command.py: the records that come out, in every format, and what is refused."""

import codecs
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from run_helpers import ROOT, finished_run

from bilevel.data.records import read_rows
from bilevel.data.sources import file_source
from bilevel.export import writers
from bilevel.export.command import main

RECORDS = [
    {"instruction": "Say yes", "input": "", "output": "yes", "n": 1, "is_noisy": False},
    {"instruction": "Say\n\u2028no — ünï", "output": "no.", "n": 2, "more": {"tags": ["a", "b"], "k": None}},
    {"instruction": "Say it", "input": "in", "output": "", "n": 3, "more": {"tags": [], "k": 0.1}},
    {"instruction": "SAY  yes", "input": "", "output": "Yes", "n": 2**53 + 1},
    {"instruction": "Name a digit", "output": " 7 .", "n": 5},
]
WEIGHTS = [1.5, 1e-3, 0.25, 1.75, 1.499]


def make_run(
    write: Callable[..., Path], content: object, name: str = "train.json", weights: list[float] = WEIGHTS
) -> Path:
    """A finished run of one file, with a weight for each record."""
    file = write(f"data/{name}", content)
    table = pd.DataFrame({"file": name, "index": range(len(weights)), "weight": weights})
    return finished_run(file.parents[1] / "run", [file], table)


@pytest.fixture
def run(write: Callable[..., Path]) -> Path:
    return make_run(write, RECORDS)


@pytest.fixture
def two(write: Callable[..., Path]) -> Path:
    """A per-source run: an array of 6 and lines of 4, c = 10 p / n."""
    lines = "".join(f'{{"text": "line {i}"}}\n' for i in range(4))
    files = [write("data/a.json", [{"text": f"array {i}"} for i in range(6)]), write("data/b.jsonl", lines)]
    table = {"source": ["a", "b"], "weight": [0.03, 0.97], "samples": [6, 4]}
    return finished_run(files[0].parents[1] / "run", files, pd.DataFrame(table))


def exported(run: Path, out: str, *arguments: str) -> bytes:
    assert main([str(run), *arguments, "--out", str(run.parent / out)]) == 0
    return (run.parent / out).read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# records come out as they are

ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\r\n \t\r\n"])
SPACE = st.text(" \t", max_size=3)
VALUES = st.recursive(
    st.just("\ud800") | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, str]:
    """A JSON line as people write them, and what ends it."""
    record = {"text": draw(st.text(st.characters(codec="utf-8"), max_size=20))} | draw(
        st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), VALUES, max_size=3).filter(
            lambda more: not {"text", "is_noisy", "messages", "conversations", "items", "instruction"} & set(more)
        )
    )
    separators = (draw(SPACE) + "," + draw(SPACE), draw(SPACE) + ":" + draw(SPACE))
    text = json.dumps(record, ensure_ascii=draw(st.booleans()), separators=separators)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a field that is not read, which only an escape can write
        text = json.dumps(record, separators=separators)
    return draw(SPACE) + text + draw(SPACE), draw(ENDS)


@pytest.mark.slow
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(written=st.lists(lines(), min_size=1, max_size=8), data=st.data())
def test_lines_come_out_byte_for_byte(written: list[tuple[str, str]], data: st.DataObject, tmp_path_factory):
    """Whatever marks the file's beginning and ends its lines; the last need not end."""
    folder = tmp_path_factory.mktemp("lines")
    if data.draw(st.booleans()):
        written[-1] = written[-1][0], ""
    file = folder / "train.jsonl"
    content = "".join(line + end for line, end in written).encode()
    file.write_bytes(codecs.BOM_UTF8 * data.draw(st.booleans()) + content)
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.5]), min_size=len(written), max_size=len(written)))
    table = pd.DataFrame({"file": file.name, "index": range(len(written)), "weight": weights})
    run = finished_run(folder / "run", [file], table)
    kept = [line.encode() + b"\n" for (line, _), c in zip(written, weights, strict=True) if c >= 1]
    if kept:
        assert exported(run, "out.jsonl", "--threshold", "1") == b"".join(kept)


@pytest.mark.parametrize("indent, rows", [(None, 1000), (2, 2), ("\t", 1)])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_other_formats_are_equal_after_parsing(write, suffix: str, indent: object, rows: int, monkeypatch):
    monkeypatch.setattr(writers, "ROWS", rows)
    run = make_run(write, json.dumps(RECORDS, indent=indent, ensure_ascii=False))
    content = exported(run, f"out{suffix}", "--threshold", "0.2")
    expected = [RECORDS[i] for i in (0, 2, 3, 4)]
    if suffix == ".parquet":
        found = pd.read_parquet(run.parent / "out.parquet", dtype_backend="pyarrow")
        assert list(found) == ["instruction", "input", "output", "n", "is_noisy", "more"]
        rows = datasets.Dataset.from_parquet(str(run.parent / "out.parquet"), cache_dir=str(run.parent)).to_list()
        assert rows == [dict.fromkeys(found) | record for record in expected]
    else:
        assert (json.loads(content) if suffix == ".json" else [*map(json.loads, content.splitlines())]) == expected


def test_a_record_of_an_array_keeps_its_text(write: Callable[..., Path]):
    """Numbers as written, a key that stands twice, escapes; only line breaks between values become spaces."""
    texts = ['{"text": "a\\u00e9  b", "x": 1.10e2}', '{"text":"1", "text": "2 \\n 3"}', '{\r\n\t"text" :\n\n "c" }']
    run = make_run(write, "[" + ",\n".join(texts) + "\n]", weights=[1.0, 2.0, 3.0])
    texts[2] = '{ "text" : "c" }'
    assert exported(run, "out.jsonl", "--keep", "1").decode().split("\n") == [*texts, ""]
    texts[2] = '{\r\n\t"text" :\n\n "c" }'
    assert exported(run, "out.json", "--keep", "1").decode() == "[\n" + ",\n".join(texts) + "\n]\n"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_datasets_loads_what_is_written(run: Path, suffix: str):
    exported(run, f"out.{suffix}", "--all")
    kind, file = suffix.replace("jsonl", "json"), str(run.parent / f"out.{suffix}")
    loaded = datasets.load_dataset(kind, data_files=file, split="train", cache_dir=str(run.parent / "cache")).to_list()
    none = dict.fromkeys(["instruction", "input", "output", "n", "is_noisy", "more", "weight"])
    assert loaded == [none | r | {"weight": w} for r, w in zip(RECORDS, WEIGHTS, strict=True)]


def test_chat_goes_through_every_format(write: Callable[..., Path]):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    records = [{"messages": turns * n, "id": n} for n in (1, 2, 3)]
    run = make_run(write, "\n".join(map(json.dumps, records)), "train.jsonl", [1.0, 1.0, 1.0])
    for suffix in ("json", "jsonl", "parquet"):
        exported(run, f"out.{suffix}", "--keep", "1")
        kind, file = suffix.replace("jsonl", "json"), str(run.parent / f"out.{suffix}")
        loaded = datasets.load_dataset(kind, data_files=file, split="train", cache_dir=str(run.parent / "cache"))
        assert loaded.to_list() == records


ENDINGS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow")
PACKED = ("jsonl.gz", "json.zst", "csv.bz2", "tsv.xz")


@pytest.mark.parametrize("suffix", ENDINGS + PACKED)
def test_every_format_is_read_again_as_it_was(write: Callable[..., Path], suffix: str):
    """The turns and marks of all records, of Alpaca records and of chats with a call."""
    call = {"name": "join", "arguments": '{"n": 0}'}
    said = [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}]
    asked = [{"role": "user", "content": 'a "q",\t\n\r2'}]
    kinds = {
        "alpaca": [{"instruction": f'say "{i}",\n; \u00e9', "input": "", "output": f"\t{i}\r\n", "is_noisy": i == 1}
                   for i in range(3)],
        "chat": [{"messages": asked + said}, {"messages": asked + [{"role": "assistant", "content": "x"}]}],
    }  # fmt: skip
    for kind, records in kinds.items():
        run = make_run(write, json.dumps(records), f"{kind}.json", [1.0] * len(records))
        out = run.parent / f"{kind}-out.{suffix}"
        assert exported(run, out.name, "--keep", "1")
        here, there = (read_rows(file_source(path)) for path in (run.parent / "data" / f"{kind}.json", out))
        shutil.rmtree(run)
        for name in ("roles", "contents", "more", "is_noisy"):
            assert here[name][:] == there[name][:], (kind, name)


def test_compressed_files_of_the_same_records_are_the_same(run: Path):
    assert exported(run, "1.jsonl.gz", "--keep", "1") == exported(run, "2.jsonl.gz", "--keep", "1")


def test_the_source_of_a_record(two: Path, write: Callable[..., Path]):
    drawn = [*map(json.loads, exported(two, "1.jsonl", "--sample", "6").splitlines())]
    assert all(record["source"] == ("a" if record["text"].startswith("array") else "b") for record in drawn)
    assert b"source" not in exported(two, "2.jsonl", "--keep", "1")
    kept = exported(two, "3.jsonl", "--keep", "1", "--source_field", "from").splitlines()
    assert kept[0] == b'{"text": "array 0", "from": "a"}'
    shutil.rmtree(two)
    run = make_run(write, [{"text": "x", "source": "own"}], "own.json", [1.0])
    assert exported(run, "4.jsonl", "--sample", "1") == b'{"text": "x", "source": "own"}\n'
    assert main([str(run), "--sample", "1", "--source_field", "source", "--out", str(run.parent / "5.jsonl")]) == 0
    out = str(run.parent / "6.jsonl")
    assert main([str(run), "--sample", "1", "--source_field", "text", "--out", out]) == 2 and not Path(out).exists()


def test_every_record_with_its_weight(write: Callable[..., Path]):
    """The line is the original's but for the field at its end; a record that was dropped has null."""
    texts = ['{"text": "a", "x": 1.10}', ' {"text":"b" } ', '{"text": ""}']
    table = pd.DataFrame({"file": "t.jsonl", "index": [0, 0, 1], "weight": [0.5, 1.5, 0.1 + 0.2]})
    file = write("data/t.jsonl", "\n".join(texts))
    run = finished_run(file.parents[1] / "run", [file], table, sizes=[3])
    assert exported(run, "out.jsonl", "--all").decode().splitlines() == [
        '{"text": "a", "x": 1.10, "weight": 1.0}',
        ' {"text":"b", "weight": 0.30000000000000004}',
        '{"text": "", "weight": null}',
    ]
    named = exported(run, "named.jsonl", "--all", "--weight_field", 'c "x"').decode().splitlines()
    assert [json.loads(line)['c "x"'] for line in named] == [1.0, 0.1 + 0.2, None]
    assert len(exported(run, "kept.jsonl", "--keep", "1").splitlines()) == 2


# ----------------------------------------------------------------------------------------------------------------------
# which records, and what is said of them


def judged(
    two: Path, verdicts: list[str], weights: list[float], called_at: list[str], samples: tuple[int, ...] = (6, 4)
) -> None:
    """Give the sources of the run these weights and verdicts."""
    table = pd.DataFrame({"source": ["a", "b"], "weight": weights, "samples": samples})
    table = table.assign(difference=[1.2, -1.2], low=-2.0, high=2.0, p_worse=[0.99, 0.01], evidence=99.0)
    table.assign(verdict=verdicts, called_at=called_at).to_csv(two / "weights.csv", index=False)


def test_sources_are_left_out_by_their_verdict(two: Path, capsys: pytest.CaptureFixture):
    """Beside the run, under a name that says what; from an array and lines to lines."""
    judged(two, ["worse", "better"], [0.03, 0.97], ["8", "9"])
    assert main([str(two)]) == 0
    assert (two.parent / "run-split.jsonl").read_text() == "".join(f'{{"text": "line {i}"}}\n' for i in range(4))
    screen = capsys.readouterr().out
    assert "left out by the verdicts: a: worse (verdict at step 8, weight of a record 0.05)" in screen
    assert "kept: b: better (verdict at step 9, weight of a record 2.42)" in screen and "WARNING" not in screen
    table = [line.split() for line in screen.splitlines() if line.split()[0] in ("a", "b")]
    assert table == [["a", "6", "0", "0.0000", "0.0500"], ["b", "4", "4", "1.0000", "2.4250"]]


def test_records_called_harmful_are_left_out(write: Callable[..., Path], capsys: pytest.CaptureFixture):
    """Unless many were not compared and have weights by another rule: then two-means on the weights decides."""
    file = write("data/a.json", [{"text": f"line {i}"} for i in range(12)])
    table = pd.DataFrame({"file": "a.json", "index": range(12), "weight": [0.1, 1.5, 0.9, 1.0, 1.5, *[1.0] * 7]})
    table = table.assign(mean_gap=0.5, harmful_share=[0.8, 0.0, 0.6, 0.4, np.nan, *[0.0] * 7])
    run = finished_run(file.parents[1] / "run", [file], table)
    kept = [f'{{"text": "line {i}"}}' for i in (1, *range(3, 12))]
    assert exported(run, "out.jsonl").decode().splitlines() == kept
    said = capsys.readouterr().out
    assert "left out: 2 records called harmful; about 1 may be sound; kept: 1 that were not compared" in said
    table.assign(harmful_share=[0.8, *[np.nan] * 11]).to_csv(run / "weights.csv", index=False)
    config = (run / "config.yaml").read_text()
    for rule, words in (("auto", "kept: 11 that were not compared"), ("sgd", "two-means on c suggests the threshold")):
        (run / "config.yaml").write_text(config.replace("x_optimizer: auto", f"x_optimizer: {rule}"))
        assert len(exported(run, f"{rule}.jsonl").decode().splitlines()) == 11
        assert words in capsys.readouterr().out


def test_nothing_is_left_out_if_nothing_is_shown(write: Callable[..., Path], capsys: pytest.CaptureFixture):
    """Weights that another rule has moved by chance are no reason, unless they form two groups, which is said."""
    file = write("data/a.json", [{"text": f"line {i}"} for i in range(400)])
    chance = np.random.default_rng(0).normal(1, 0.1, 400)
    table = pd.DataFrame({"file": "a.json", "index": range(400), "weight": chance / chance.mean()})
    run = finished_run(file.parents[1] / "run", [file], table.assign(mean_gap=0.5, harmful_share=0.0))
    assert main([str(run), "--out", str(run.parent / "out.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "no record is shown to be harmful, and the weights form no two groups (between its two peaks" in said
    assert "--all writes all records" in said and not (run.parent / "out.jsonl").exists()
    assert main([str(run), "--keep", "0.5", "--out", str(run.parent / "half.jsonl")]) == 0
    assert "WARNING: no record is shown to be harmful: look at those" in capsys.readouterr().out
    groups = np.where(np.arange(400) < 100, 0.1, 1.3) + 0.01 * chance
    two = table.assign(weight=groups / groups.mean(), mean_gap=0.5, harmful_share=0.0)
    two.to_csv(run / "weights.csv", index=False)
    assert len(exported(run, "two.jsonl").decode().splitlines()) == 300
    assert "WARNING: no record is shown to be harmful; look at the records first" in capsys.readouterr().out


def test_a_choice_among_equal_weights_is_said_to_be_chance(write: Callable[..., Path], capsys: pytest.CaptureFixture):
    file = write("data/a.json", [{"text": f"line {i}"} for i in range(9)])
    table = pd.DataFrame({"file": "a.json", "index": range(9), "weight": 1.0, "mean_gap": 0.5, "harmful_share": 0.0})
    run = finished_run(file.parents[1] / "run", [file], table)
    assert main([str(run), "--keep", "0.4", "--out", str(run.parent / "some.jsonl")]) == 0
    assert "all weights are equal: this choice is by chance" in capsys.readouterr().out


def test_records_that_were_not_read_are_not_suggested(write: Callable[..., Path], capsys: pytest.CaptureFixture):
    """Left out by skip_bad_records: they have no weight, and no text that could be written."""
    good, worse = [{"text": "one"}, {"text": 2}, {"text": "three"}], [{"text": "bad"}] * 3
    files = [write("data/a.json", worse), write("data/b.json", good)]
    table = pd.DataFrame({"source": ["a", "b"], "weight": [0.02, 0.98], "samples": [3, 2]})
    run = finished_run(files[0].parents[1] / "run", files, table, sizes=[3, 2])
    judged(run, ["worse", "better"], [0.02, 0.98], ["8", "9"], samples=(3, 2))
    data = json.loads((run / "data.json").read_text())
    data["train"][1]["unread"] = 1
    (run / "data.json").write_text(json.dumps(data))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("skip_bad_records: 0", "skip_bad_records: 1"))
    assert exported(run, "out.jsonl").decode().splitlines() == ['{"text": "one"}', '{"text": "three"}']
    screen = capsys.readouterr().out
    assert "1 records have no weight, because the run did not read them" in screen and "max_length" not in screen


@pytest.mark.parametrize(
    ("verdicts", "weights", "called_at", "why"),
    [
        (["no difference shown"] * 2, [0.03, 0.97], ["", ""], "a: no difference shown (weight of a record 0.05)"),
        (["worse", "better"], [0.3, 0.7], ["8", "8"], "a: worse (verdict at step 8, weight of a record 0.5)"),
        (["better", "worse"], [0.03, 0.97], ["8", "8"], "b: worse (verdict at step 8, weight of a record 2.42)"),
    ],
    ids=["chance", "needed in part", "low but better"],
)
def test_without_a_source_that_is_worse_and_gone_nothing_is_suggested(
    two: Path, verdicts: list[str], weights: list[float], called_at: list[str], why: str, capsys: pytest.CaptureFixture
):
    judged(two, verdicts, weights, called_at)
    assert main([str(two)]) == 2
    error = capsys.readouterr().err
    assert why in error and "--sample N" in error and [*two.parent.glob("run-*")] == []


def test_a_choice_by_weights_of_which_nothing_is_shown_is_doubted(two: Path, capsys: pytest.CaptureFixture):
    for verdicts, doubted in ((["no difference shown"] * 2, True), (["worse", "better"], False)):
        judged(two, verdicts, [0.49, 0.51], ["", ""])
        for number, flags in enumerate((("--keep", "0.5"), ("--threshold", "1"))):
            exported(two, f"{doubted}{number}.jsonl", *flags)
            assert ("WARNING: no source is shown to differ" in capsys.readouterr().out) == doubted
        exported(two, f"{doubted}.jsonl", "--all")
        assert "WARNING" not in capsys.readouterr().out


def test_why_records_have_no_weight(write: Callable[..., Path], capsys: pytest.CaptureFixture):
    """Those whose response was cut off have no row in weights.csv."""
    file = write("data/train.json", RECORDS)
    table = pd.DataFrame({"file": "train.json", "index": [0, 2, 3, 4], "weight": [1.5, 0.5, 1.0, 1.0]})
    exported(finished_run(file.parents[1] / "run", [file], table, sizes=[4]), "cut.jsonl", "--keep", "0.5")
    screen = capsys.readouterr().out
    assert "1 records have no weight, because no part of their response" in screen and "did not read" not in screen


def test_weights_without_verdicts_suggest_nothing(two: Path, capsys: pytest.CaptureFixture):
    assert main([str(two)]) == 2
    assert "has no verdicts" in capsys.readouterr().err


def test_what_is_said_of_the_kept(run: Path, capsys: pytest.CaptureFixture):
    exported(run, "out.jsonl", "--threshold", "0.2")
    screen = capsys.readouterr().out
    assert f" train {5:8d} {4:5d} 0.8000 {np.mean([1.5, 0.25, 1.75, 1.499]):12.4f} {0.001:13.4f}" in screen
    assert "1 repeat an earlier one (apart from white space and case)" in screen
    assert "without letters and digits: 1, with only one or two: 1" in screen
    assert f"wrote {run.parent / 'out.jsonl'}: 4 records" in screen
    exported(run, "few.jsonl", "--threshold", "1.6")
    assert "of these, 0 repeat an earlier one" in capsys.readouterr().out


def test_a_threshold_that_parts_nothing_is_warned_about(write: Callable[..., Path], capsys: pytest.CaptureFixture):
    weights = np.random.default_rng(0).normal(1, 0.1, 400).tolist()
    run = make_run(write, [{"text": "x"}] * 400, weights=weights)
    exported(run, "out.jsonl")
    assert "WARNING: the weights do not form two separate groups" in capsys.readouterr().out


def test_samples(two: Path):
    """The seed decides, and drawn again a record stands behind itself."""
    first = exported(two, "1.jsonl", "--sample", "3", "--seed", "1")
    assert exported(two, "2.jsonl", "--sample", "3", "--seed", "1") == first and first.count(b"\n") == 3
    assert any(exported(two, f"s{seed}.jsonl", "--sample", "3", "--seed", f"{seed}") != first for seed in range(2, 9))
    again = exported(two, "again.jsonl", "--sample", "40", "--replacement").splitlines()
    assert len(again) == 40 and again == sorted(again) and len(set(again)) <= 10


def test_marks(run: Path, write: Callable[..., Path]):
    marks = [{"file": "train.json", "index": index, "mark": mark} for index, mark in ((1, "keep"), (3, "drop"))]
    path = str(write("marks.json", {"run": "run", "marks": marks}))
    for number, arguments in enumerate([("--threshold", "1.49"), ("--keep", "0.6"), ("--sample", "3"), ("--all",)]):
        content = exported(run, f"{number}.json", *arguments, "--marks", path)
        found = [record["n"] for record in json.loads(content)]
        assert 2 in found and 2**53 + 1 not in found and len(found) == (4 if number == 3 else 3)


# ----------------------------------------------------------------------------------------------------------------------
# what is refused

BAD = {
    "unknown folder": ("none", [], "none is no run's folder"),
    "name of no folder": ("\0", [], "null"),
    "name too long for a folder": ("x" * 300, [], "File name too long"),
    "root": ("/", [], "/ is no run's folder"),
    "folder of something else": (".", [], "is no run's folder"),
    "nothing reaches the threshold": ("run", ["--threshold", "9"], "no record is selected: records with weight c >= 9"),
    "a share of nothing": ("run", ["--keep", "0.01"], "no record is selected"),
    "more than there are": ("run", ["--sample", "6"], "5 records have a weight above 0"),
    "no such format": (
        "run",
        ["--all", "--out", "x.txt"],
        "the name must end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, or",
    ),
    "no suffix": (
        "run",
        ["--all", "--out", "x"],
        "the name must end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, or",
    ),
    "out exists": ("run", ["--all", "--out", "taken.json"], "the file exists and is never overwritten"),
    "out is the data": ("run", ["--all", "--out", "data/train.json"], "the file exists and is never overwritten"),
    "no folder for out": ("run", ["--all", "--out", "a/b.json"], "the folder a does not exist"),
    "name too long": ("run", ["--all", "--out", "x" * 300 + ".json"], "File name too long"),
    "NUL in the name": ("run", ["--all", "--out", "\0.json"], "null"),
    "the field is taken": ("run", ["--all", "--weight_field", "output"], "record 0: it already has a field output"),
    "marks of nothing": ("run", ["--marks", "none.json"], "No such file"),
    "no two groups": ("equal", [], "all weights are equal, so there is no reason to leave any record out"),
    "not finished": ("unfinished", [], "unfinished is not finished"),
    "data changed": ("changed", [], "is not the file that the run was made on"),
}
BAD_FLAGS = {
    "two ways": ["--keep", "0.5", "--threshold", "1"],
    "sample and all": ["--sample", "5", "--all"],
    "replacement alone": ["--replacement"],
    "weight_field alone": ["--weight_field", "c"],
    "keep nothing": ["--keep", "0"],
    "keep too much": ["--keep", "1.5"],
    "keep nan": ["--keep", "nan"],
    "threshold inf": ["--threshold", "inf"],
    "sample none": ["--sample", "0"],
    "sample a half": ["--sample", "0.5"],
    "seed below 0": ["--seed", "-1"],
    "abbreviated": ["--thresh", "1"],
}


@pytest.fixture
def folder(run: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Several runs and a file that must stay as it is; the working directory."""
    monkeypatch.chdir(run.parent)
    write("taken.json", "mine")
    table = pd.DataFrame({"file": "train.json", "index": range(5), "weight": 1.0})
    for name in ("equal", "unfinished", "changed"):
        finished_run(run.parent / name, [run.parent / "data" / "train.json"], table)
    Path("unfinished/weights.csv").unlink()
    write("data2/train.json", RECORDS[1:])
    data = json.loads(Path("changed/data.json").read_text())
    data["train"][0]["path"] = str(run.parent / "data2" / "train.json")
    write("changed/data.json", data)
    return run.parent


def state(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("run_name, arguments, message", BAD.values(), ids=BAD)
def test_refused(folder: Path, capsys: pytest.CaptureFixture, run_name: str, arguments: list[str], message: str):
    before = state(folder)
    assert main([run_name, *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err and said.out == ""
    assert state(folder) == before


@pytest.mark.parametrize("arguments", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_refused_flags(folder: Path, capsys: pytest.CaptureFixture, arguments: list[str]):
    before = state(folder)
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err and state(folder) == before


MIXED = {
    "text and number": [{"text": "a", "x": 1}, {"text": "b", "x": "one"}],
    "in two tables": [{"text": "a", "x": 1}] * 3 + [{"text": "b", "x": "one"}],
    "too large a number": [{"text": "a", "x": 2**70}],
    "an empty object": [{"text": "a", "x": {}}],
    "half a surrogate pair": [{"text": "a", "x": "\ud800"}],
}


@pytest.mark.parametrize("records", MIXED.values(), ids=MIXED)
def test_what_parquet_cannot_hold(write, records: list[dict], monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(writers, "ROWS", 2)
    run = make_run(write, json.dumps(records), weights=[1.0] * len(records))
    assert main([str(run), "--all", "--out", str(run.parent / "out.parquet")]) == 2
    assert "Parquet needs one type per field" in capsys.readouterr().err
    assert sorted(path.name for path in run.parent.iterdir()) == ["data", "run"]
    assert json.loads(exported(run, "out.json", "--keep", "1")) == records


def test_a_full_disk_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def full(records: object, file: object) -> None:
        file.write(b"[")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(writers.WRITERS, ".json", full)
    assert main([str(run), "--all", "--out", str(run.parent / "out.json")]) == 2
    assert "out.json cannot be written: No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in run.parent.iterdir()) == ["data", "run"]


@pytest.mark.slow
def test_the_command(run: Path):
    """As a user types it; it needs no torch."""
    check = (
        "import sys; from bilevel.export.command import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    )
    for start in ["-m", "bilevel.export"], ["-c", check]:
        done = subprocess.run(
            [sys.executable, *start, str(run), "--keep", "0.4", "--out", f"{run.parent}/{start[0]}.json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0 and done.stderr == "" and "the fraction 0.4 of records" in done.stdout
        assert json.loads((run.parent / f"{start[0]}.json").read_text()) == [RECORDS[0], RECORDS[3]]
