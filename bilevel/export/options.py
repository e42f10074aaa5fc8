"""The command line of bilevel.export: what can be asked for, and what cannot be asked for together."""

import argparse
import math
from collections.abc import Callable

EXAMPLES = """examples:
  python -m bilevel.export outputs/mine                       as the run suggests: without what it has shown to be worse
  python -m bilevel.export outputs/mine --keep 0.5 --out clean.jsonl         the half with the largest weights
  python -m bilevel.export outputs/mine --all                 every record, with its weight in a field
  python -m bilevel.export outputs/mine --sample 10000        10,000 records drawn in proportion to their weights
  python -m bilevel.export outputs/mine --sample 20000 --from data/whole/*.jsonl --max_repeats 4
                                                              the same from other files of the run's sources"""


def parse(argv: list[str], about: str) -> argparse.Namespace:
    """The options; prints the error and exits with code 2 if they contradict each other."""
    parser = argparse.ArgumentParser(
        prog="python -m bilevel.export",
        description=about,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    _of_selection(parser)
    _of_draws(parser)
    _of_output(parser)
    options = parser.parse_args(argv)
    drawing = {"from": options.pool, "max_repeats": options.max_repeats, "shares": options.shares}
    drawing |= {"floor": options.floor, "replacement": options.replacement}
    if options.sample is None and (alone := [name for name, value in drawing.items() if value]):
        parser.error(f"--{alone[0]} can only be used with --sample")
    if options.replacement and options.max_repeats:
        parser.error("--replacement draws a record any number of times; leave it out, or leave out --max_repeats")
    if options.pool and options.marks:
        parser.error("--marks names records of the run, but --from draws others; leave one out")
    if options.weight_field is not None and not options.all:
        parser.error("--weight_field can only be used with --all")
    return options


def _of_selection(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--keep",
        metavar="SHARE",
        type=_number(0, 1),
        help="this fraction of the records, those with the largest weights, such as 0.5",
    )
    choice.add_argument(
        "--threshold", metavar="T", type=_number(0, math.inf), help="records with weight c >= T (the mean of c is 1)"
    )
    choice.add_argument(
        "--sample", metavar="N", type=_whole(1), help="N records drawn with probability proportional to c"
    )
    choice.add_argument("--all", action="store_true", help="all records, each with its weight in an extra field")


def _of_draws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="pool",
        metavar="FILE",
        nargs="+",
        help="with --sample, for a run with a weight for each source: draw from these files, such as the whole of each "
        "source, and not from those of the run; written as train_data, with the names of the run's sources",
    )
    parser.add_argument(
        "--max_repeats", metavar="K", type=_whole(1), help="with --sample: draw no record more than K times [1]"
    )
    parser.add_argument(
        "--shares",
        choices=("records", "tokens"),
        help="with --sample: what the weight of a source is a share of, the records drawn or their learned tokens "
        "[records]",
    )
    parser.add_argument(
        "--floor",
        metavar="SHARE",
        type=_number(0, 1),
        help="with --sample: the least share of any source, such as 0.01; the others are scaled down",
    )
    parser.add_argument("--replacement", action="store_true", help="with --sample: draw with replacement")


def _of_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weight_field", metavar="NAME", help="with --all: name of the extra field [weight]")
    parser.add_argument(
        "--source_field",
        metavar="NAME",
        help="name of an extra field with the record's source [source with --sample, else no such field]",
    )
    parser.add_argument(
        "--marks",
        metavar="FILE",
        help="marks saved in report.html: always include records marked keep, never those marked drop",
    )
    parser.add_argument(
        "--append",
        metavar="FILE",
        nargs="+",
        help="files whose records are written once each after the selected ones, such as the trusted records; written "
        "as train_data",
    )
    parser.add_argument("--seed", metavar="N", type=_whole(0), default=0, help="seed of random choices [0]")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="output file, .jsonl, .json, .csv, .tsv, .parquet or .arrow, the texts also with .gz, .zst, .bz2 or .xz; "
        "or a name that ends in / for a new folder with a .jsonl for each source; never overwritten [beside the run "
        "folder a .jsonl, or such a folder if the sources have different layouts]",
    )


def _number(above: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not above < value <= most or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"{text}: must be above {above:g}" + f" and at most {most:g}" * (most == 1)
            )
        return value

    return number


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    return whole
