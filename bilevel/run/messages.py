"""Messages of a run, on the screen and in run.log."""

import contextlib
import logging
import shlex
import sys
from pathlib import Path

from bilevel.data.overlap import read_overlaps
from bilevel.data.stream import TrustedStream
from bilevel.model.loading import drops
from bilevel.model.packing import why_padded
from bilevel.monitor.source_columns import tokens_of
from bilevel.run.interrupt import FINISH
from bilevel.run.stages import stage
from bilevel.run.state import Run
from bilevel.settings.fields import Settings

log = logging.getLogger("bilevel")

FEW = 20  # validation records to compare with: 10 % of harmful ones are not found by fewer than 60 or so
# Said at the start of every run that trains with dropout.
MASKS = (
    "dropout is on: with another micro_batch_tokens or number of processes, masks differ and results are equal in "
    "distribution only"
)


def open_log(run: Run) -> None:
    """Send messages to the screen and to run.log, from the main process only."""
    log.setLevel(logging.INFO if run.world.main else logging.CRITICAL)
    log.handlers = [_Screen(sys.stdout)]
    if run.world.main:
        file = _LogFile(run.settings.run_folder / "run.log", encoding="utf-8")
        for line in stage.lines:  # said before there was a file
            file.emit(logging.makeLogRecord({"msg": line}))
        log.addHandler(file)


class _Patient(logging.Handler):
    """A handler that a full disk does not upset: it says once that it cannot write, and the run goes on."""

    place, failing = "", False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failing:
            self.failing = True
            with contextlib.suppress(OSError):  # stderr can be on the same disk
                print(f"{self.place} CANNOT BE WRITTEN: {error}. The run goes on", file=sys.stderr, flush=True)


class _Screen(_Patient, logging.StreamHandler):
    place = "the screen (stdout)"


class _LogFile(_Patient, logging.FileHandler):
    @property
    def place(self) -> str:
        return self.baseFilename


def describe(run: Run) -> str:
    """A few lines about what the run will do, its data, and warnings about them."""
    s = run.settings
    processes = "" if run.world.size == 1 else f" in {run.world.size} processes"
    copies = "two copies" if len(run.copies) == 2 else "one copy"
    if s.lora_rank is not None:
        copies = "two adapters on one frozen model" if len(run.copies) == 2 else "one adapter on a frozen model"
    trusted = f" and {s.val_batch_size} validation" if s.learned else ""
    how = f"lr_y {s.lr_y:g}, fixed weights {s.x_init}"
    if s.learned:
        moves = "auto at every step (lr_x, x_lr_schedule and upper_every are not used)"
        if s.x_has_rate:
            moves = f"{s.x_optimizer}, lr_x {s.lr_x:g} every {s.upper_every} steps"
        growing = "" if s.alpha_start is None else f"{s.alpha_start:g} growing to "
        how = f"lr_y {s.lr_y:g}, alpha {growing}{s.alpha:g}; x_optimizer {moves}"
    lines = [f"scores by method={s.method} on {run.world.device.type}{processes}"]
    if run.copies:
        lines = [
            f"{run.copies['w'].size / 1e6:.1f}M parameters, {copies} on {run.world.device.type}{processes}; "
            f"{run.steps} steps of {s.global_batch_size} training{trusted} samples",
            how,
        ]
    if len(run.copies) == 2:
        lines.append(f"{copies}: w is trained with validation data, u without; their losses differ by the gap")
    lines += _kept_back(run)
    if run.copies and drops(run.copies["w"].shape):
        lines.append(MASKS)
    lines += _rows(run)
    if run.lisa:
        lines.append(
            f"LISA: {s.lisa_layers} of {run.lisa.blocks} blocks train at a time, redrawn every {s.lisa_interval} steps"
        )
    if s.lora_rank is not None:
        lines += _adapters(run)
    sizes = run.train.sizes.tolist()
    tokens = tokens_of(run.train)
    found = zip(run.train.sources, sizes, tokens, run.train.read_as, run.train.dropped, run.train.notes, strict=True)
    for source, size, number, layout, dropped, notes in found:
        lines.append(f"  {source}: {size} samples{_dropped(dropped)}, read as: {layout}; {number:,} tokens")
        lines += [f"    warning: {note}" for note in notes]
    trained = "validation, trained on with weight 1" if s.val_in_training else "validation"
    for name, part in ((trained, run.val), ("test", run.test)):
        if part is not None:
            layouts = "; ".join(dict.fromkeys(part.read_as))
            lines.append(f"  {name}: {len(part)} samples{_dropped(sum(part.dropped))}, read as: {layouts}")
            lines += [
                f"    warning: {file.name}: {note}"
                for file, notes in zip(part.files, part.notes, strict=True)
                for note in notes
            ]
    lines += [f"WARNING: {overlap}" for overlap in read_overlaps(s.run_folder)]
    if run.step:
        lines.append(f"going on after step {run.step}, from its checkpoint")
    return "\n".join(lines)


