"""Read and tokenise the data of a run file before the run, and print what was found.

    python -m bilevel.prepare CONFIG [--show N] [--setting value ...]

It fills the cache, so that the run starts at once, and needs no GPU. For each source it prints records, samples, tokens
and how its records are read, with everything that is left out or unusual. With --show N it prints N records of each
source as they are trained on: what is learned stands in colour on a terminal, in [[ ]] elsewhere.

    python -m bilevel.prepare configs/gpt2.yaml --show 3 --train_data mine.jsonl --val_data trusted.jsonl --test_data []

does so for files of your own.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from bilevel.errors import ConfigError, UserError
from bilevel.run.libraries import quiet_libraries
from bilevel.run.preflight import read_files
from bilevel.run.start import note
from bilevel.settings.command_line import load_settings
from bilevel.settings.fields import Settings

if TYPE_CHECKING:  # imported in the functions that use it, so that --help and mistakes are answered at once
    from transformers import PreTrainedTokenizerBase

    from bilevel.data.samples import Samples

LONGEST = 20_000  # characters of a shown record


def main(argv: list[str]) -> int:
    """Run the command. Exit code: 0 done, 2 a mistake of the user."""
    options, rest = _parser().parse_known_args(argv)
    try:
        settings, _ = load_settings(["--config", options.config, *rest], note)
        prepare(settings, options.show)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bilevel.prepare",
        usage="python -m bilevel.prepare CONFIG [--show N] [--SETTING VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file with settings; --setting VALUE overrides it")
    parser.add_argument(
        "--show", metavar="N", type=_count, default=0, help="records of each source to print (default: 0)"
    )
    return parser


def _count(word: str) -> int:
    if (count := int(word)) < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return count


def prepare(settings: Settings, show: int = 0) -> None:
    """Read and tokenise all data of these settings, and print what was found. Raises UserError."""
    files, _, problems = read_files(settings)
    if problems:
        raise ConfigError(problems)
    quiet_libraries()
    from bilevel.data.samples import load_samples
    from bilevel.data.tokenise import make_tokeniser
    from bilevel.files import cache_folder
    from bilevel.model.loading import load_tokenizer

    tokenizer = load_tokenizer(settings, files["train"])
    tokeniser = make_tokeniser(tokenizer, settings)
    parts = {part: load_samples(sources, tokeniser) for part, sources in files.items() if sources}
    print(table(parts))
    for part, samples in parts.items():
        for source, notes in zip(samples.sources, samples.notes, strict=True):
            print(*(f"warning: {part} {source}: {note}" for note in notes), sep="\n", end="\n" if notes else "")
    print(f"in the cache {cache_folder()}: a run with these settings on this machine reads them from there")
    for part, samples in parts.items():
        for lines in shown(samples, tokenizer, show):
            print(f"\n{part} {lines}")


def table(parts: "dict[str, Samples]") -> str:
    """A row for each source: what it holds, how many of its tokens are learned, and how it is read."""
    import pandas as pd

    from bilevel.data.samples import token_counts

    rows = []
    for part, samples in parts.items():
        ends = samples.sizes.cumsum(0).tolist()
        for number, (end, size) in enumerate(zip(ends, samples.sizes.tolist(), strict=True)):
            tokens, learned = token_counts(samples, slice(end - size, end))
            left_out = samples.unread[number] + samples.dropped[number]
            found = [samples.read[number][1], left_out, size, tokens, learned]
            rows.append([part, samples.sources[number], *found, samples.read_as[number]])
    names = ["part", "source", "records", "left out", "samples", "tokens", "learned", "read as"]
    return pd.DataFrame(rows, columns=names).to_string(index=False)


def shown(samples: "Samples", tokenizer: "PreTrainedTokenizerBase", count: int) -> list[str]:
    """The first `count` samples of each source as text, the learned tokens marked."""
    from bilevel.data.marked import BRACKETS, GREEN, marked
    from bilevel.data.tokenise import IGNORE

    marks, found, start = GREEN if sys.stdout.isatty() else BRACKETS, [], 0
    for source, size in zip(samples.sources, samples.sizes.tolist(), strict=True):
        for number in range(start, start + min(count, size)):
            row = samples.table[number]
            text = marked(tokenizer, row["input_ids"], row["labels"], marks)
            more = f"\n({len(text) - LONGEST} more characters)" if len(text) > LONGEST else ""
            learned = sum(label != IGNORE for label in row["labels"])
            head = f"{source}, record {row['index']}: {len(row['labels'])} tokens, {learned} learned"
            found.append(f"{head}\n{text[:LONGEST]}{more}")
        start += size
    return found
