"""Evaluate a model on held-out records: loss, perplexity, and the share of correct answers.

    python -m bilevel.evaluate outputs/mine --data test.json

MODEL is a run folder, a model folder, an adapter folder or a hub id. Answers are generated from the training prompts,
greedily unless there is a --temperature. Loss and perplexity are means over all supervised tokens. Results are printed
as JSON and as a table: for all records, per file, and per kind of task if the records have a field `task`, `category`,
`subject` or `type`. Under an adapter the base model is stored as in its run, or for an adapter folder alone in the
dtype of the passes.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.errors import UserError
from bilevel.evaluate.asking import Asking, ask, kinds_of, write_answers
from bilevel.evaluate.model import load_copy
from bilevel.evaluate.questions import answer_questions, read_questions, write_for_judge
from bilevel.files import whole_file
from bilevel.settings.command_line import read_yaml
from bilevel.settings.fields import FIELDS, Settings
from bilevel.settings.rules import validate

if TYPE_CHECKING:  # imported in the functions that use it, so that --help and mistakes are answered at once
    import pandas as pd

    from bilevel.data.sources import Source


def main(argv: list[str]) -> int:
    """Run the command. Exit code: 0 done, 2 a mistake of the user."""
    args = _parser().parse_args(argv)
    try:
        asking = check(args)
        if args.questions:
            return judged(args, asking)
        settings, files = find(args)
        result, answers = evaluate_model(settings, files, asking)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    print(table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(args.out, replace=False) as new:
            new.write_text(text + "\n", encoding="utf-8")
    if args.answers_out and answers is not None:
        args.answers_out.parent.mkdir(parents=True, exist_ok=True)
        write_answers(answers, args.answers_out)
    return 0


def judged(args: argparse.Namespace, asking: Asking) -> int:
    """Answer the questions of --questions and write the answers as a judge reads them. Raises UserError."""
    questions = read_questions(args.questions)
    settings, files = find(args)
    copy, tokeniser = load_copy(settings, files)
    answers = answer_questions(copy, tokeniser, questions, asking, by_category=args.temperature is None)
    args.answers_out.parent.mkdir(parents=True, exist_ok=True)
    write_for_judge(questions, answers, args.answers_out)
    print(f"{len(questions)} questions answered: {args.answers_out}")
    return 0


def check(args: argparse.Namespace) -> Asking:
    """The options that say how questions are asked. Raises UserError for any that cannot be right."""
    for name in ("out", "answers_out"):
        path = getattr(args, name)
        if path and os.path.lexists(path):
            raise UserError(f"--{name} {path}: the file exists and is not overwritten; give another name")
    if args.answers_out and args.answers_out == args.out:
        raise UserError("--out and --answers_out name the same file; give another name to one")
    if args.answers_out and args.answer == "none":
        raise UserError("--answers_out: no answers are generated with --answer none; leave one of them out")
    if args.questions:
        given = [name for name in ("data", "out") if getattr(args, name)]
        if given or args.answer != "auto" or not args.answers_out:
            raise UserError(
                "--questions: a judge reads the answers, so there is nothing to compare them with here; give "
                "--answers_out FILE, and no --data, --answer or --out"
            )
    by_category = args.questions and args.temperature is None
    if args.samples > 1 and not args.temperature and not by_category:
        raise UserError(
            f"--samples {args.samples}: at temperature 0 all answers to a question are the same; add --temperature 0.7"
        )
    defaults = {"max_new_tokens": 1024 if args.questions else 64, "temperature": 0.0}
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Asking)}
    return Asking(**{name: defaults[name] if value is None else value for name, value in given.items()})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bilevel.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a finished run, folder of a model, or a hub id")
    parser.add_argument(
        "--data", nargs="+", metavar="FILE", help="held-out files or glob patterns (default: the run's test_data)"
    )
    parser.add_argument("--questions", type=Path, metavar="FILE",
                        help="answer MT-Bench's question.jsonl, or a file of that form, instead of held-out records: "
                        "turn by turn, into --answers_out as its judge reads them")  # fmt: skip
    parser.add_argument("--answer", choices=("auto", "exact", "final_number", "none"), default="auto",
                        help="how to judge answers. exact: same text, apart from white space. final_number: same last "
                        "number (after ####, or in the whole text); a reference in \\boxed{} is compared as a "
                        "mathematical expression. auto: final_number if the reference marks its answer with #### or "
                        "\\boxed{}, else exact. none: no answers, only the loss (default: auto)")  # fmt: skip
    parser.add_argument(
        "--max_new_tokens",
        type=_count,
        help="maximum length of an answer, in tokens (default: 64; 1024 to --questions)",
    )
    parser.add_argument(
        "--batch_size",
        type=_count,
        default=32,
        help="answers generated at a time; affects memory and speed (default: 32)",
    )
    parser.add_argument(
        "--samples", type=_count, default=1, metavar="N",
        help="answers to each question; with several, the results also have the share of questions of which the answer "
        "most agree on is right (majority), and of which any is right (any_right) (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=_temperature, metavar="T",
        help="0 writes the likeliest token, above 0 tokens are drawn (default: 0; to --questions by category, as "
        "MT-Bench has it)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws at a temperature above 0 (default: 0)")
    parser.add_argument("--format", help="record format, as in training (default: the run's, or auto)")
    parser.add_argument(
        "--max_length", type=int, help="maximum length of a record for the loss, in tokens (default: the run's)"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="dtype of the forward passes (default: bf16 on a GPU that supports it, else fp32)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results to this file, as JSON")
    parser.add_argument(
        "--answers_out", type=Path, metavar="FILE", help="write every answer to this file, beside what was expected, "
        "as JSON Lines",
    )  # fmt: skip
    return parser


def _count(word: str) -> int:
    if (count := int(word)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def _temperature(word: str) -> float:
    if not 0 <= (value := float(word)) < math.inf:
        raise argparse.ArgumentTypeError("must be a number of at least 0")
    return value


def find(args: argparse.Namespace) -> tuple[Settings, list["Source"]]:
    """The model to load, as settings, and the files to evaluate on. Raises UserError."""
    from bilevel.data.sources import Reading, find_sources

    folder, values = Path(args.model), {"train_data": ["-"], "method": "fixed", "model_name_or_path": args.model}
    if (folder / "config.yaml").is_file():
        if not (folder / "model").is_dir():
            raise UserError(f"{folder} has no model/: the run has not finished, or it had save_model=none")
        ours = ("test_data", "format", "max_length", "loss_on", "attn_implementation", "micro_batch_tokens")
        ours += ("turns", "template_kwargs", "special_tokens_in_text")
        ours += ("fields", "prompt_suffix", "skip_bad_records", "seed")
        if args.data is None:
            ours += ("filters", "max_characters")  # of files that are given, no question is left out
        if (folder / "model" / "adapter_config.json").is_file():
            ours += ("lora_rank", "base_dtype")  # the model is stored as it was under the adapter
        config = read_yaml(str(folder / "config.yaml"))
        values |= {name: config[name] for name in ours if name in config}
        values["model_name_or_path"] = str(folder / "model")
    elif folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(
            f"{folder} is neither a run folder nor a model: it has no config.yaml, no config.json "
            "and no adapter_config.json"
        )
    elif args.max_length is None:
        values["max_length"] = _length(values)
    given = {"test_data": args.data, "format": args.format, "max_length": args.max_length, "dtype": args.dtype}
    values |= {name: value for name, value in given.items() if value is not None}
    settings, problems = validate(values)
    if problems:
        raise UserError("; ".join(problems))
    if args.questions:
        return settings, []
    if not settings.test_data:
        raise UserError("no data to evaluate on: give --data FILE, or a run with test_data")
    return settings, find_sources(settings.test_data, Reading.of(settings))


def _length(values: dict[str, Any]) -> int:
    """Default of max_length for a model without a run: the setting's default, at most the model's positions."""
    from bilevel.model.loading import model_shape
    from bilevel.model.pretrained import base_of

    base = base_of(values["model_name_or_path"])
    shape = model_shape(Settings(**values | {"max_length": 2} | ({"model_name_or_path": base} if base else {})))
    return min(FIELDS["max_length"].default, getattr(shape, "max_position_embeddings", math.inf))


def evaluate_model(
    settings: Settings, files: list["Source"], asking: Asking
) -> tuple[dict[str, Any], "pd.DataFrame | None"]:
    """Scores {overall, by_file, by_task} of the model settings.model_name_or_path, with the options used; all answers.

    The answers are None if none are asked for.
    """
    copy, tokeniser = load_copy(settings, files)
    tables = [heldout(copy, settings, files, tokeniser)]
    if asking.answer != "none":
        tables.append(ask(copy, files, tokeniser, asking))
    drawn = ("samples", "temperature", "seed") if asking.temperature else ()
    return {
        "model": settings.model_name_or_path,
        "data": [place for file in files for place in file.places],
        **{name: getattr(asking, name) for name in ("answer", "max_new_tokens", *drawn)},
    } | scores(tables), (tables[1] if len(tables) > 1 else None)


def heldout(copy: Any, settings: Settings, files: list["Source"], tokeniser: Any) -> "pd.DataFrame":
    """A row per sample: file, task, loss (sum over its supervised tokens, in nats), tokens."""
    import pandas as pd
    import torch
    from tqdm import tqdm

    from bilevel.data.samples import load_samples
    from bilevel.model.heldout import heldout_loss

    samples = load_samples(files, tokeniser)
    sums = torch.zeros(len(samples), 2, dtype=torch.float64)
    with tqdm(desc="loss", unit="batch", disable=not sys.stderr.isatty()) as bar:
        heldout_loss(copy, samples, settings.micro_batch_tokens, bar.update, sums)
    kinds = [kinds_of(file) for file in files]
    sources = samples.sources_of(samples.all_ids).tolist()
    places = samples.records(slice(None)).tolist()
    return pd.DataFrame({
        "file": [files[source].name for source in sources],
        "task": [kinds[source][place] for source, place in zip(sources, places, strict=True)],
        "loss": sums[:, 0],
        "tokens": sums[:, 1],
    })  # fmt: skip


def scores(tables: "list[pd.DataFrame]") -> dict[str, Any]:
    """Scores of all rows together, per file, and per task."""
    return {
        "overall": _score(tables),
        **{
            f"by_{column}": {
                group: _score([table[table[column] == group] for table in tables])
                for group in sorted(set(tables[0][column].dropna()))
            }
            for column in ("file", "task")
        },
    }


def _score(tables: "list[pd.DataFrame]") -> dict[str, float]:
    losses, *answers = tables
    loss = float(losses["loss"].sum() / losses["tokens"].sum())
    row = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": int(losses["tokens"].sum())}
    if answers and len(answers[0]):
        table = answers[0]
        first = table[table["sample"] == 0]
        row |= {"exact_match": float(table["right"].mean()), "cut_off": float(table["cut_off"].mean())}
        if len(first) < len(table):
            each = table.groupby(["file", "index"])["right"]
            row |= {"majority": float(first["majority"].mean()), "any_right": float(each.any().mean())}
        row["records"] = len(first)
    return row


def table(result: dict[str, Any]) -> str:
    """The scores as a printable table."""
    import pandas as pd

    rows = {"all": result["overall"]} | result["by_task"]
    if len(result["by_file"]) > 1:
        rows |= result["by_file"]
    return pd.DataFrame.from_dict(rows, orient="index").to_string(float_format="{:.4f}".format)
