"""Seconds to tokenise conversations of one turn and of four, as they are read for the first time.

    python tests/benchmarks/tokenising.py [--package FOLDER] [--records 2000] [--repeats 5]

--package: the folder of another checkout, whose `bilevel` is measured in place of this one. Words of English length,
the ChatML template, 40 words in a question and 60 in an answer. The first batch, which starts what stays at work, does
not count. Prints the median of the repeats in milliseconds per thousand records.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path


def conversations(records: int, turns: int, seed: int) -> dict[str, list]:
    """Rows as bilevel.data.records has them."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(3000)]
    roles = ["user", "assistant"] * turns
    length = {"user": 40, "assistant": 60}
    contents = [[" ".join(draw.choices(words, k=length[role])) for role in roles] for _ in range(records)]
    index = list(range(records))
    return {"roles": [roles] * records, "contents": contents, "more": [None] * records, "index": index,
            "is_noisy": [None] * records}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sys.path[:0] = [str(args.package), str(Path(__file__).parents[1])]
    from tokenizer_kinds import chatml_tokenizer

    from bilevel.data.tokenise import Tokeniser

    for turns in (1, 4):
        tokeniser, times = Tokeniser(chatml_tokenizer(), 4096, "response"), []
        tokeniser(conversations(10, turns, -1))
        for repeat in range(args.repeats):
            rows = conversations(args.records, turns, repeat)
            begin = time.perf_counter()
            for start in range(0, args.records, 1000):
                tokeniser({name: values[start : start + 1000] for name, values in rows.items()})
            times.append((time.perf_counter() - begin) / args.records * 1e6)
        print(f"{turns} turns: {statistics.median(times):.0f} ms per 1,000 records, of {[round(t) for t in times]}")


if __name__ == "__main__":
    main()
