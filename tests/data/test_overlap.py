"""bilevel/data/overlap.py: files and records that stand in more than one part of the data."""

import json
from collections.abc import Callable
from pathlib import Path

from bilevel.data.overlap import find_overlaps, read_overlaps, shared_files, write_overlaps
from bilevel.data.sources import file_source

Write = Callable[..., Path]


def alpaca(*numbers: int, space: str = " ") -> list[dict]:
    return [{"instruction": f"Add{space}{n}", "output": str(n)} for n in numbers]


def test_a_file_in_two_parts(write: Write, tmp_path: Path) -> None:
    one, val = write("web.jsonl", alpaca(1)), write("val.jsonl", alpaca(2))
    link = tmp_path / "link" / "other.jsonl"
    link.parent.mkdir()
    link.symlink_to(val)
    one, val, link = map(file_source, (one, val, link))
    [problem] = shared_files({"train": [one, val], "val": [link], "test": []})
    assert problem.startswith(f"val_data: {link} is in train_data too")
    assert not shared_files({"train": [one], "val": [val]})


def test_records_in_common_are_counted_with_examples(write: Write, tmp_path: Path) -> None:
    files = {
        "train": [write("a.json", alpaca(1, 2)), write("b.json", alpaca(3, 4, 5))],
        "val": [write("v.json", alpaca(4, space="\n  ") + alpaca(9, 5))],
        "test": [write("t.json", alpaca(7, 8))],
    }
    files = {part: list(map(file_source, paths)) for part, paths in files.items()}
    [overlap] = found = find_overlaps(files)
    assert (overlap.first, overlap.second, overlap.count, overlap.total) == ("train", "val", 2, 3)
    assert str(overlap) == (
        "2 of 3 val records stand in train too, such as v.json record 0 is b.json record 1; "
        "v.json record 2 is b.json record 2"
    )
    write_overlaps(tmp_path, found)
    assert [str(one) for one in read_overlaps(tmp_path)] == [str(overlap)]
    assert json.loads((tmp_path / "overlap.json").read_text())[0]["count"] == 2
    assert find_overlaps(files | {"val": []}) == [] == read_overlaps(tmp_path / "gone")
