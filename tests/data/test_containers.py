"""bilevel/data/containers and sources: where data are; each row of the table "Where data are" in docs/your-data.md."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from run_helpers import ROOT
from tokenizer_kinds import tokenizer_of

from bilevel.data.bad_records import BadRecords
from bilevel.data.overlap import shared_files
from bilevel.data.records import read_rows, records_of, row_notes
from bilevel.data.samples import load_samples
from bilevel.data.sources import Reading, Source, find_sources
from bilevel.data.tokenise import Tokeniser
from bilevel.errors import DataError

Write = Callable[..., Path]
CHAT = [{"role": "user", "content": "q, 1"}, {"role": "assistant", "content": 'an "answer"\nof two lines'}]
RECORDS = [{"question": f"q, {i}", "answer": f'an "answer"\nof two lines {i}', "is_noisy": i == 1} for i in range(3)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
EXPECTED = [[record["question"], record["answer"]] for record in RECORDS]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def table_text(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(RECORDS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue().encode()


def arrow(new: Callable) -> bytes:
    table, content = pyarrow.Table.from_pylist(RECORDS), io.BytesIO()
    with new(content, table.schema) as writer:
        writer.write_table(table)
    return content.getvalue()


def parquet() -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), content := io.BytesIO())
    return content.getvalue()


FILES = {
    "a.jsonl": LINES,
    "a.json": json.dumps(RECORDS).encode(),
    "pretty.json": "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
    "lmflow.json": json.dumps({"type": "text2text", "instances": RECORDS}).encode(),
    "lmflow-pretty.json": json.dumps({"type": "text2text", "instances": RECORDS}, indent=1).encode(),
    "lmflow-turned.json": json.dumps({"instances": RECORDS, "type": "text2text"}).encode(),
    "a.csv": table_text(","),
    "semicolon.csv": b"\xef\xbb\xbf" + table_text(";"),
    "a.tsv": table_text("\t"),
    "a.csv.gz": gzip.compress(table_text(",")),
    "a.jsonl.gz": gzip.compress(LINES),
    "two-parts.jsonl.gz": gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]),
    "named-json.json": gzip.compress(LINES),
    "a.jsonl.zst": zstd(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.json.xz": lzma.compress(json.dumps(RECORDS).encode()),
    "a.parquet": parquet(),
    "a.arrow": arrow(pyarrow.ipc.new_file),
    "stream.arrow": arrow(pyarrow.ipc.new_stream),
}


def texts(source: Source) -> list[list[str]]:
    return read_rows(source)["contents"][:]


def refusal(*data: str, **reading: object) -> str:
    with pytest.raises(DataError) as caught:
        for source in find_sources(list(data), Reading(**reading)):
            read_rows(source)
    return str(caught.value)


# containers


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    [source] = find_sources([str(tmp_path / name)])
    assert texts(source) == EXPECTED and source.stem == name.split(".")[0]
    assert read_rows(source)["is_noisy"][:] == [False, True, False]


def test_the_table_of_the_docs_names_every_ending() -> None:
    page = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8").split("## Where data are")[1].split("\n## ")[0]
    missing = [name for name in FILES if not all(f".{part}" in page for part in name.split(".")[1:])]
    assert not missing and "save_to_disk" in page and "hub:" in page and "LMFlow" in page


def test_saved_datasets(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(RECORDS)
    whole.save_to_disk(tmp_path / "mine")
    [source] = find_sources([str(tmp_path / "mine")])
    assert texts(source) == EXPECTED and source.stem == "mine"
    datasets.DatasetDict({"train": whole, "test": whole.select([2])}).save_to_disk(tmp_path / "split")
    assert texts(find_sources([f"{tmp_path}/split:test"])[0]) == EXPECTED[2:]
    assert f"holds several splits; write {tmp_path}/split:" in refusal(f"{tmp_path}/split")
    assert "has no split val; write" in refusal(f"{tmp_path}/split:val")
    assert "without splits; leave :train out" in refusal(f"{tmp_path}/mine:train")
    datasets.DatasetDict({"train": whole}).save_to_disk(tmp_path / "one")
    assert texts(find_sources([f"{tmp_path}/one"])[0]) == EXPECTED


def test_a_copy_of_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "org" / "sums"
    copy.mkdir(parents=True)
    (copy / "train.jsonl").write_bytes(LINES)
    (copy / "test.jsonl").write_bytes(LINES.splitlines()[2])
    (copy / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: test\n    path: test.jsonl\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    [source] = find_sources(["hub:org/sums:main"])
    assert texts(source) == EXPECTED and source.stem == "sums"
    both = find_sources(["hub:org/sums:main:test", "hub:org/sums:main:train"])
    assert [(s.stem, texts(s)) for s in both] == [("sums_test", EXPECTED[2:]), ("sums_train", EXPECTED)]
    text = refusal("hub:org/sums:socratic")
    assert "cannot load org/sums, configuration socratic, split train (looked in the folder of that name)" in text
    assert "a folder, which has no revisions; leave @abc out" in refusal("hub:org/sums:main@abc")
    assert "expected hub:org/name:config:split@revision" in refusal("hub:a:b:c:d")


def test_chats_in_tables(tmp_path: Path) -> None:
    """Messages are text in CSV; in Parquet each has the fields of all, null where it has none."""
    two = [{"messages": CHAT}, {"messages": [{**CHAT[0], "name": "Ann"}, {**CHAT[1], "weight": 1}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(two), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text('messages\n"' + json.dumps(CHAT).replace('"', '""') + '"\n')
    expected = [message["content"] for message in CHAT]
    sources = find_sources([f"{tmp_path}/a.parquet", f"{tmp_path}/b.csv"])
    assert [texts(source) for source in sources] == [[expected] * 2, [expected]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"question,answer\nq,a\nq\n", "record 1: has 1 cells, but the header has 2"),
        ("a.csv", b'question,answer\nq,"a\n', "not CSV"),
        ("a.csv", b"question,question\nq,a\n", "the header has 'question' twice"),
        ("a.csv", b"\n", "holds no record"),
        ("a.csv", b"question,answer\n", "holds no record"),
        ("a.csv", "question,answer\nq,\u00e9\n".encode("latin-1"), "not UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-10], "damaged or cut short"),
        ("a.jsonl.gz", gzip.compress(LINES)[:20] + b"x" * 40, "damaged or cut short"),
        ("a.jsonl.zst", zstd(LINES)[:-10], "damaged or cut short"),
        ("a.json.xz", lzma.compress(LINES)[:-20], "damaged or cut short"),
        ("a.parquet", parquet()[:-10], "damaged or cut short"),
        (
            "a.json",
            b'{"type": "text_only", "instances": [{"text": "a"}], "more": 1}',
            "text after the end of 'instances'",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    text = refusal(str(tmp_path / name))
    assert words in text and str(tmp_path / name) in text


def test_old_line_ends(tmp_path: Path) -> None:
    for number, data in enumerate((LINES.replace(b"\n", b"\r"), LINES.replace(b"\n", b"\r\n"), b"\n \n" + LINES)):
        (tmp_path / f"{number}.jsonl").write_bytes(data)
    assert [texts(source) for source in find_sources([f"{tmp_path}/*.jsonl"])] == [EXPECTED] * 3


# names of sources


def test_a_folder_is_one_source(tmp_path: Path) -> None:
    for name in ("web/a.jsonl", "web/deep/b.json.gz", "web/README.md", "web/.hidden/c.jsonl", "forum/a.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "web/a.jsonl").write_bytes(LINES)
    (tmp_path / "web/deep/b.json.gz").write_bytes(FILES["a.json.xz"])
    (tmp_path / "web/README.md").write_text("no data")
    (tmp_path / "web/.hidden/c.jsonl").write_text("no data")
    (tmp_path / "forum/a.csv").write_bytes(FILES["a.csv"])
    forum, web = find_sources([f"{tmp_path}/web/", f"{tmp_path}/forum"])
    assert (web.stem, forum.stem, len(web.places), texts(web)) == ("web", "forum", 2, EXPECTED * 2)
    assert read_rows(web)["index"][:] == [0, 1, 2, 3, 4, 5]
    assert [source.stem for source in find_sources([f"{tmp_path}/*"])] == ["forum", "web"]
    (tmp_path / "loose.jsonl").write_bytes(LINES)
    assert [source.stem for source in find_sources([f"{tmp_path}/*"])] == ["loose"]  # a pattern prefers files


def test_one_file_name_in_every_folder(tmp_path: Path) -> None:
    for name in ("web/train.jsonl", "forum/train.jsonl", "web/other.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    found = find_sources([f"{tmp_path}/**/*.jsonl"])
    assert [(s.stem, s.name) for s in found] == [
        ("forum", "forum/train.jsonl"), ("other", "other.jsonl"), ("web", "web/train.jsonl"),
    ]  # fmt: skip
    for name in ("web/valid.jsonl", "forum/valid.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    stems = [source.stem for source in find_sources([f"{tmp_path}/*/train.jsonl", f"{tmp_path}/*/valid.jsonl"])]
    assert stems == ["forum", "forum_valid", "web", "web_valid"]


def test_named_sources(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    math, web = find_sources({"web": [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], "math": [f"{tmp_path}/c.jsonl"]})
    assert (web.stem, texts(web), math.stem, texts(math)) == ("web", EXPECTED * 2, "math", EXPECTED)
    samples = load_samples([math, web], Tokeniser(tokenizer_of("gpt2"), 64, "response"))
    assert samples.sources == ["math", "web"] and samples.sizes.tolist() == [3, 6]
    assert samples.records(slice(None)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert samples.tokens[3:6]["input_ids"] == samples.tokens[6:9]["input_ids"]


def test_a_part_of_a_source_by_seed(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(50)))
    drawn = {}
    for seed in (0, 1):
        [source] = find_sources([f"{tmp_path}/a.jsonl#20"], Reading(seed=seed))
        index = read_rows(source)["index"][:]
        assert texts(source) == [[f"a.jsonl {i}"] for i in index] and index == sorted(set(index)) and len(index) == 20
        assert records_of(source) == 50 and read_rows(source)["index"][:] == index
        drawn[seed] = index
    assert drawn[0] != drawn[1]
    [both] = find_sources({"both": [f"{tmp_path}/*.jsonl#70"]})
    assert len(texts(both)) == 70 and records_of(both) == 100 and max(read_rows(both)["index"][:]) > 50
    samples = load_samples([both], Tokeniser(tokenizer_of("gpt2"), 64, "response"))
    assert samples.records(slice(None)).tolist() == read_rows(both)["index"][:] and samples.unread == [30]
    assert "#51 asks for more records than it has, 50" in refusal(f"{tmp_path}/a.jsonl#51")
    assert "#0 takes no record" in refusal(f"{tmp_path}/a.jsonl#0")
    (tmp_path / "odd#3").write_bytes(LINES)
    assert texts(find_sources([f"{tmp_path}/odd#3"])[0]) == EXPECTED


def test_what_does_not_exist_is_named_with_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web.jsonl").write_bytes(LINES)
    assert f"no file matches 'wbe.jsonl' (looked in {tmp_path}); . holds web.jsonl" in refusal("wbe.jsonl")
    assert "there is no folder data" in refusal("data/*.jsonl")
    assert "for a dataset of the hub write hub:openai/gsm8k" in refusal("openai/gsm8k")
    (tmp_path / "empty").mkdir()
    assert "empty: no file matches *.json, *.jsonl" in refusal("empty")


def test_a_file_of_a_folder_in_two_parts(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "val.jsonl").write_bytes(LINES)
    files = {"train": find_sources([f"{tmp_path}/in"]), "val": find_sources([f"{tmp_path}/in/val.jsonl"])}
    [problem] = shared_files(files)
    assert problem.startswith(f"val_data: {tmp_path}/in/val.jsonl is in train_data too")


# dirty files


@pytest.fixture
def dirty(tmp_path: Path) -> list[Path]:
    lines = [json.dumps({"text": f"t{i}"}) for i in range(40)]
    lines[3], lines[5], lines[39] = '{"text": 3}', '{"text": "cut', json.dumps({"text": None})
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text("\n".join(lines))
    return files


def test_all_bad_records_are_told_at_once(dirty: list[Path]) -> None:
    for file in dirty:
        with pytest.raises(BadRecords) as caught:
            read_rows(find_sources([str(file)], Reading(skip_bad_records=2))[0])
        lines = str(caught.value).splitlines()
        assert [line.split(":")[0] for line in lines] == [f"{file}, record {i}" for i in (3, 5, 39)]
    dirty[0].write_text('{"text": 1}\n' * 50 + '{"text": "good"}\n')
    named = f"{dirty[0]}, records 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 40 more: 'text' must be text, got int 1"
    assert refusal(str(dirty[0])) == named


def test_each_kind_of_problem_has_a_line_and_no_record_is_lost() -> None:
    """Records with the same problem share a line; the lines and their last one count all that cannot be read."""
    kinds = [f"a.json, record {i}: got {i % 30}" for i in range(90)]
    *lines, last = str(BadRecords(kinds, len(kinds))).splitlines()
    assert lines[:2] == ["a.json, records 0, 30 and 60: got 0", "a.json, records 1, 31 and 61: got 1"]
    assert len(lines) == 20 and last == "and 30 more"
    same = BadRecords([f"a.json, record {i}: got 1" for i in range(5000)] + ["b.json: no"], 5001)
    assert str(same).endswith("and 4,001 more") and len(same.lines) == 1000, "those that are not remembered count"
    assert str(BadRecords(["a.json: no record", "a.json: no record", "a.json, record 3, message 4: x"], 3)) == (
        "a.json: no record\na.json, record 3, message 4: x"
    )


def test_bad_records_are_left_out_and_named(dirty: list[Path]) -> None:
    sources = find_sources(list(map(str, dirty)), Reading(skip_bad_records=3))
    samples = load_samples(sources, Tokeniser(tokenizer_of("gpt2"), 64, "response"))
    places = [i for i in range(40) if i not in (3, 5, 39)]
    assert samples.records(slice(None)).tolist() == places * 2 and samples.unread == [3, 3]
    assert [read[1] for read in samples.read] == [40, 40] and samples.dropped == [0, 0]
    for source, file, notes in zip(sources, dirty, samples.notes, strict=True):
        assert notes == row_notes(source)
        assert notes[0].startswith(f"3 left out (skip_bad_records): {file}, record 3: 'text' must be text, got int 3;")
        assert f"{file}, record 5: not JSON" in notes[0] and f"{file}, record 39: " in notes[0]
    # What was read with bad records left out is not read by a run that leaves none out.
    with pytest.raises(BadRecords):
        read_rows(find_sources([str(dirty[0])])[0])


def test_a_file_without_a_good_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{"other": 2}\n')
    assert "record 0: 'text' must be text" in refusal(f"{tmp_path}/a.jsonl", skip_bad_records=9)


def test_one_changed_file_of_a_folder_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel.data.containers import kinds

    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{tmp_path} {name}"}}\n')
    read, original = [], kinds.unparsed

    def unparsed(place: str, content: str, seen: object) -> object:
        read.append(Path(place).name)
        return original(place, content, seen)

    monkeypatch.setattr(kinds, "unparsed", unparsed)
    assert len(texts(find_sources([str(tmp_path)])[0])) == 3 and read == ["a.jsonl", "b.jsonl", "c.jsonl"]
    (tmp_path / "b.jsonl").write_text('{"text": "other"}\n')
    assert texts(find_sources([str(tmp_path)])[0])[1] == ["other"] and read[3:] == ["b.jsonl"]


def test_a_plain_file_keeps_its_hash_and_its_key(tmp_path: Path) -> None:
    """So that weights, checkpoints and caches of a file stay those of its bytes."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    [source] = find_sources([f"{tmp_path}/a.jsonl"])
    assert source.content == hashlib.sha256(LINES).hexdigest() and Reading().key == "auto"
    assert np.array_equal(read_rows(source)["index"][:], [0, 1, 2])
