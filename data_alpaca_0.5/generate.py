"""Write alpaca_synthetic.json, the instruction data set shipped with this project.

Every record is drawn from a seeded generator, so the same seed gives the same bytes:

    python data_alpaca_0.5/generate.py

The kinds of task are the functions in the tasks_*.py files beside this one; each returns one
(instruction, input, output) and its name becomes the record's "task". To add a kind, write such a
function, add it to its file's TASKS and run this script.
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
MAX_DRAWS = 100 * PER_TASK
SEED = 0

HERE = Path(__file__).resolve().parent
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


def draw(task: Callable[[random.Random], Record], seed: int) -> list[dict[str, str]]:
    """PER_TASK different questions of one kind, from a generator of its own."""
    rng = random.Random(f"{seed} {task.__name__}")
    answers: dict[tuple[str, str], str] = {}
    for _ in range(MAX_DRAWS):
        instruction, context, output = task(rng)
        answers.setdefault((instruction, context), output)
        if len(answers) == PER_TASK:
            break
    else:
        raise RuntimeError(f"{task.__name__}: only {len(answers)} different questions, {PER_TASK} wanted")
    return [
        {"instruction": instruction, "input": context, "output": output, "task": task.__name__}
        for (instruction, context), output in answers.items()
    ]


def generate(seed: int) -> bytes:
    """The whole data set in shuffled order as a JSON array, one record per line."""
    records = [record for task in TASKS for record in draw(task, seed)]
    random.Random(f"{seed} order").shuffle(records)
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    return f"[\n{lines}\n]\n".encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=HERE / "alpaca_synthetic.json", help="file to write")
    args = parser.parse_args()
    data = generate(args.seed)
    args.out.write_bytes(data)
    print(f"{args.out}: {len(TASKS)} tasks, {len(TASKS) * PER_TASK} records, {len(data)} bytes")


if __name__ == "__main__":
    main()
