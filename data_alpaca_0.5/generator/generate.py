"""Write alpaca_synthetic.json, the instruction dataset shipped with this project.

Every record is drawn from a seeded generator, so the same seed always gives the same bytes:

    python data_alpaca_0.5/generator/generate.py
    python data_alpaca_0.5/generator/generate.py --tasks plural capitals --per_task 120 --out facts.json

Each kind of task is a function in a tasks_*.py file of this folder. It returns one (instruction, input, output), and
its name becomes the "task" of the record. To add a kind, write such a function, add it to TASKS in its file, and run
this script.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import tasks_data
import tasks_facts
import tasks_language
import tasks_numbers
import tasks_text
import tasks_time
import tasks_writing
from wording import Record

PER_TASK = 80
DRAWS = 100  # maximum number of draws per wanted record
SEED = 0

HERE = Path(__file__).resolve().parents[1]
TASKS = [
    task
    for module in (
        tasks_numbers,
        tasks_time,
        tasks_text,
        tasks_data,
        tasks_language,
        tasks_facts,
        tasks_writing,
    )
    for task in module.TASKS
]


def draw(task: Callable[[random.Random], Record], seed: int, wanted: int) -> list[dict[str, str]]:
    """`wanted` different questions of one kind, drawn from their own generator. Raises ValueError."""
    rng = random.Random(f"{seed} {task.__name__}")
    answers: dict[tuple[str, str], str] = {}
    for _ in range(DRAWS * wanted):
        instruction, context, output = task(rng)
        answers.setdefault((instruction, context), output)
        if len(answers) == wanted:
            break
    else:
        raise ValueError(f"{task.__name__}: only {len(answers)} different questions, {wanted} wanted")
    return [
        {"instruction": instruction, "input": context, "output": output, "task": task.__name__}
        for (instruction, context), output in answers.items()
    ]


def generate(tasks: list[Callable[[random.Random], Record]], seed: int, per_task: int) -> bytes:
    """The records of these tasks, shuffled, as a JSON array with one record per line. Raises ValueError."""
    records = [record for task in tasks for record in draw(task, seed, per_task)]
    random.Random(f"{seed} order").shuffle(records)
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    return f"[\n{lines}\n]\n".encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of all records (default: {SEED})")
    parser.add_argument("--out", type=Path, help="file to write (default: the shipped file)")
    by_name = {task.__name__: task for task in TASKS}
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=by_name,
        default=list(by_name),
        metavar="TASK",
        help="kinds of task (default: all)",
    )
    parser.add_argument("--per_task", type=int, default=PER_TASK, help=f"records of each kind (default: {PER_TASK})")
    args = parser.parse_args()
    if args.out is None and (len(args.tasks), args.per_task) != (len(TASKS), PER_TASK):
        parser.error("--tasks and --per_task make another dataset: give --out FILE")
    out = args.out or HERE / "alpaca_synthetic.json"
    try:
        data = generate([by_name[name] for name in args.tasks], args.seed, args.per_task)
    except ValueError as error:
        parser.error(str(error))
    if args.out and out.exists() and out.read_bytes() != data:
        parser.error(f"{out} exists with other content: give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(data)
    print(f"{out}: {len(args.tasks)} tasks, {len(args.tasks) * args.per_task} records, {len(data)} bytes")


if __name__ == "__main__":
    main()
