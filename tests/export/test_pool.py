"""bilevel/export/pool.py and output.py: draws from other files by the weights of sources, limits, floors, appended
records, and a file for each source."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import finished_run

from bilevel.data.records import read_rows
from bilevel.data.sources import file_source
from bilevel.errors import UserError
from bilevel.export.command import main
from bilevel.export.pool import lifted
from bilevel.export.selection import draw, inclusion

SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}


def asked(name: str, number: int) -> dict:
    return {"question": f"{name} {number}?", "answer": "so it is " * (4 if name == "c" else 1)}


@pytest.fixture
def run(write: Callable[..., Path], tmp_path: Path) -> Path:
    """A per-source run on 4, 4 and 6 records of three sources; whole/ holds 40, 10 and 100 others of them."""
    files = [write(f"data/{n}.json", [asked(n, i) for i in range(4 + 2 * (n == "c"))]) for n in SHARES]
    for name, size in (("a", 40), ("b", 10), ("c", 100)):
        write(f"whole/{name}.jsonl", "".join(json.dumps(asked(name, 100 + i)) + "\n" for i in range(size)))
    table = pd.DataFrame({"source": list(SHARES), "weight": list(SHARES.values()), "samples": [4, 4, 6]})
    return finished_run(tmp_path / "run", files, table)


def exported(run: Path, *arguments: str | Path) -> list[dict]:
    """The records that come out of a draw from the whole sources."""
    out = run.parent / f"out{len(list(run.parent.glob('out*')))}.jsonl"
    whole = ["--from", run.parent / "whole" / "*.jsonl"]
    assert main([str(word) for word in [run, *whole, "--out", out, *arguments]]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def by_source(records: list[dict]) -> dict[str, int]:
    return dict(Counter(record["source"] for record in records))


def test_each_source_gets_its_learned_share_of_the_whole_files(run: Path):
    """Whatever the numbers of records: the run had 4, 4 and 6, the whole files have 40, 10 and 100."""
    found = exported(run, "--sample", "30")
    assert by_source(found) == {"a": 15, "b": 9, "c": 6}
    assert len({record["question"] for record in found}) == 30 and all(" 1" in record["question"] for record in found)
    other = exported(run, "--sample", "30", "--seed", "1")
    assert by_source(other) == by_source(found) and other != found
    assert exported(run, "--sample", "30", "--seed", "1") == other


def test_a_source_that_is_too_small_is_limited_and_it_is_said(run: Path, capsys: pytest.CaptureFixture):
    assert by_source(exported(run, "--sample", "50")) == {"a": 29, "b": 10, "c": 11}  # 5 to 2 of the 40 left
    said = capsys.readouterr().out
    assert "b: its share is 15 records; all it has, each once, are 10, and the other sources get the rest" in said
    found = exported(run, "--sample", "100", "--max_repeats", "4")
    assert by_source(found) == {"a": 50, "b": 30, "c": 20}
    times = Counter(record["question"] for record in found)
    assert {times[f"b {100 + i}?"] for i in range(10)} == {3}, "each as often as the others"
    assert {times[f"a {100 + i}?"] for i in range(40)} == {1, 2}
    assert "its share is" not in capsys.readouterr().out
    found = exported(run, "--sample", "160", "--max_repeats", "2")
    assert by_source(found) == {"a": 80, "b": 20, "c": 60} and max(Counter(r["question"] for r in found).values()) == 2
    assert "b: its share is 48 records; all it has, each 2 times, are 20" in capsys.readouterr().out


def test_a_floor(run: Path):
    assert by_source(exported(run, "--sample", "20", "--floor", "0.25")) == {"a": 9, "b": 6, "c": 5}


@given(p=st.lists(st.floats(0.001, 1), min_size=1, max_size=8), part=st.floats(0, 1))
def test_floors_keep_the_order_and_the_sum(p: list[float], part: float):
    shares, floor = np.array(p) / sum(p), part / len(p)
    found = lifted(shares, floor)
    assert found.sum() == pytest.approx(1) and (found >= floor - 1e-12).all()
    above = found > floor + 1e-9
    ratio = found[above] / shares[above]
    assert ratio == pytest.approx(ratio[:1].repeat(len(ratio))) and (ratio <= 1 + 1e-9).all()


def test_shares_of_tokens(run: Path):
    """Source c has longer answers, so that fewer of its records have its share of the tokens."""
    found = exported(run, "--sample", "60", "--shares", "tokens", "--max_repeats", "4")
    counts = by_source(found)
    assert counts["c"] < 7 and counts["a"] / counts["b"] == pytest.approx(5 / 3, rel=0.05)


def test_records_are_appended_once_each(run: Path, write: Callable[..., Path], capsys: pytest.CaptureFixture):
    val = write("val.json", [{"question": f"v {i}", "answer": "yes"} for i in range(3)])
    found = exported(run, "--sample", "10", "--append", val)
    assert [record["question"] for record in found[10:]] == ["v 0", "v 1", "v 2"]
    assert by_source(found) == {"a": 5, "b": 3, "c": 2, "val": 3}
    assert "of these, 3 are appended: val" in capsys.readouterr().out
    out = run.parent / "kept.jsonl"
    assert main([str(run), "--keep", "0.5", "--append", str(val), "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 7 + 3


def test_sources_of_other_layouts_come_out_as_a_file_each(run: Path, write: Callable[..., Path], capsys):
    """One file would not be read again: training takes the layout of its first record for all."""
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    write("whole/b.jsonl", json.dumps({"conversations": turns}) + "\n")
    command = [str(run), "--sample", "10", "--max_repeats", "9", "--from", str(run.parent / "whole" / "*.jsonl")]
    assert main([*command, "--out", str(run.parent / "one.jsonl")]) == 2
    assert "layouts" in (said := capsys.readouterr().err) and f"{run.parent / 'one'}/" in said
    folder = run.parent / "several"
    assert main([*command, "--out", f"{folder}/"]) == 0
    sizes = {file.stem: len(read_rows(file_source(file))) for file in folder.iterdir()}
    assert sizes == {"a": 5, "b": 3, "c": 2}
    assert main([*command, "--out", f"{folder}/"]) == 2 and "the folder exists" in capsys.readouterr().err
    assert main(command) == 0
    assert len(list((run.parent / "run-sample10-repeats9-from").iterdir())) == 3
    assert not [path for path in run.parent.iterdir() if path.name.startswith(".")]


REFUSED = {
    "a source without files": (["--from", "whole/a.jsonl", "whole/c.jsonl"], "no files for the run's source b"),
    "files of no source": (["--from", "whole/*.jsonl", "d.jsonl"], "the run has no weight for source d"),
    "no file": (["--from", "whole/x.jsonl"], "no file matches"),
    "names": (["--from", "{a: d.jsonl, b: 3"], "--from: "),
    "floor": (["--from", "whole/*.jsonl", "--floor", "0.4"], "3 sources cannot have so much each"),
    "more than the limit": (["--from", "whole/*.jsonl", "--max_repeats", "2", "--sample", "301"], "are 300; draw at"),
    "the name of a source": (["--append", "data/a.json"], "a is also a source of the run"),
    "nothing to append": (["--append", "none.json"], "no file matches"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_refused(run: Path, write, monkeypatch, capsys, arguments: list[str], message: str):
    monkeypatch.chdir(run.parent)
    write("d.jsonl", json.dumps(asked("d", 0)))
    before = sorted(run.parent.rglob("*"))
    assert main(["run", "--sample", "5", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith("error: ") and said.out == ""
    assert sorted(run.parent.rglob("*")) == before


def test_names_can_be_given(run: Path, write: Callable[..., Path]):
    folder = run.parent / "whole"
    mapping = json.dumps({"a": [str(folder / "a.jsonl"), str(folder / "b.jsonl")], "b": str(folder / "b.jsonl"),
                          "c": str(folder / "c.jsonl#5")})  # fmt: skip
    found = exported(run, "--sample", "20", "--from", mapping)
    assert by_source(found) == {"a": 10, "b": 6, "c": 4}


def test_weights_of_records_say_nothing_of_other_files(write: Callable[..., Path], tmp_path: Path, capsys):
    file = write("data/a.json", [asked("a", 0), asked("a", 1)])
    table = pd.DataFrame({"file": "a.json", "index": [0, 1], "weight": [0.5, 1.5]})
    run = finished_run(tmp_path / "run", [file], table)
    assert main([str(run), "--sample", "1", "--from", str(file)]) == 2
    assert "needs a run with weights=source" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--from", "a.json"],
        ["--keep", "0.5", "--max_repeats", "2"],
        ["--sample", "2", "--replacement", "--max_repeats", "2"],
        ["--sample", "2", "--from", "a.json", "--marks", "m.json"],
        ["--sample", "2", "--max_repeats", "0"],
        ["--sample", "2", "--floor", "1.5"],
        ["--sample", "2", "--shares", "words"],
    ],
)
def test_options_that_do_not_go_together(arguments: list[str]):
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    assert ended.value.code == 2


@given(c=st.lists(st.sampled_from([0.0, 0.1, 1.0, 3.0]), min_size=1, max_size=20), data=st.data())
def test_a_record_comes_as_often_as_expected_rounded(c: list[float], data: st.DataObject):
    weights, repeats = np.array(c), data.draw(st.integers(1, 5))
    if not weights.any():
        return
    n = data.draw(st.integers(1, repeats * int((weights > 0).sum())))
    expected = inclusion(weights, n, repeats)
    assert expected.sum() == pytest.approx(n) and expected.max() <= repeats
    counts = draw(weights, np.zeros(len(c), dtype=np.int8), n, False, 0, None, repeats)
    assert counts.sum() == n and (np.abs(counts - expected) < 1 + 1e-9).all() and counts.max() <= repeats
    with pytest.raises(UserError, match="draw at most as many"):
        most = repeats * int((weights > 0).sum())
        draw(weights, np.zeros(len(c), dtype=np.int8), most + 1, False, 0, None, repeats)