def _kept_back(run: Run) -> list[str]:
    """How many validation records the training records are compared with, in runs that weigh records by it."""
    stream = run.streams.get("val")
    if not isinstance(stream, TrustedStream):
        return []
    if not stream.reserve:
        if len(run.val) > run.settings.val_batch_size and not run.weights.optimizer.sets_all:
            return []
        return [
            "WARNING: no record can be shown to be harmful, because each step reads all validation records, and none "
            "is left to compare with: give more of them, or a smaller val_batch_size"
        ]
    number = f"{stream.reserve} of {len(run.val)} validation records"
    lines = [f"{number} are kept back at first, so that training records can be compared with them"]
    if stream.reserve < FEW:
        lines.append(
            f"WARNING: {stream.reserve} are few: only faults of many records can be shown; give more validation "
            "records, or a smaller val_batch_size"
        )
    return lines


def _rows(run: Run) -> list[str]:
    """Whether rows are packed, and if not, why; nothing where a user expects padded rows."""
    s, device = run.settings, run.world.device
    if not run.copies or s.packing is False or (s.packing is None and device.type == "cpu"):
        return []
    w = run.copies["w"]
    if not w.packed:
        return [f"rows are padded: {why_padded(s, w.shape, device, 'bf16' if w.bf16 else 'fp32')}"]
    how = "torch's varlen_attn" if device.type == "cuda" else "one attention per row"
    return [f"rows are packed, by {s.attn_implementation or how}"]


def _adapters(run: Run) -> list[str]:
    """What trains in a run with adapters, and whether both share a pass."""
    s, w = run.settings, run.copies.get("w")
    if w is None:
        return []
    trained = sum(p.numel() for copy in run.copies.values() for p in copy.trained().values())
    lines = [f"LoRA of rank {s.lora_rank}: {trained / 1e6:.2f}M adapter parameters train, all others are frozen"]
    if len(run.copies) == 2 and not w.one_pass:
        lines.append(
            "u and w take passes of their own: with dropout each row of one pass would have a mask of its own, and "
            "layers of experts do not see whose row a token is of"
        )
    return lines


def what_next(settings: Settings, last: Path | None) -> str:
    """How to resume a run that has stopped early; last: its newest checkpoint."""
    begins_there = settings.resume == "auto" or last == Path(settings.resume)
    command = "the same command" if begins_there else "the same command with resume=auto"
    if last is None:
        return f"there is no checkpoint yet, {command} begins anew"
    return f"the last checkpoint is {last}, {command} goes on from it"


def or_finish(run: Run) -> str:
    """How to get the results of a run that was ended early."""
    if not run.copies or not run.step:
        return ""
    return f"; after `touch {shlex.quote(str(run.settings.run_folder / FINISH))}` it writes its results instead"


def _dropped(dropped: int) -> str:
    return f" ({dropped} records dropped: no response within max_length)" if dropped else ""
