"""The start of a run, before heavy imports: --help, dry run, and checks of settings, files and model shape."""

import logging
import math
import os
import sys
import textwrap
import warnings
from typing import TYPE_CHECKING, TypeAlias

from bilevel.errors import UserError
from bilevel.run.interrupt import watch_launcher
from bilevel.run.preflight import check_files, check_shape
from bilevel.run.stages import stage
from bilevel.settings.command_line import load_settings
from bilevel.settings.fields import Settings
from bilevel.settings.written import dump_changed_first

if TYPE_CHECKING:  # imported where it is used: mistakes are told at once
    from bilevel.data.sources import Source

# What torch reads when it is imported: a variable, our value, and another variable by which a user decides the same.
BEFORE_TORCH = {
    "TOKENIZERS_PARALLELISM": ("true", ""),  # on all cores; when set, it gives no warning at a fork
    # Threads that wait for each other soon sleep: on a machine with other work a spinning one may hold the core that
    # the other needs (tests/benchmarks/waiting_threads.py).
    "GOMP_SPINCOUNT": ("1000", "OMP_WAIT_POLICY"),
    # Micro-batches differ in size; fixed segments of a GPU's memory would be left with gaps.
    "PYTORCH_ALLOC_CONF": ("expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF"),
}
Files: TypeAlias = dict[str, list["Source"]]  # keys: train, val, test


def start(argv: list[str]) -> tuple[Settings, Files] | int:
    """The checked settings and data files of a run, or an exit code: 0 after a dry run, 2 after a mistake.

    It also checks the model's shape and the names and shapes of its weights, which takes seconds; the imports after it
    take several more.
    """
    stage.begin()
    try:
        settings, dry_run = load_settings(argv, note)
        watch_launcher()
        if not dry_run:
            stage("checking the data files")
        files = check_files(settings)
        if dry_run:
            print(dump_changed_first(settings), end="")
            if settings.backend == "deepspeed" or settings.gpu_memory_gib or settings.lora_rank is not None:
                report, fits = _memory_report(settings)
                print(textwrap.indent(report, "# ", lambda _: True))
                if fits is False:
                    raise UserError("the run does not fit; the plan above ends with what would help")
            return 0
        stage("checking the model")
        quiet_libraries()
        from bilevel.model.loading import model_shape

        shape = model_shape(settings)
        check_shape(settings, shape)
        from bilevel.model.check import check_model  # imported late: a shape that cannot be is told a second sooner

        check_model(settings, shape)
    except UserError as error:
        return refuse(error)
    return settings, files


def note(words: str) -> None:
    """Print a note, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {words}", file=sys.stderr)


def refuse(error: UserError) -> int:
    """Print the error, once for all processes; return the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return 2


def quiet_libraries() -> None:
    """Silence progress bars and warnings of third-party packages, and set what torch reads when it is imported.

    To be called before they are imported elsewhere. What the user has set stays.
    """
    for name, (value, other) in BEFORE_TORCH.items():
        if other not in os.environ:
            os.environ.setdefault(name, value)
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which warns without it
    warnings.filterwarnings("ignore", category=FutureWarning)  # about names that deepspeed and transformers use
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _memory_report(settings: Settings) -> tuple[str, bool | None]:
    quiet_libraries()
    from bilevel.memory.plan import memory_report

    processes, on_host = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return memory_report(settings, processes, hosts=math.ceil(processes / on_host))
