"""What the data settings name -> sources: files, folders, saved datasets and datasets of the hub, each with a name.

A list names files, patterns, folders and hub datasets. Each is a source of its own, called by its file's stem, by its
folder or by the dataset's name. A mapping gives the names: {web: [a.jsonl, b.jsonl], math: hub:org/name}.
"""

import collections
import dataclasses
import functools
import glob
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from bilevel.data.containers.hub import PREFIX, HubName, parsed
from bilevel.data.containers.kinds import ENDINGS, SAVED, content_of, holds_saved, stem_of
from bilevel.errors import DataError, first, plain, short
from bilevel.settings.fields import Settings

_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]+")  # what csv files, logs and Arrow can hold
_TAKE = re.compile(r"(.+)#(\d+)", re.DOTALL)
FORMULA = "=+-@"  # as the first character in a cell of weights.csv


@dataclasses.dataclass(frozen=True)
class Reading:
    """The settings that say how records are read; all are explained in bilevel.settings.fields."""

    format: str = "auto"
    fields: tuple[tuple[str, str], ...] = ()
    prompt_suffix: str | None = None
    skip_bad_records: int = 0
    seed: int = 0
    filters: tuple[str, ...] = ()
    max_characters: int | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Reading":
        same = ("format", "prompt_suffix", "skip_bad_records", "seed", "max_characters")
        given = {name: getattr(settings, name) for name in same} | {"filters": tuple(sorted(settings.filters))}
        return cls(fields=tuple(sorted((settings.fields or {}).items())), **given)

    @property
    def key(self) -> str:
        """Changes with whatever changes the rows of a file."""
        more = [repr(self.fields), repr(self.prompt_suffix)] if self.fields or self.prompt_suffix else []
        more += [repr(self.filters), repr(self.max_characters)] if self.filters or self.max_characters else []
        return " ".join([self.format, *more])


@dataclasses.dataclass(frozen=True)
class Source:
    """Records that share one name. As of a Path, `stem` is the source's name and `name` that of its file.

    stem: the source's name in metrics.csv and messages. name: what weights.csv calls it in the column `file`.
    places: paths and hub names, read one after the other. take: number of records drawn by seed; None for all.
    """

    stem: str
    name: str
    places: tuple[str, ...]
    reading: Reading = Reading()
    take: int | None = None

    def __str__(self) -> str:
        more = len(self.places) - 1
        return self.places[0] + (f" (and {more} more files of source {self.stem})" if more else "")

    @property
    def content(self) -> str:
        """SHA-256 of the file's bytes, or of the hashes of several files. Raises DataError."""
        hashes = [content_of(place) for place in self.places]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def file_source(path: str | Path, reading: Reading = Reading()) -> Source:
    """One file as a source, named by its stem."""
    return Source(stem_of(str(path)), Path(path).name, (str(path),), reading)


def absolute(place: str) -> str:
    """The place as it can be read from any folder."""
    if not place.startswith(PREFIX):
        return os.path.abspath(place)
    name, mark, rest = place.removeprefix(PREFIX).partition(":")
    return f"{PREFIX}{os.path.abspath(name)}{mark}{rest}" if os.path.isdir(name) else place


def find_sources(data: list[str] | dict[str, list[str]], reading: Reading = Reading()) -> list[Source]:
    """All sources of a data setting, sorted by name. Raises DataError listing every problem.

    A file under two names is two sources; links to it with the same name are one.
    """
    problems: list[str] = []
    if isinstance(data, dict):
        found = [_named(name, entries, reading, problems) for name, entries in data.items()]
    else:
        found = _unnamed(data, reading, problems)
    for source in found:
        problems += _bad_name(source)
    if problems:
        raise DataError("; ".join(first(problems, 10)))
    return sorted(found, key=lambda source: source.stem)


def _named(name: str, entries: list[str], reading: Reading, problems: list[str]) -> Source:
    """The source that a mapping names, with the files of all its entries in order."""
    places, takes = [], []
    for entry in entries:
        found, take = _places(entry, problems)
        takes.append(take)
        for place in found:
            places += _inside(place, problems) if _is_plain_folder(place) else [place]
    if len(set(takes)) > 1 or (takes and takes[0] is not None and len(takes) > 1):
        problems.append(f"source {short(name)}: #N stands behind one entry of several; give it one entry, or no #N")
    return Source(name, name, tuple(dict.fromkeys(places)) or ("?",), reading, takes[0] if takes else None)


def _unnamed(entries: list[str], reading: Reading, problems: list[str]) -> list[Source]:
    """A source for each file, folder and hub dataset that the entries name."""
    found: dict[tuple[str, str], Source] = {}
    for entry in entries:
        places, take = _places(entry, problems)
        for place in places:
            if place.startswith(PREFIX):
                source = Source(parsed(place).stem, parsed(place).stem, (place,), reading, take)
            elif _is_plain_folder(place):
                name = Path(os.path.abspath(place)).name
                source = Source(name, name, tuple(_inside(place, problems)) or ("?",), reading, take)
            else:
                source = dataclasses.replace(file_source(place, reading), take=take)
            key = source.places if len(source.places) > 1 else (os.path.realpath(place), source.stem)
            found.setdefault(key, source)
    return _told_apart(list(found.values()), problems)


