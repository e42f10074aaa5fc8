"""What a run will take, on one screen, before anything is loaded: steps, records, memory, disk and time."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from bilevel.data.kept_back import ENOUGH, kept_back
from bilevel.data.records import characters
from bilevel.data.sources import Source
from bilevel.monitor.words import duration, many, memory
from bilevel.run.libraries import quiet_libraries
from bilevel.run.machine import processor
from bilevel.settings.fields import Settings
from bilevel.settings.run_length import evaluation_interval, evaluations, steps_per_run

if TYPE_CHECKING:  # importing it takes seconds
    from bilevel.memory.plan import Plan
    from bilevel.run.pace import Pace

CHARACTERS = 4  # per token, of English text
FRAME = 12  # tokens that a prompt's frame adds to a record that is no text, such as Alpaca's headings and EOS


@dataclasses.dataclass(frozen=True)
class Outlook:
    """Lines for a person, the memory plan (None without one), and whether the run fits (None if that is not known)."""

    lines: list[str]
    plan: "Plan | None"
    fits: bool | None


def outlook(settings: Settings, files: dict[str, list[Source]], processes: int, hosts: int) -> Outlook:
    """The outlook of a run whose settings and files have been checked.

    A new model on plain torch is small, so it has no memory plan and no time; the run tells both after its first step.
    """
    parts = {part: _Part.of(sources, settings.max_length) for part, sources in files.items() if sources}
    steps, lines = _steps(settings, parts)
    lines += [_machine(settings)]
    planned = settings.backend == "deepspeed" or settings.gpu_memory_gib or settings.model_name_or_path
    if not (planned or settings.lora_rank is not None):
        return Outlook(
            [*lines, "memory and time: those of a new, small model are told after its first step"], None, None
        )
    quiet_libraries()
    from bilevel.memory.plan import Unmeasurable, memory_plan

    try:
        plan = memory_plan(settings, processes, hosts)
    except Unmeasurable as error:
        return Outlook([*lines, f"memory and time: no plan: {error}"], None, None)
    if settings.backend == "deepspeed" and processes == 1:
        lines.append("planned for one process; for eight GPUs, for example, add NPROC=8")
    lines += _memory(plan, settings)
    return Outlook([*lines, _time(settings, parts, steps, processes)], plan, plan.fits)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Records of train, val or test, and about how many samples they become, and how many tokens each has."""

    records: int
    samples: int
    tokens: int

    @classmethod
    def of(cls, sources: list[Source], max_length: int) -> "_Part":
        """A text is cut into pieces of max_length, which are samples of their own; any other record is cut off."""
        counts = [characters(source) for source in sources]
        pieces = sum(max(number, round(size / CHARACTERS / max_length)) if text else number
                     for number, size, text in counts)  # fmt: skip
        framed = sum(number for number, _, text in counts if not text)
        mean = (sum(size for _, size, _ in counts) / CHARACTERS + FRAME * framed) / max(1, pieces)
        return cls(sum(number for number, *_ in counts), pieces, max(2, min(max_length, round(mean))))


def _steps(settings: Settings, parts: dict[str, _Part]) -> tuple[int, list[str]]:
    """Number of steps, about, and the lines about them."""
    s, train = settings, parts["train"]
    samples = train.samples + (parts["val"].samples if s.val_in_training else 0)
    about = "about " if samples > train.records and not s.max_steps else ""
    steps = steps_per_run(samples, s.global_batch_size, s.epochs, s.max_steps)
    trusted = f" and {s.val_batch_size} validation" if s.learned else ""
    visits = steps * s.global_batch_size / samples
    if not s.copies:
        return steps, [f"method={s.method}: scores of {many(train.records, 'record')}"]
    what = "record" if samples == train.records else "sample"
    how = f"{about}{many(steps, 'step')} of {s.global_batch_size} training{trusted} {what}s"
    line = f"{how}: each of {many(samples, f'training {what}')} is read {visits:.3g} times"
    sizes = [f"{name} {part.records:,}" for name, part in parts.items()]
    cut = ", which are cut into samples of max_length" if train.samples > train.records else ""
    lines = [line, f"records: {', '.join(sizes)}{cut}; about {train.tokens} tokens each"]
    return steps, lines + _compared(s, parts, min(steps, steps_per_run(samples, s.global_batch_size, 1, None)))


