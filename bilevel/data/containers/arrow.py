"""Read what pyarrow and datasets store: Parquet, Arrow files and streams, and folders that save_to_disk wrote."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.data.containers.errors import refusals
from bilevel.errors import DataError
from bilevel.files import open_regular

if TYPE_CHECKING:  # imported where they are used: they take a second, and mistakes are told at once
    import datasets
    import pyarrow

ROWS = 1000  # rows that are Python objects at a time
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "stream"}


def kind_of(path: Path) -> str | None:
    """parquet, arrow or stream, by the first bytes of a file; None for any other. Raises DataError."""
    try:
        with open_regular(path) as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    return next((kind for mark, kind in _MAGIC.items() if head.startswith(mark)), None)


def file_items(path: Path, kind: str) -> Iterator[tuple[Any, str]]:
    """The records of a Parquet or Arrow file."""
    with refusals(str(path), "the file is damaged or cut short, or is of another kind"):
        for batch in _batches(path, kind):
            yield from _records(batch)


def _batches(path: Path, kind: str) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow

    if kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(ROWS)
        return
    with pyarrow.memory_map(str(path)) as mapped:
        if kind == "stream":
            yield from pyarrow.ipc.open_stream(mapped)
        else:
            file = pyarrow.ipc.open_file(mapped)
            yield from (file.get_batch(number) for number in range(file.num_record_batches))


def dataset_items(dataset: "datasets.Dataset") -> Iterator[tuple[Any, str]]:
    """The records of a dataset, as they are stored: images and sound are not decoded."""
    for table in dataset.with_format("arrow").iter(ROWS):
        yield from _records(table)


def _records(batch: "pyarrow.RecordBatch | pyarrow.Table") -> Iterator[tuple[Any, str]]:
    for start in range(0, batch.num_rows, ROWS):
        for record in batch.slice(start, ROWS).to_pylist():
            yield record, json.dumps(record, ensure_ascii=False, default=str)


def saved_files(place: str) -> list[str]:
    """The files of a saved dataset that hold its records or say what they are."""
    folder = _saved_folder(place)
    names = sorted(name for name in os.listdir(folder) if name.endswith((".arrow", "state.json")))
    return [os.path.join(folder, name) for name in names]


def load_saved(place: str) -> "datasets.Dataset":
    """The dataset that save_to_disk wrote into a folder. Raises DataError."""
    import datasets

    with refusals(place, "the folder is not complete"):
        return datasets.load_from_disk(_saved_folder(place))


def _saved_folder(place: str) -> str:
    """The folder of one split. Raises DataError if a place has several and names none."""
    folder, _, split = (place, "", "") if os.path.isdir(place) else place.rpartition(":")
    listing = Path(folder, "dataset_dict.json")
    if not listing.is_file():
        if split:
            raise DataError(f"{place}: {folder} holds a dataset without splits; leave :{split} out")
        return folder
    splits = json.loads(listing.read_text(encoding="utf-8"))["splits"]
    if not split and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        wrong = f"has no split {split}" if split else "holds several splits"
        raise DataError(f"{folder}: {wrong}; write {folder}:{splits[0]}, or another of {', '.join(splits)}")
    return os.path.join(folder, split)
