"""The processes of test_zero.py: `torchrun zero_worker.py FOLDER TASK...`; rank 0 writes FOLDER/TASK.json.

Nothing is asserted here: a task measures, the test judges.
"""

import gc
import json
import sys
import time
import warnings
from pathlib import Path

from zero_bf16 import bf16, noise, signal
from zero_common import make_model, zero_copy
from zero_compare import compare
from zero_limits import leak, load, save, stop

from bilevel.model.zero_copy import start_world

TASKS = {task.__name__: task for task in (compare, stop, save, load, leak, bf16, signal, noise)}


def main(folder: Path, tasks: list[str]) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    world = start_world()
    zero_copy(world, make_model(), zero_stage=2)  # loads what is loaded late
    for task in tasks:
        gc.collect()
        gc.freeze()  # every new draw collects, which takes a fraction of a second with all that is loaded
        start = time.perf_counter()
        report = TASKS[task](world, folder)
        if world.main:
            (folder / f"{task}.json").write_text(json.dumps(report))
            print(f"{task}: {time.perf_counter() - start:.1f} s", flush=True)
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
