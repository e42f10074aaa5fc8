"""What a run's source weights say about other files of the same sources, such as the whole of each.

A per-source run learns the share p_s of each source on some of its records. Here the records to draw from are replaced
by those of other files, and their weights by

    c_i = N p_s / (n_s t_s)        scaled to mean 1 over the N records, n_s of which are of source s

where t_s is 1 if the shares count records, and the mean number of learned tokens of a record if they count tokens.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from bilevel.data.records import read_as, records_of, rows_table
from bilevel.data.sources import Reading, Source, absolute, find_sources
from bilevel.errors import ConfigError, DataError, UserError, first, plain
from bilevel.export.selection import quotas
from bilevel.run.finished import DataFile, FinishedRun
from bilevel.settings.command_line import load_settings


def to_draw_from(run: FinishedRun, options: argparse.Namespace) -> FinishedRun:
    """The run with the records that --from, --shares and --floor ask for, and their weights. Raises UserError."""
    given = [name for name, value in (("from", options.pool), ("floor", options.floor)) if value]
    given += ["shares tokens"] * (options.shares == "tokens")
    if not given:
        return run
    if run.per_sample:
        raise UserError(
            f"--{given[0]}: {run.folder} has a weight for each record, not for each source; it needs a run with "
            "weights=source"
        )
    p = lifted(source_shares(run), options.floor or 0.0)
    if options.pool:
        run = on_files(run, _same_sources(run, _found(run, options.pool, "from")))
    known = [run.was_read(number) for number in range(len(run.train))]
    sizes = np.array([part.sum() for part in known])
    each = p / sizes
    if options.shares == "tokens":
        each /= learned_tokens(run) / sizes
    each *= sizes.sum() / (each * sizes).sum()
    weights = [np.where(part, c, np.nan) for part, c in zip(known, each, strict=True)]
    return dataclasses.replace(run, weights=weights)


def appended(run: FinishedRun, words: list[str] | None) -> FinishedRun | None:
    """The files of --append as the training files of a run, each record with weight 1. Raises UserError."""
    if not words:
        return None
    sources = _found(run, words, "append")
    taken = {file.stem for file in run.train}
    if same := [source.stem for source in sources if source.stem in taken]:
        raise UserError(f"--append: {plain(same[0])} is also a source of the run; rename the file")
    other = on_files(run, sources)
    return dataclasses.replace(other, weights=[np.ones(file.records) for file in other.train])


def source_shares(run: FinishedRun) -> np.ndarray:
    """The learned shares p (S,) of a per-source run, with sum 1."""
    samples = np.array([file.samples for file in run.train])
    p = np.array([np.nanmean(c) for c in run.weights]) * samples
    return p / p.sum()


def lifted(p: np.ndarray, floor: float) -> np.ndarray:
    """The shares (S,), none below the floor: those below it become the floor, and the others are scaled down alike.

    Raises UserError if the floor is more than all can have.
    """
    if floor * len(p) > 1:
        raise UserError(
            f"--floor {floor:g}: {len(p)} sources cannot have so much each; the largest floor is {1 / len(p):.4g}"
        )
    low = np.zeros(len(p), dtype=bool)
    while True:
        rest = p[~low].sum()
        found = np.where(low, floor, p * (1 - floor * low.sum()) / rest if rest else 0.0)
        if not (below := ~low & (found < floor)).any():
            return found
        low |= below


def _same_sources(run: FinishedRun, found: list[Source]) -> list[Source]:
    """The sources in the run's order. Raises UserError unless they have the names of the run's, each once."""
    by_name, names = {source.stem: source for source in found}, [file.stem for file in run.train]
    problems = []
    if missing := [name for name in names if name not in by_name]:
        problems.append(f"no files for the run's {_listed(missing)}")
    if unknown := [name for name in by_name if name not in names]:
        problems.append(f"the run has no weight for {_listed(unknown)}")
    if problems:
        raise UserError(
            f"--from: {'; '.join(problems)}; a file belongs to the source of its name, or give the names, as in --from "
            f"'{{{plain(names[0])}: [a.jsonl, b.jsonl], ...}}'"
        )
    return [by_name[name] for name in names]


def _listed(names: list[str]) -> str:
    return f"source{'s' * (len(names) > 1)} {', '.join(plain(name) for name in first(names, 10))}"


def _found(run: FinishedRun, words: list[str], option: str) -> list[Source]:
    """The sources that an option names in the words of a data setting. Raises UserError."""
    try:
        settings, _ = load_settings(["--config", str(run.folder / "config.yaml"), "--train_data", *words])
        return find_sources(settings.train_data, Reading.of(settings))
    except ConfigError as error:
        raise UserError(f"--{option}: {'; '.join(error.problems).replace('train_data: ', '')}") from None
    except DataError as error:
        raise UserError(f"--{option}: {error}") from None


def on_files(run: FinishedRun, sources: list[Source]) -> FinishedRun:
    """The run as if these were its training files; their weights are still to be set. Raises DataError."""
    train = []
    for source in sources:
        records, rows = records_of(source), rows_table(source).num_rows
        places = [absolute(place) for place in source.places]
        file = DataFile(source.name, places[0], source.content, records, rows, source.stem, places)
        train.append(dataclasses.replace(file, take=source.take, unread=records - rows))
    return dataclasses.replace(run, train=train, sources=sources, weights=[], evidence=None)


def learned_tokens(run: FinishedRun) -> np.ndarray:
    """The number of tokens (S,) that training would learn of each source. Raises UserError."""
    from bilevel.data.samples import load_samples, token_counts
    from bilevel.data.tokenise import make_tokeniser
    from bilevel.model.loading import load_tokenizer, read_tokenizer
    from bilevel.run.libraries import quiet_libraries

    quiet_libraries()
    own = Path(run.folder) / "model" / "tokenizer.json"
    tokenizer = read_tokenizer(str(own.parent)) if own.is_file() else load_tokenizer(run.settings, run.sources)
    samples = load_samples(run.sources, make_tokeniser(tokenizer, run.settings))
    ends = samples.sizes.cumsum(0).tolist()
    parts = [slice(end - size, end) for end, size in zip(ends, samples.sizes.tolist(), strict=True)]
    return np.array([token_counts(samples, part)[1] for part in parts], dtype=np.float64)


def by_file(run: FinishedRun, counts: np.ndarray) -> list[tuple[DataFile, np.ndarray]]:
    """Each training file with the counts of its records."""
    ends = np.cumsum([file.records for file in run.train])[:-1]
    return list(zip(run.train, np.split(counts, ends), strict=True))


def readable(run: FinishedRun) -> np.ndarray:
    """Counts 0 and 1: 1 for each record that could be read."""
    return np.concatenate([run.was_read(number) for number in range(len(run.train))]).astype(np.int64)


def layouts(selections: list[tuple[FinishedRun, np.ndarray]]) -> dict[str, list[str]]:
    """The layouts of the sources with records to write, in words, and the names of those sources."""
    found: dict[str, list[str]] = {}
    for run, counts in selections:
        for source, (file, here) in zip(run.sources, by_file(run, counts), strict=True):
            if here.any():
                found.setdefault(read_as(source), []).append(file.stem)
    return found


def limited(run: FinishedRun, counts: np.ndarray, n: int, repeats: int) -> list[str]:
    """A line for each source of a per-source run that has too few records for its share, and what it got instead."""
    if run.per_sample:
        return []
    lines, wanted = [], quotas(np.array([np.nansum(c) for c in run.weights]), n)
    for (file, here), c, want in zip(by_file(run, counts), run.weights, wanted.tolist(), strict=True):
        if (got := int(here.sum())) < want and got == repeats * np.count_nonzero(c > 0):
            times = "once" if repeats == 1 else f"{repeats} times"
            lines.append(
                f"{file.stem}: its share is {want:,} records; all it has, each {times}, are {got:,}, and the other "
                "sources get the rest (--max_repeats says how often a record may come)"
            )
    return lines
