"""Read a finished run: its settings, its data files, and the weight of every training record.

A run writes data.json beside config.yaml when it starts. It names the files that weights.csv will belong to:

    {"train": [{"file": ..., "path": ..., "sha256": ..., "records": ..., "samples": ..., "source": ..., "places": ...,
    "take": ..., "unread": ...}, ...], "val": ..., "test": ...}
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

from bilevel.data.records import raw_records, rows_table
from bilevel.data.sources import Reading, Source, absolute
from bilevel.errors import DataError, UserError, first, plain
from bilevel.files import open_regular, whole_file
from bilevel.settings.command_line import read_yaml
from bilevel.settings.fields import Settings
from bilevel.settings.rules import validate
from bilevel.weights.csv_file import EVIDENCE, TrainingFiles, read_tables
from bilevel.weights.shares import record_weights

if TYPE_CHECKING:
    import pandas as pd

    from bilevel.data.samples import Samples


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class DataFile:
    """A source as a run has read it; most are one file.

    file: its name, as in weights.csv. path: where it was, absolute; the first of `places`, if it was several. sha256:
    the hash of its bytes. samples: the number of samples that its records became. A record can become several (a long
    text cut into pieces, chat turns with a context of their own) or none (if it has no supervised token).
    """

    file: str
    path: str
    sha256: str
    records: int
    samples: int
    source: str = ""  # its name; empty in the files of earlier versions, where it is the file's stem
    places: list[str] = dataclasses.field(default_factory=list)  # all its paths and hub names
    take: int | None = None  # number of records drawn
    unread: int = 0  # records that were left out or not drawn

    @property
    def stem(self) -> str:
        return self.source or Path(self.file).stem

    def read_by(self, settings: Settings) -> Source:
        """The source, to be read again as the run has read it."""
        return Source(self.stem, self.file, tuple(self.places or [self.path]), Reading.of(settings), self.take)


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class DataFiles:
    """The content of data.json."""

    train: list[DataFile]
    val: list[DataFile]
    test: list[DataFile]


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run's settings, data and weights; its training files are unchanged since it began.

    sources: the training files, to be read again. weights: for each training file (records,) float64, the weights c_i
    of its records in order, with mean 1 over all samples. In a per-source run a record has its source's weight
    N p_s / n_s. A record that became several samples has the mean of their weights. A record that was dropped, because
    it has no supervised token within max_length, has NaN (in per-sample runs; per source it is not recorded), as has
    one that was not read (skip_bad_records, #N). evidence: the columns of weights.csv on each source's difference and
    verdict, a row per training file; None if the run has none. harmful_share and mean_gap: those columns of
    weights.csv, as the weights; NaN where nothing is known, None if the run has none.
    """

    folder: Path
    settings: Settings
    train: list[DataFile]
    sources: list[Source]
    weights: list[np.ndarray]
    per_sample: bool
    evidence: "pd.DataFrame | None" = None
    harmful_share: list[np.ndarray] | None = None
    mean_gap: list[np.ndarray] | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def records(self, number: int) -> Iterator[tuple[Any, str]]:
        """The records of training file `number`, parsed one at a time, each with its own text. Raises DataError."""
        return raw_records(self.sources[number], self.train[number].sha256)

    def without_weight(self) -> tuple[int, int]:
        """Records that the run did not read, and those it read that have no learned token within max_length."""
        unread = sum(file.unread for file in self.train)
        return unread, sum(int(np.isnan(c).sum()) for c in self.weights) - unread

    def was_read(self, number: int) -> np.ndarray:
        """(records,) bool: which records of training file `number` the run has read."""
        file = self.train[number]
        if not file.unread:
            return np.ones(file.records, dtype=bool)
        known = np.zeros(file.records, dtype=bool)
        known[rows_table(self.sources[number])["index"].to_numpy()] = True
        return known


def write_data(folder: Path, train: "Samples", val: "Samples | None", test: "Samples | None") -> None:
    """Write data.json into the folder of a run that starts."""
    parts = {"train": train, "val": val, "test": test}
    data = {name: [_written(file) for file in _files(part)] if part else [] for name, part in parts.items()}
    with whole_file(folder / "data.json") as file:
        file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _written(file: DataFile) -> dict[str, Any]:
    """The file as an object, without what is the same for every plain file."""
    plain = DataFile(file.file, file.path, file.sha256, file.records, file.samples, Path(file.file).stem, [file.path])
    usual = dataclasses.asdict(plain)
    return {
        name: value
        for name, value in dataclasses.asdict(file).items()
        if value != usual[name] or name in ("file", "path", "sha256", "records", "samples")
    }