def _places(entry: str, problems: list[str]) -> tuple[list[str], int | None]:
    """The paths or the hub name that an entry of a data setting names, and N if it ends with #N."""
    take, pattern = None, entry
    if not os.path.exists(_safe(entry)) and (marked := _TAKE.fullmatch(entry)) and not _matches(entry):
        pattern, take = marked[1], int(marked[2])
        if not take:
            problems.append(f"{short(entry, 300)}: #0 takes no record; give a number of at least 1")
    if pattern.startswith(PREFIX):
        try:
            parsed(pattern)
        except DataError as error:
            problems.append(str(error))
            return [], take
        return [pattern], take
    if not (found := _matches(pattern)):
        problems.append(_missing(pattern))
    return found, take


def _matches(pattern: str) -> list[str]:
    """The files that match a pattern, or the folders if no file does. A file name may hold characters of a pattern."""
    try:
        if os.path.isfile(pattern) or os.path.isdir(pattern) or os.path.isdir(SAVED.sub("", pattern)):
            return [pattern]
        found = sorted(_glob(pattern))
    except ValueError:  # a NUL or half a surrogate pair, which no name holds
        return []
    found = [str(Path(one)) for one in found]
    return [one for one in found if os.path.isfile(one)] or [one for one in found if os.path.isdir(one)]


def _safe(text: str) -> str:
    return text if "\0" not in text and _NAME.fullmatch(text) else ""


def _missing(pattern: str) -> str:
    """The message for a pattern without a match: what was looked for, where, and what is there instead."""
    words = f"no file matches {short(pattern, 300)} (looked in {Path.cwd()})"
    folder = os.path.dirname(_safe(pattern)) or os.curdir
    if re.fullmatch(r"[\w.-]+/[\w.-]+", pattern) and not os.path.isdir(folder):
        return f"{words}; for a dataset of the hub write {PREFIX}{pattern}{_hint(pattern)}"
    if not glob.has_magic(folder) and not os.path.isdir(folder):
        words += f"; there is no folder {plain(folder, 300)}"
    elif os.path.isdir(folder) and (there := [n for n in sorted(os.listdir(folder)) if n.endswith(ENDINGS)]):
        words += f"; {plain(folder, 300)} holds {', '.join(plain(name) for name in first(there, 5))}"
    return words + _hint(pattern)


def _is_plain_folder(place: str) -> bool:
    return os.path.isdir(place) and not holds_saved(place)


def _inside(folder: str, problems: list[str]) -> list[str]:
    """The data files in a folder and below it, sorted by path."""
    found = [path for path in _glob(os.path.join(glob.escape(folder), "**")) if path.endswith(ENDINGS)]
    if not (files := sorted(path for path in found if os.path.isfile(path))):
        words = (
            "no file matches *.json, *.jsonl, *.csv, *.tsv, *.parquet or *.arrow in it, also compressed, or below it"
        )
        problems.append(f"{plain(folder, 300)}: {words}")
    return files


def _told_apart(found: list[Source], problems: list[str]) -> list[Source]:
    """The sources with names of their own: those of one stem are called by the folders in which they differ."""
    groups = collections.defaultdict(list)
    for source in found:
        groups[source.stem].append(source)
    taken = {stem for stem, group in groups.items() if len(group) == 1}
    named = [group[0] for group in groups.values() if len(group) == 1]
    for stem, group in groups.items():
        if len(group) == 1:
            continue
        for choice in zip(*map(_other_names, group), strict=False):
            stems = {other for other, _ in choice}
            if len(stems) == len(group) and not stems & taken:
                taken |= stems
                named += [
                    dataclasses.replace(source, stem=other, name=name)
                    for source, (other, name) in zip(group, choice, strict=True)
                ]
                break
        else:
            problems.append(
                f"{group[0]} and {group[1]} would both be source {stem!r}: rename one, or name the sources in the run "
                "file, as in train_data: {web: [a.jsonl], forum: [b.jsonl]}"
            )
    return named


def _other_names(source: Source) -> Iterator[tuple[str, str]]:
    """Further names of a source and its file, the nearest folders first: for web/train.jsonl, web and web_train."""
    place = source.places[0]
    if place.startswith(PREFIX):
        name: HubName = parsed(place)
        yield from ((other, other) for other in name.longer_stems)
        return
    path = Path(os.path.abspath(place))
    for folder in path.parents:
        if folder.name:
            file = str(path.relative_to(folder.parent))
            yield folder.name, file
            yield f"{folder.name}_{source.stem}", file


def _bad_name(source: Source) -> list[str]:
    problems = [
        f"{name!r}: a name with a control character or bytes that are not UTF-8: rename it"
        for name in dict.fromkeys((*source.places, source.stem))
        if not _NAME.fullmatch(name)
    ]
    if source.stem[:1] in tuple(FORMULA):
        begins = source.stem[0]
        problems.append(f"{source}: a spreadsheet would read a name that begins with {begins} as a formula: rename it")
    return problems


def _glob(pattern: str) -> Iterator[str]:
    """Paths that match; ** enters each real folder only once, because links can form a cycle."""
    before, *after = re.split(r"(?:^|(?<=/))\*\*(?:/+|$)", pattern, maxsplit=1)
    if not after:
        yield from glob.glob(pattern)
        return
    entered = set()
    for top in glob.glob(before) if before else [os.curdir]:
        for folder, below, _ in os.walk(top, followlinks=True):
            real = os.path.realpath(folder)
            below[:] = [] if real in entered else [name for name in below if not name.startswith(".")]
            if real not in entered:
                entered.add(real)
                yield from _glob(os.path.join(glob.escape(folder), after[0] or "*"))


@functools.cache
def _hint(pattern: str) -> str:
    folders = (Path(pattern).parent, *Path(pattern).parents)
    folder = next((p for p in folders if os.path.isfile(p / "process.py")), None)
    return f"; run `python {folder}/process.py` first" if folder else ""
