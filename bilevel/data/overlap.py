"""Find files and records that are in two parts of a run's data: val and test must not be trained on."""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from bilevel.data.records import row_hashes, rows_table
from bilevel.data.sources import Source
from bilevel.errors import UserError, plain
from bilevel.files import open_regular, whole_file

if TYPE_CHECKING:  # imported where it is used: mistakes are told at once
    import numpy as np

EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Records of part `second` that are also in part `first`, equal except for white space.

    count of `total` records in `second`; examples: [file, record, file of `first`, record there].
    """

    first: str
    second: str
    count: int
    total: int
    examples: list[tuple[str, int, str, int]]

    @property
    def amount(self) -> str:
        return f"{self.count:,} of {self.total:,} {self.second} records stand in {self.first} too"

    @property
    def places(self) -> list[str]:
        """The examples in words."""
        return [f"{file} record {a} is {other} record {b}" for file, a, other, b in self.examples]

    def __str__(self) -> str:
        return f"{self.amount}, such as {'; '.join(self.places)}"


def shared_files(files: dict[str, list[Source]]) -> list[str]:
    """A problem for every file that is in two parts (train, val, test)."""
    problems = []
    for (first, ours), (second, theirs) in itertools.combinations(files.items(), 2):
        real = {os.path.realpath(place) for source in ours for place in source.places}
        problems += [
            f"{second}_data: {file} is in {first}_data too, and no file can be both; name the files of {first}_data, "
            "or give a pattern that leaves it out"
            for file in dict.fromkeys(place for source in theirs for place in source.places)
            if os.path.realpath(file) in real
        ]
    return problems


def find_overlaps(files: dict[str, list[Source]]) -> list[Overlap]:
    """An Overlap for each pair of parts with records in common. Records are compared by 64-bit hashes."""
    import numpy as np

    hashes = {part: [row_hashes(file) for file in each] for part, each in files.items() if each}
    found = []
    for first, second in itertools.combinations(hashes, 2):
        known, asked = (np.concatenate(hashes[part]) for part in (first, second))
        common = np.flatnonzero(np.isin(asked, known))
        if len(common):
            examples = [
                (*_place(files[second], hashes[second], i), *_place(files[first], hashes[first], j))
                for i in common[:EXAMPLES].tolist()
                for j in np.flatnonzero(known == asked[i])[:1].tolist()
            ]
            found.append(Overlap(first, second, len(common), len(asked), examples))
    return found


def also_in(file: Source, others: list[Source]) -> "np.ndarray":
    """(rows,) bool: which rows of the file are also in one of the others, equal except for white space."""
    import numpy as np

    return np.isin(row_hashes(file), np.concatenate([row_hashes(other) for other in others]))


def write_overlaps(folder: Path, overlaps: list[Overlap]) -> None:
    """Write overlap.json into a run's folder: a list of Overlaps as objects, empty if no record is in two parts."""
    with whole_file(folder / "overlap.json") as file:
        file.write_text(json.dumps([dataclasses.asdict(one) for one in overlaps], indent=1) + "\n", encoding="utf-8")


def read_overlaps(folder: Path) -> list[Overlap]:
    """The overlaps in overlap.json; none if there is no such file. Raises UserError."""
    path = folder / "overlap.json"
    try:
        with open_regular(path) as file:
            return TypeAdapter(list[Overlap]).validate_json(file.read())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{path} is not what a run writes: {plain(words, 300)}; put it back, or remove it") from None


def _place(files: list[Source], hashes: "list[np.ndarray]", number: int) -> tuple[str, int]:
    """The file of a record, and its place in that file, from the number of its row over all files."""
    for file, each in zip(files, hashes, strict=True):
        if number < len(each):
            return file.name, rows_table(file)["index"][number].as_py()
        number -= len(each)
    raise AssertionError(number)
