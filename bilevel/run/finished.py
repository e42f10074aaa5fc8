"""Reading a finished run: its settings, the data it was made on, and the weight of every training record.

A run writes data.json beside config.yaml when it starts: what its weights.csv belongs to.

    {"train": [{"file": ..., "path": ..., "sha256": ..., "records": ..., "samples": ...}, ...], "val": ..., "test": ...}
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from bilevel.data.json_file import parse_texts, read_bytes
from bilevel.errors import DataError, UserError, first, plain
from bilevel.files import content_hash, open_regular, whole_file
from bilevel.settings.command_line import read_yaml
from bilevel.settings.fields import Settings
from bilevel.settings.rules import validate

if TYPE_CHECKING:
    import pandas as pd

    from bilevel.data.samples import Samples

CHUNK = 1 << 20  # rows of weights.csv read at a time


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class DataFile:
    """A file of records as a run has read it.

    file: its name, as in weights.csv; path: where it was, absolute; sha256: of its bytes; samples: what its records
    became, where a long text counts once for each piece and a record without a supervised token not at all.
    """

    file: str
    path: str
    sha256: str
    records: int
    samples: int


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class DataFiles:
    """What data.json holds."""

    train: list[DataFile]
    val: list[DataFile]
    test: list[DataFile]


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a run was made on and what came of it; its training files are as they were then.

    weights: for each training file (records,) float64, c_i of its records in order, with mean 1 over all samples. A
    record of a per-source run has its source's, N p_s / n_s; one cut into pieces the mean of theirs; one that was
    dropped, as it has no supervised token within max_length, NaN (told per sample only).
    """

    folder: Path
    settings: Settings
    train: list[DataFile]
    weights: list[np.ndarray]
    per_sample: bool

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def records(self, number: int) -> Iterator[tuple[Any, str]]:
        """The records of training file `number`, parsed one at a time, each with its own text. Raises DataError."""
        path = Path(self.train[number].path)
        return parse_texts(path, read_bytes(path, self.train[number].sha256))


def write_data(folder: Path, train: "Samples", val: "Samples | None", test: "Samples | None") -> None:
    """data.json of a run that starts."""
    data = dataclasses.asdict(DataFiles(*(_files(part) if part else [] for part in (train, val, test))))
    with whole_file(folder / "data.json") as file:
        file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _files(samples: "Samples") -> list[DataFile]:
    return [
        DataFile(path.name, str(path.absolute()), sha256, records, size)
        for path, (sha256, records), size in zip(samples.files, samples.read, samples.sizes.tolist(), strict=True)
    ]


def read_finished(run: str | Path) -> FinishedRun:
    """Raises UserError where the run is not finished, or its training files or weights are not those of its start."""
    folder = Path(run)
    if not os.path.isfile(folder / "config.yaml"):
        raise UserError(f"{plain(str(run), 300)} is no run's folder: it holds no config.yaml")
    if not os.path.isfile(folder / "weights.csv"):
        raise UserError(f"{run} is not finished, as it has no weights.csv; the command that began it goes on with it")
    settings, problems = validate(read_yaml(str(folder / "config.yaml")))
    if settings is None:
        raise UserError(f"{folder / 'config.yaml'} is of another version of this tool: {problems[0]}")
    train = read_data(folder).train
    if problems := [problem for file in train if (problem := _changed(file))]:
        raise UserError("; ".join(first(problems, 10)))
    path = folder / "weights.csv"
    try:
        per_sample, weights = _read_weights(path, train)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not any(c[c > 0].size for c in weights):
        raise UserError(f"{path}: every weight is 0")
    return FinishedRun(folder, settings, train, weights, per_sample)


def read_data(folder: Path) -> DataFiles:
    """data.json of a run. Raises UserError."""
    path = folder / "data.json"
    try:
        with open_regular(path) as file:
            return TypeAdapter(DataFiles).validate_json(file.read())
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no data.json, so that nobody knows which files its weights belong to: it was made by an "
            f"earlier version; run it again with --config {folder / 'config.yaml'}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not what a run writes: {' '.join(str(error).split())}") from None


def _changed(file: DataFile) -> str | None:
    """What is wrong with a data file since the run began."""
    try:
        now = content_hash(Path(file.path))
    except DataError as error:
        return f"{error}: the run was made on it; put it back, or write its new place into data.json"
    if now == file.sha256:
        return None
    return (
        f"{file.path} is not the file that the run was made on (sha256 was {file.sha256[:12]}... and is "
        f"{now[:12]}...): put that back, or train again"
    )


def _read_weights(path: Path, train: list[DataFile]) -> tuple[bool, list[np.ndarray]]:
    """Whether a weights.csv is per sample, and the weights of each file's records. Raises UserError, ValueError."""
    import pandas as pd

    columns = set(pd.read_csv(path, nrows=0).columns)
    if {"file", "index", "weight"} <= columns:
        return True, _sample_weights(path, train)
    if {"source", "weight", "samples"} <= columns:
        return False, _source_weights(path, train)
    raise UserError(f"{path}: expected columns source, weight, samples or file, index, weight")


def _source_weights(path: Path, train: list[DataFile]) -> list[np.ndarray]:
    import pandas as pd

    dtype = {"source": str, "weight": float, "samples": np.int64}
    table = pd.read_csv(path, dtype=dtype, keep_default_na=False)
    expected = [(Path(file.file).stem, file.samples) for file in train]
    if list(zip(table["source"], table["samples"], strict=True)) != expected:
        raise _other(path, "sources or numbers of samples")
    _check(path, table["weight"])
    c = table["samples"].sum() * table["weight"] / table["samples"]
    return [np.full(file.records, weight) for file, weight in zip(train, c, strict=True)]


def _sample_weights(path: Path, train: list[DataFile]) -> list[np.ndarray]:
    import pandas as pd

    names = {file.file: number for number, file in enumerate(train)}
    sums, rows = ([np.zeros(file.records, dtype) for file in train] for dtype in (float, np.int64))
    dtype = {"file": str, "index": np.int64, "weight": float}
    reader = pd.read_csv(path, usecols=list(dtype), dtype=dtype, keep_default_na=False, chunksize=CHUNK)
    with reader as tables:
        for table in tables:
            _check(path, table["weight"])
            for name, part in table.groupby("file", sort=False):
                number, index = names.get(name), part["index"].to_numpy()
                if number is None or index.min() < 0 or index.max() >= train[number].records:
                    raise _other(path, "files or places in them")
                np.add.at(sums[number], index, part["weight"].to_numpy())
                np.add.at(rows[number], index, 1)
    if [int(counted.sum()) for counted in rows] != [file.samples for file in train]:
        raise _other(path, "numbers of samples")
    return [np.where(n > 0, total / np.maximum(n, 1), np.nan) for total, n in zip(sums, rows, strict=True)]


def _check(path: Path, weights: "pd.Series") -> None:
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise UserError(f"{path}: weights must be numbers, none negative")


def _other(path: Path, what: str) -> UserError:
    return UserError(f"{path} does not fit the data that data.json names: its {what} differ; it is of another run")