def _files(samples: "Samples") -> list[DataFile]:
    return [
        DataFile(
            *(source.name, absolute(source.places[0]), sha256, records, size, source.stem),
            *([absolute(place) for place in source.places], source.take, unread),
        )
        for source, (sha256, records), size, unread in zip(
            samples.files, samples.read, samples.sizes.tolist(), samples.unread, strict=True
        )
    ]


def read_finished(run: str | Path) -> FinishedRun:
    """The run in this folder. Raises UserError if it is not finished, or its training files or weights have changed."""
    folder = Path(run)
    if not os.path.isfile(folder / "config.yaml"):
        raise UserError(f"{plain(str(run), 300)} is no run's folder: it holds no config.yaml")
    if not os.path.isfile(folder / "weights.csv"):
        raise UserError(f"{run} is not finished: it has no weights.csv; the command that started it goes on with it")
    settings, problems = validate(read_yaml(str(folder / "config.yaml")))
    if settings is None:
        raise UserError(f"{folder / 'config.yaml'} is of another version of this tool: {problems[0]}")
    train = read_data(folder).train
    sources = [file.read_by(settings) for file in train]
    if problems := [problem for pair in zip(train, sources, strict=True) if (problem := _changed(*pair))]:
        raise UserError("; ".join(first(problems, 10)))
    per_sample = settings.weights == "sample"
    table = read_table(folder / "weights.csv", per_sample, train)
    weights = _record_weights(table, per_sample, train)
    evidence = table[list(EVIDENCE)] if set(EVIDENCE) <= set(table) else None
    known = [
        _per_record(table, name, train) if per_sample and name in table else None
        for name in ("harmful_share", "mean_gap")
    ]
    run = FinishedRun(folder, settings, train, sources, weights, per_sample, evidence, *known)
    for number, file in enumerate(train):
        if file.unread:
            weights[number][~run.was_read(number)] = np.nan
    return run


def read_data(folder: Path) -> DataFiles:
    """data.json of a run. Raises UserError."""
    path = folder / "data.json"
    try:
        with open_regular(path) as file:
            return TypeAdapter(DataFiles).validate_json(file.read())
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no data.json, which says which files its weights belong to: an earlier version of this "
            f"tool made it; run it again with --config {folder / 'config.yaml'}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not what a run writes: {' '.join(str(error).split())}") from None


def read_table(path: Path, per_sample: bool, train: list[DataFile]) -> "pd.DataFrame":
    """All rows and columns of a weights.csv of these training files. Raises UserError."""
    import pandas as pd

    return pd.concat(read_tables(path, per_sample, training_files(train), str(path)), ignore_index=True)


def _changed(file: DataFile, source: Source) -> str | None:
    """How a data file differs from what the run has read; None if it does not."""
    try:
        now = source.content
    except DataError as error:
        return f"{error}: the run was made on this file; put it back, or write its new path into data.json"
    if now == file.sha256:
        return None
    return (
        f"{file.path} is not the file that the run was made on (sha256 was {file.sha256[:12]}... and is "
        f"{now[:12]}...): restore that file, or train again"
    )


def training_files(train: list[DataFile]) -> TrainingFiles:
    """The training files that the weights.csv of a run must belong to."""
    samples, records = (np.array([getattr(file, name) for file in train]) for name in ("samples", "records"))
    names, sources = [file.file for file in train], [file.stem for file in train]
    return TrainingFiles(names, sources, samples, same_run=True, records=records)


def _record_weights(table: "pd.DataFrame", per_sample: bool, train: list[DataFile]) -> list[np.ndarray]:
    """The weights of each file's records, as in FinishedRun."""
    weights = table["weight"].to_numpy()
    if not per_sample:
        c = record_weights(weights, training_files(train).samples)
        return [np.full(file.records, weight) for file, weight in zip(train, c, strict=True)]
    return _per_record(table, "weight", train)


def _per_record(table: "pd.DataFrame", column: str, train: list[DataFile]) -> list[np.ndarray]:
    """The mean of a column over the samples of each file's records; NaN for records without samples."""
    import pandas as pd

    index, values = table["index"].to_numpy(), pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
    found, ends = [], training_files(train).samples.cumsum()[:-1]
    for file, places, here in zip(train, np.split(index, ends), np.split(values, ends), strict=True):
        pieces = np.bincount(places, minlength=file.records)
        sums = np.bincount(places, here, minlength=file.records)
        found.append(np.where(pieces > 0, sums / np.maximum(pieces, 1), np.nan))
    return found
