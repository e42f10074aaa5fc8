"""Datasets of the Hugging Face hub: hub:org/name:config:split@revision, where all but the name may be missing."""

import dataclasses
import functools
import os
import re
from typing import TYPE_CHECKING

from bilevel.data.containers.errors import refusals
from bilevel.errors import DataError, short

if TYPE_CHECKING:  # imported where it is used: it takes a second, and mistakes are told at once
    import datasets

PREFIX = "hub:"
_FORM = re.compile(r"hub:(?P<name>[^:@#]+)(?::(?P<config>[^:@]*))?(?::(?P<split>[^:@]+))?(?:@(?P<revision>[^:@]+))?")


@dataclasses.dataclass(frozen=True)
class HubName:
    """The name of a dataset, which may also be a folder with a copy of it; its configuration, split and revision."""

    name: str
    config: str | None
    split: str
    revision: str | None

    @property
    def stem(self) -> str:
        return self.name.rstrip("/").rpartition("/")[2]

    @property
    def longer_stems(self) -> list[str]:
        """Names for a run that reads several parts of one dataset."""
        parts = [self.stem, self.config or "default", self.split]
        return ["_".join(parts[:2]), "_".join(parts[::2]), "_".join(parts), self.name.replace("/", "_")]


def parsed(place: str) -> HubName:
    """The parts of hub:org/name:config:split@revision. Raises DataError."""
    found = _FORM.fullmatch(place)
    if found is None:
        raise DataError(
            f"{short(place, 300)}: expected hub:org/name:config:split@revision, where all but the name may be missing "
            "(hub:org/name::test is a split of the default configuration)"
        )
    return HubName(found["name"], found["config"] or None, found["split"] or "train", found["revision"])


@functools.cache
def load(place: str) -> "datasets.Dataset":
    """The dataset, downloaded unless it is in the cache. Raises DataError that says what was looked for."""
    import datasets

    name = parsed(place)
    local = os.path.isdir(name.name)
    if local and name.revision:
        raise DataError(f"{place}: {name.name} is a folder, which has no revisions; leave @{name.revision} out")
    parts = [f"configuration {name.config}"] if name.config else []
    parts += [f"split {name.split}"] + ([f"revision {name.revision}"] if name.revision else [])
    where = "in the folder of that name" if local else "on the hub and in its cache; there is no such folder here"
    meaning = f"cannot load {name.name}, {', '.join(parts)} (looked {where})"
    datasets.disable_progress_bars()
    with refusals(place, meaning):
        return datasets.load_dataset(name.name, name.config, split=name.split, revision=name.revision)


def files(place: str) -> list[str]:
    """The files of the cache that hold the dataset. Raises DataError."""
    return [file["filename"] for file in load(place).cache_files]
