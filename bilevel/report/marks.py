"""What is known of single training records: which are noisy, and which are validation records, too."""

from typing import TYPE_CHECKING

import numpy as np

from bilevel.data.noise import known_noise
from bilevel.data.overlap import also_in, read_overlaps
from bilevel.errors import DataError
from bilevel.run.finished import DataFile, FinishedRun

if TYPE_CHECKING:
    import datasets

Mark = list[np.ndarray] | None  # per training file (records,) bool; None if nothing is known


def noisy_records(run: FinishedRun, rows: "list[datasets.Dataset]") -> Mark:
    """The records that the data call noisy."""
    noisy = known_noise([table.data.column("is_noisy") for table in rows])
    return [_of_all_records(*each) for each in zip(noisy, rows, run.weights, strict=True)] if noisy else None


def shared_with_validation(run: FinishedRun, rows: "list[datasets.Dataset]", val: list[DataFile]) -> Mark:
    """The records that are validation records, too; None if there is none, or if those files have changed."""
    overlaps = [one for one in read_overlaps(run.folder) if (one.first, one.second) == ("train", "val")]
    others = [file.read_by(run.settings) for file in val]
    try:
        if not overlaps or any(file.sha256 != other.content for file, other in zip(val, others, strict=True)):
            return None
    except DataError:  # the files are not there any more
        return None
    found = [also_in(source, others) for source in run.sources]
    return [_of_all_records(*each) for each in zip(found, rows, run.weights, strict=True)]


def _of_all_records(marked: np.ndarray, rows: "datasets.Dataset", c: np.ndarray) -> np.ndarray:
    """(records,) bool, from (rows,) bool; False for the records that were not read."""
    found = np.zeros(len(c), dtype=bool)
    found[rows.data.column("index").to_numpy()] = marked
    return found
