"""data_alpaca_0.5/process.py: counts, splits, what each corruption does, sources and their errors."""

import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from process_helpers import (
    CORRUPTIONS,
    FILES,
    FOLDER,
    RESPONSES,
    contents,
    keys,
    load_program,
    make,
    records,
    sample,
    write_source,
)


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_counts_split_and_marks(program, source, tmp_path, corruption):
    flags = ("--corruption", corruption, "--corruption_rate", 0.3, "--val_fraction", 0.2)
    made = make(program, source, tmp_path / "out", *flags)
    clean, noisy, val, test, mixed = (made[name] for name in FILES)
    # 103 records: round(20.6) = 21 for validation, round(10.3) = 10 for test, round(72 * 0.3) = 22 corrupted
    assert [len(part) for part in (clean, noisy, val, test, mixed)] == [50, 22, 21, 10, 72]
    parts = [keys(part) for part in (clean, noisy, val, test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 103
    assert all(row["is_noisy"] is False for row in clean) and all(row["is_noisy"] is True for row in noisy)

    def as_text(rows):
        return sorted(json.dumps(row) for row in rows)

    assert as_text(mixed) == as_text(clean + noisy)
    flips = sum(a["is_noisy"] != b["is_noisy"] for a, b in zip(mixed, mixed[1:], strict=False))
    assert flips > 10, "the mixed file is in blocks"
    original = {row["instruction"]: row for row in sample()}
    for row in val + test:
        assert row == original[row["instruction"]]
    for row in clean:
        assert row == original[row["instruction"]] | {"is_noisy": False}
    for row in noisy:
        assert row == original[row["instruction"]] | {"is_noisy": True, "output": row["output"]}


@pytest.mark.parametrize(("rate", "n_noisy"), [(0, 0), (0.004, 0), (0.5, 42), (0.77, 64), (1, 83)])
def test_exactly_the_rounded_number_is_corrupted(program, source, tmp_path, rate, n_noisy):
    made = make(program, source, tmp_path / "out", "--corruption_rate", rate)
    counts = Counter(row["is_noisy"] for row in made["mixed/train_mixed.json"])
    assert (counts[True], counts[False]) == (n_noisy, 83 - n_noisy)
    assert len(made.get("train_noisy.json", [])) == n_noisy
    assert ("train_noisy.json" in made) == (n_noisy > 0) and ("train_clean.json" in made) == (n_noisy < 83)


def corrupted_pairs(program, source, out, corruption) -> list[tuple[str, str]]:
    """(original, corrupted) response of every training record."""
    original = {row["instruction"]: row["output"] for row in records(source)}
    made = make(program, source, out, "--corruption", corruption, "--corruption_rate", 1)
    return [(original[row["instruction"]], row["output"]) for row in made["train_noisy.json"]]


def test_empty_and_dot(program, source, tmp_path):
    assert {after for _, after in corrupted_pairs(program, source, tmp_path / "a", "empty")} == {""}
    assert {after for _, after in corrupted_pairs(program, source, tmp_path / "b", "dot")} == {"."}


def test_shuffle_takes_other_responses(program, source, tmp_path):
    pairs = corrupted_pairs(program, source, tmp_path / "out", "shuffle")
    assert {after for _, after in pairs} <= {before for before, _ in pairs}
    assert all(before != after for before, after in pairs)
    assert len({after for _, after in pairs}) > 5


def test_shuffle_finds_the_one_different_response(program, tmp_path):
    rows = [{"instruction": str(i), "output": "rare" if i == 7 else "same"} for i in range(20)]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    out, flags = tmp_path / "out", ("--val_fraction", 0, "--test_fraction", 0, "--corruption_rate", 1)
    noisy = make(program, tmp_path / "s.json", out, "--corruption", "shuffle", *flags)["train_noisy.json"]
    assert all(row["output"] == ("same" if row["instruction"] == "7" else "rare") for row in noisy)


def test_truncate_keeps_a_proper_beginning(program, source, tmp_path):
    pairs = corrupted_pairs(program, source, tmp_path / "out", "truncate")
    for before, after in pairs:
        assert before.startswith(after)
        assert 1 <= len(after) < len(before) if len(before) >= 2 else after == ""
    assert len({len(after) for before, after in pairs if before == RESPONSES[6]}) > 3, "always the same cut"


def test_words_are_permuted(program, source, tmp_path):
    pairs = corrupted_pairs(program, source, tmp_path / "out", "words")
    for before, after in pairs:
        assert sorted(after.split()) == sorted(before.split())
        assert (after.split() == before.split()) == (len(set(before.split())) < 2)
    unchanged = records(tmp_path / "out" / "process.json")["unchanged_by_corruption"]
    assert unchanged == sum(before == after for before, after in pairs) > 0


def test_same_seed_same_bytes_other_seed_other_split(program, source, tmp_path):
    for corruption in CORRUPTIONS:
        for name, seed in (("a", 3), ("b", 3), ("c", 4)):
            make(program, source, tmp_path / corruption / name, "--seed", seed, "--corruption", corruption)
        a, b, c = (contents(tmp_path / corruption / name) for name in "abc")
        assert a == b and set(a) == {*FILES, "process.json"}
        assert all(a[name] != c[name] for name in FILES)


def test_split_does_not_depend_on_rate_or_corruption(program, source, tmp_path):
    reference = make(program, source, tmp_path / "reference", "--corruption_rate", 0.5)
    for corruption in CORRUPTIONS:
        made = make(program, source, tmp_path / corruption, "--corruption", corruption, "--corruption_rate", 0.2)
        assert made["val.json"] == reference["val.json"] and made["test.json"] == reference["test.json"]
        assert keys(made["train_noisy.json"]) < keys(reference["train_noisy.json"])


def test_files_are_arrays_of_one_record_per_line(program, source, tmp_path):
    make(program, source, tmp_path / "out")
    text = (tmp_path / "out" / "mixed" / "train_mixed.json").read_text(encoding="utf-8")
    first, *rows, last = text.splitlines()
    assert (first, last) == ("[", "]") and len(rows) == 83 and "é" in text
    assert all(isinstance(json.loads(row.removesuffix(",")), dict) for row in rows)


def test_json_lines_and_optional_input(program, tmp_path):
    rows = [{"instruction": f"q{i}", "output": "x y"} | ({"input": None} if i % 2 else {}) for i in range(20)]
    path = tmp_path / "source.jsonl"
    path.write_text("\r\n".join(json.dumps(row) for row in rows) + "\n\n")
    made = make(program, path, tmp_path / "out")
    assert len(made["mixed/train_mixed.json"]) == 16
    assert {row["input"] for part in made.values() for row in part} == {""}


def test_hub_source(program, tmp_path, monkeypatch):
    import datasets

    def load_dataset(name, split):
        assert (name, split) == ("someone/some-set", "train")
        return datasets.Dataset.from_list(sample(40))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = make(program, "someone/some-set", tmp_path / "out")
    assert len(made["mixed/train_mixed.json"]) == 32
    assert records(tmp_path / "out" / "process.json")["source"]["name"] == "someone/some-set"


GOOD = {"instruction": "q", "input": "", "output": "a"}
BAD_SOURCES = {
    "not JSON": ("[{]", ["source.json", "not JSON"]),
    "bad line": ('{"instruction": "q", "output": "a"}\n{"instr', ["source.json", "line 2"]),
    "empty file": ("", ["source.json", "no records"]),
    "empty array": ("[]", ["source.json", "no records"]),
    "not an object": (json.dumps([GOOD, "text"]), ["source.json", "record 1", "not an object"]),
    "missing output": (json.dumps([GOOD, GOOD, {"instruction": "q"}]), ["source.json", "record 2", "'output'"]),
    "missing instruction": (json.dumps([{"output": "a"}]), ["record 0", "'instruction'"]),
    "output is a number": (json.dumps([GOOD | {"output": 5}]), ["record 0", "'output'", "5"]),
    "input is a list": (json.dumps([GOOD | {"input": []}]), ["record 0", "'input'"]),
    "half a surrogate": (json.dumps([GOOD | {"output": "\ud800"}]), ["record 0", "UTF-8"]),
    "not a number": ('[{"instruction": "q", "output": "a", "score": NaN}]', ["record 0", "JSON"]),
    "already processed": (json.dumps([GOOD | {"is_noisy": True}]), ["record 0", "is_noisy"]),
    "too few": (json.dumps([GOOD]), ["none of the 1 records for training"]),
}
BAD_FLAGS = {
    "rate above 1": (["--corruption_rate", "1.5"], ["corruption_rate", "1.5"]),
    "rate below 0": (["--corruption_rate", "-0.1"], ["corruption_rate", "-0.1"]),
    "rate not a number": (["--corruption_rate", "nan"], ["corruption_rate", "nan"]),
    "negative fraction": (["--val_fraction", "-0.5"], ["val_fraction", "-0.5"]),
    "nothing left": (["--val_fraction", "0.5", "--test_fraction", "0.5"], ["val_fraction", "test_fraction"]),
    "two problems": (["--val_fraction", "2", "--corruption", "x"], ["val_fraction", "corruption 'x'"]),
    "unknown corruption": (["--corruption", "typo"], ["typo", *CORRUPTIONS]),
    "no such file": (["--source", "nowhere/at/all.json"], ["all.json", "does not exist"]),
    "a folder": (["--source", str(FOLDER)], [FOLDER.name, "not a file"]),
}


def fails(program, capsys, flags: list[str], out: Path, expected: list[str]) -> None:
    assert program.main([*flags, "--out", str(out)]) == 2
    output = capsys.readouterr()
    assert all(text in output.err for text in expected), output.err
    assert output.err.count("\n") == 1 and not output.out
    assert not out.exists()


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_source(program, tmp_path, capsys, case):
    text, expected = BAD_SOURCES[case]
    (tmp_path / "source.json").write_text(text)
    flags = ["--source", str(tmp_path / "source.json"), "--val_fraction", "0.8"]
    fails(program, capsys, flags, tmp_path / "out", expected)


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(program, source, tmp_path, capsys, case):
    flags, expected = BAD_FLAGS[case]
    fails(program, capsys, ["--source", str(source), *flags], tmp_path / "out", expected)


def test_source_not_utf8(program, tmp_path, capsys):
    (tmp_path / "source.json").write_bytes(b'[{"instruction": "\xff"}]')
    fails(program, capsys, ["--source", str(tmp_path / "source.json")], tmp_path / "out", ["source.json"])


def test_hub_out_of_reach(program, tmp_path, capsys, monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise ConnectionError("no network\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fails(program, capsys, ["--source", "some/set"], tmp_path / "out", ["some/set", "no network", ".jsonl"])