def _compared(s: Settings, parts: dict[str, _Part], steps: int) -> list[str]:
    """How many validation records the training records will be compared with, if that decides their weights.

    steps: those of the first pass over the training records.
    """
    if not s.learned or s.weights != "sample" or s.x_optimizer != "auto" or "val" not in parts:
        return []
    n = parts["val"].samples
    kept = max(0, kept_back(n, s.val_batch_size, steps))
    if not kept:
        return [
            "WARNING: no validation record is left to compare training records with, so all weights stay 1: give more "
            "than val_batch_size, or make that smaller"
        ]
    few = f"; fewer than {ENOUGH} show only faults of many records" if kept < ENOUGH else ""
    return [f"training records are compared with {kept} of {n:,} validation records, which w reads later{few}"]


def _machine(settings: Settings) -> str:
    """This host: processor, memory and the disk that the run writes to."""
    host, (there, disk) = psutil.virtual_memory(), _free_disk(settings)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"this machine: {processor()}, {cores} cores; {memory(host.available)} of {memory(host.total)} of memory are "
        f"free, and {memory(disk)} of the disk at {there}"
    )


def _free_disk(settings: Settings) -> tuple[Path, int]:
    """The run's folder, or the nearest one above it that exists, and the free bytes there."""
    folder = settings.run_folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there, shutil.disk_usage(there).free


def _memory(plan: "Plan", settings: Settings) -> list[str]:
    """Memory and disk that the run needs, beside what there is."""
    one, several = ("CPU process", "CPU processes") if plan.cpu else ("GPU", "GPUs")
    place = f"on 1 {one}" if plan.processes == 1 else f"on each of {plan.processes} {several}"
    limit = "" if plan.limit is None else f" of {memory(plan.limit)}"
    verdict = {None: "", True: ", which fits", False: ": IT DOES NOT FIT"}[plan.fits]
    lines = [f"memory: about {memory(plan.total)}{limit} {place}{verdict}"]
    if plan.fits is False:
        lines += ["each of these changes alone would help:", *(f"  {remedy}" for remedy in plan.remedies)]
    disk, (_, free) = sum(plan.disk.values()), _free_disk(settings)
    lines.append(f"disk: {memory(disk)}" + ("" if disk < free else f": MORE THAN THE {memory(free)} THAT ARE FREE"))
    return lines


def _time(settings: Settings, parts: dict[str, _Part], steps: int, processes: int) -> str:
    """About how long the run takes, by a block of the model measured on this machine."""
    import torch

    from bilevel.memory.plan import on_this_cpu, run_shape
    from bilevel.run.pace import measure

    s = settings
    if not s.copies or not (on_this_cpu(s) or torch.cuda.is_available()) or processes > 1:
        return "time: not estimated, which needs one process on the machine of the run"
    dtype = s.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    pace = measure(s, run_shape(s), dtype, parts["train"].tokens)
    if pace is None:
        return "time: not estimated for this model on this machine; the run tells it after its first step"
    return _words(s, parts, steps, pace)


def _words(settings: Settings, parts: dict[str, _Part], steps: int, pace: "Pace") -> str:
    s = settings
    tokens = len(s.copies) * s.global_batch_size * parts["train"].tokens
    if s.learned:
        tokens += s.order * s.val_batch_size * parts["val"].tokens
    training, by = steps * tokens * pace.training, "by one block of the model, measured here"
    each = f"{many(steps, 'step')} of {duration(training / steps)}"
    if "test" not in parts:
        return f"time: about {duration(training)} for {each} ({by})"
    number = 1 + evaluations(steps, evaluation_interval(steps, s.eval_every))
    reading = number * len(s.copies) * parts["test"].samples * parts["test"].tokens * pace.reading
    return (
        f"time: about {duration(training + reading)}: {duration(training)} for {each}, {duration(reading)} for "
        f"{number} evaluations on the test records ({by})"
    )
