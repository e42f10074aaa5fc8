"""Ask a model the questions of held-out records, and judge its answers: one each, or several and their majority."""

import collections
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.evaluate.answers import correct, vote
from bilevel.files import whole_file

if TYPE_CHECKING:  # imported in the functions that use it, so that --help and mistakes are answered at once
    import pandas as pd

    from bilevel.data.sources import Source

KINDS = ("task", "category", "subject", "type")  # fields of a record that name its kind of task; the first one counts


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are asked and answers judged; all are options of bilevel.evaluate."""

    answer: str = "auto"
    max_new_tokens: int = 64
    batch_size: int = 32
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0


def ask(copy: Any, files: list["Source"], tokeniser: Any, asking: Asking) -> "pd.DataFrame":
    """A row per answer to a record that has a prompt.

    Columns: file, index (the record's place), task, sample, prompt, expected, answer, right, cut_off (no stop token
    came), majority (whether the answer that most samples of the record agree on is right).
    """
    import pandas as pd
    from tqdm import tqdm

    from bilevel.data.records import read_rows
    from bilevel.evaluate.generation import generate
    from bilevel.seeding import key_number

    found, prompts = [], []
    for file in files:
        rows, kinds = read_rows(file)[:], kinds_of(file)
        if rows["roles"][0][0] != "text":
            for place, prompt in zip(rows["index"], tokeniser.prompts(rows), strict=True):
                for sample in range(asking.samples):
                    found.append({"file": file.name, "index": place, "task": kinds[place], "sample": sample})
                    prompts.append(prompt)
    _warn_of_ends(copy.model, prompts, tokeniser.tokenizer)
    keys = [f"answer {row['sample']} to record {row['index']} of {row['file']}, seed {asking.seed}" for row in found]
    with (
        copy.computing(),
        tqdm(desc="answers", total=len(prompts), unit="answer", disable=not sys.stderr.isatty()) as bar,
    ):
        answers = generate(copy.model, prompts, asking.max_new_tokens, asking.batch_size, bar.update,
                           asking.temperature, [key_number(key) >> 1 for key in keys])  # fmt: skip
    decode = tokeniser.tokenizer.decode
    texts, expected = [decode(one.ids, skip_special_tokens=True) for one in answers], [p.response for p in prompts]
    columns = ["file", "index", "task", "sample"]
    table = pd.DataFrame(found, columns=columns).assign(
        prompt=[decode(prompt.ids) for prompt in prompts],
        expected=expected,
        answer=texts,
        right=correct(texts, expected, asking.answer),
        cut_off=[not one.ended for one in answers],
    )
    _warn_of_cuts(table, [len(one.ids) for one in answers], asking.max_new_tokens, tokeniser.tokenizer)
    return table.assign(majority=majority(table, asking))


def majority(table: "pd.DataFrame", asking: Asking) -> list[bool]:
    """For each row, whether the answer on which most samples of its record agree is right; of two, the first."""
    found: list[bool] = []
    for start in range(0, len(table), asking.samples):
        part = table.iloc[start : start + asking.samples]
        votes = [vote(answer, expected, asking.answer) for answer, expected in zip(part["answer"], part["expected"],
                                                                                   strict=True)]  # fmt: skip
        (first, _), *_ = collections.Counter(votes).most_common(1)
        found += [bool(part["right"].iloc[votes.index(first)])] * len(part)
    return found


def write_answers(table: "pd.DataFrame", out: Path) -> None:
    """Write a JSON line for each answer: the record's place, prompt, expected and given answer, and the judgement."""
    with whole_file(out, replace=False) as new, new.open("w", encoding="utf-8") as file:
        for row in table.drop(columns="majority").to_dict("records"):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _warn_of_cuts(table: "pd.DataFrame", lengths: list[int], most: int, tokenizer: Any) -> None:
    """Say how many answers were cut off, by --max_new_tokens or by the model's positions."""
    import pandas as pd

    cut, full = table["cut_off"], pd.Series(lengths, dtype=int) == most
    by_limit = int((cut & full).sum())
    if by_limit:
        known = tokenizer(table["expected"].drop_duplicates().tolist(), add_special_tokens=False)["input_ids"]
        longest = max(map(len, known))
        print(
            f"warning: {by_limit:,} of {len(cut):,} answers ({by_limit / len(cut):.0%}) were cut off after {most} "
            f"tokens and are judged as they stand; give --max_new_tokens {max(2 * most, longest + 1)} (the longest "
            f"expected answer has {longest} tokens)",
            file=sys.stderr,
        )
    if others := int(cut.sum()) - by_limit:
        print(
            f"warning: {others:,} of {len(cut):,} answers ended at the last position of the model, or had no room at "
            "all; their prompts are too long for it",
            file=sys.stderr,
        )


def _warn_of_ends(model: Any, prompts: list[Any], tokenizer: Any) -> None:
    """Say it if the model's generation_config does not stop where training would end a response to these prompts."""
    from bilevel.model.response_end import stop_tokens

    if unknown := {prompt.stop for prompt in prompts}.difference(stop_tokens(model.generation_config)):
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(unknown)))
        print(
            f"warning: responses of this data end with {names}, at which the model's generation_config.json does not "
            "stop (eos_token_id): its answers may go on after it, here and wherever the model is used",
            file=sys.stderr,
        )


def kinds_of(file: "Source") -> list[str | None]:
    """The kind of task of each record in a file; None for a record without one."""
    from bilevel.data.records import raw_records

    return [
        next((str(record[kind]) for kind in KINDS if isinstance(record, dict) and record.get(kind)), None)
        for record, _ in raw_records(file)
    ]
