"""Checkpoints: everything that a run needs to go on as if it had never stopped; complete or absent.

    checkpoints/step_000100/rank0.safetensors   tensors of process 0, by their path in its state
                            rank0.json          everything else of its state
                            manifest.json       the run's settings and data, size and sha256 of every file

bilevel.run.state.Run.state_dict makes the state: a nested mapping of tensors and JSON values. It is copied to host
memory between two steps and written by a thread into `step_000100.partial`, which is renamed when all processes have
written their part. No pickle is used.
"""

import contextlib
import logging
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from bilevel.errors import UserError, first, plain, short
from bilevel.files import sync
from bilevel.processes import World
from bilevel.run.checkpoint_file import (
    STATE_VERSION,
    DamagedCheckpoint,
    State,
    clear,
    name_of,
    read_manifest,
    read_state,
    remove,
    split,
    step_of,
    steps_in,
    verify,
    write_manifest,
    write_state,
)
from bilevel.settings.written import differing

if TYPE_CHECKING:
    from bilevel.run.state import Run

log = logging.getLogger("bilevel")

NOT_OURS = "{} holds a state that this run cannot go on from: {}. Give another checkpoint or output_dir"
ASIDE = ".aside"  # ends the name of a checkpoint that was set aside


class Checkpoints:
    """The checkpoints of a run. All processes write them together, so call every method on all processes."""

    def __init__(self, folder: Path, world: World, settings: dict[str, Any], data: dict[str, str], keep: int):
        """settings, data: a checkpoint belongs to these; data has a fingerprint of each file's samples."""
        self.folder, self.world, self.keep = folder, world, keep
        self.settings, self.data = settings, data
        self.writing: _Writing | None = None
        self.step: int | None = None  # step of the newest checkpoint, complete or being written
        self.last: Path | None = None  # the newest complete one, or the one from which the run resumed
        self.seen = self.all()  # at the start

    def begin(self, step: int, state: State) -> None:
        """Copy the state to host memory and start to write it."""
        self.finish()
        self.step = step
        self.writing = _Writing(self.folder / f"{name_of(step)}.partial", step, state, self.world)

    def poll(self) -> None:
        """Complete the checkpoint being written if all processes have written their part. Cheap; call once per step."""
        if self.writing is not None:
            self._complete(wait=False)

    def finish(self) -> bool:
        """Wait for the checkpoint being written, if any; return whether it is complete."""
        return self.writing is None or self._complete(wait=True)

    def _complete(self, wait: bool) -> bool:
        writing = self.writing
        if wait:
            writing.thread.join()
        if self.world.sum(torch.tensor(int(not writing.thread.is_alive()))) < self.world.size:
            return False
        self.writing = None
        errors = self.world.gather(writing.error)
        if self.world.main:
            if not any(errors):
                errors[0] = self._publish(writing)
            if found := [(rank, error) for rank, error in enumerate(errors) if error]:
                remove(writing.folder)
                rank, error = found[0]
                log.warning(
                    f"step {writing.step}: NO CHECKPOINT WRITTEN to {self.folder}: {error}"
                    + (f" (process {rank})" if rank else "")
                    + ". The run goes on and will try again; the checkpoints before are as they were"
                )
        complete = self.world.gather(not any(errors))[0]
        self.step = writing.step if complete else None
        self.last = self.folder / name_of(writing.step) if complete else self.last
        return complete

    def _publish(self, writing: "_Writing") -> str | None:
        """On the main process: seal the checkpoint and remove those beyond `keep`. Returns the problem, or None."""
        try:
            facts = {"version": STATE_VERSION, "step": writing.step, "processes": self.world.size}
            write_manifest(writing.folder, facts | {"settings": self.settings, "data": self.data})
            final = self.folder / name_of(writing.step)
            if final.exists():  # of the same step: damaged, or the run resumed from another folder
                remove(final)
            writing.folder.rename(final)
            sync(self.folder)
        except OSError as error:
            return str(error)
        before = [path for path in [*self.all(ASIDE), *self.all()] if path != final]
        for old in before[: max(0, len(before) + 1 - self.keep)]:
            remove(old)
        return None

    def discard(self, step: int) -> None:
        """Remove the checkpoint of a step, and the folder of the checkpoints if it was the only one."""
        if self.world.main:
            remove(self.folder / name_of(step))
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def clear(self) -> int:
        """Remove all checkpoints; return their bytes. To be called when the results are written."""
        return clear(self.folder) if self.world.main else 0

    def all(self, ending: str = "") -> list[Path]:
        """The complete checkpoints in order of steps; with ending ASIDE, those that were set aside."""
        return steps_in(self.folder, ending)

    def set_aside(self, step: int) -> None:
        """On the main process: set aside checkpoints beyond the step from which the run resumes.

        They were damaged or left behind. They are removed first when newer checkpoints are written.
        """
        for path in self.all():
            if step_of(path) > step:
                aside = path.with_name(path.name + ASIDE)
                remove(aside)  # set aside earlier, of the same step
                path.rename(aside)
                sync(self.folder)
                log.warning(f"{path} is beyond step {step}, after which the run goes on: set aside as {aside.name}")

    def read(self, resume: str) -> State | None:
        """This process's state in the checkpoint to resume from, or None. Raises UserError.

        resume: auto (the newest complete checkpoint in this folder), never (None), or the path of a checkpoint.
        """
        if resume == "never":
            return None
        path = self._newest() if resume == "auto" else Path(resume)
        if path is None:
            return None
        if resume != "auto" and (problem := self._problem(path)):
            raise UserError(f"resume {path}: {problem}; give another checkpoint or resume=auto")
        state = self._read(path)
        self.last, own = path, self.folder / name_of(state["step"])
        self.step = state["step"] if path.resolve() == own.resolve() else None
        return state

    def _newest(self) -> Path | None:
        """The newest checkpoint that is whole on all processes. Warns about damaged ones and passes over them."""
        for path in reversed(self.all()):
            problem = self._problem(path)
            if problem is None:
                return path
            if self.world.main:
                log.warning(f"{path} is damaged and passed over: {problem}")
        return None

    def _problem(self, path: Path) -> str | None:
        """A problem with the checkpoint on any process, or None."""
        try:
            verify(path, self.world.rank)
            problem = None
        except DamagedCheckpoint as error:
            problem = str(error)
        bad = int(self.world.sum(torch.tensor(int(problem is not None))))
        return problem or ("on another process" if bad else None)

    def _read(self, path: Path) -> State:
        manifest = read_manifest(path)
        if manifest["version"] != STATE_VERSION:
            raise UserError(
                f"{path} was written by another version of this tool: finish the run with that one, or give another "
                "output_dir"
            )
        if manifest["processes"] != self.world.size:
            raise UserError(
                f"{path} was written by {manifest['processes']} processes and this run has {self.world.size}: each "
                "holds a share of its own; start as many, or give another output_dir"
            )
        if found := differing(manifest["settings"], self.settings):
            raise UserError(f"{path} is of another configuration: {found}; change it back, or give another output_dir")
        then = manifest["data"]
        if changed := sorted(name for name in then.keys() | self.data.keys() if then.get(name) != self.data.get(name)):
            names = ", ".join(first(changed, 10, lambda name: plain(name, 100)))
            raise UserError(
                f"{path} was made from other data ({names}): a file, or what turns it into tokens, has "
                "changed; put it back, or give another output_dir"
            )
        try:
            state = read_state(path, self.world.rank)
            if state["step"] != manifest["step"]:
                raise DamagedCheckpoint(f"its state is of step {short(state['step'])}")
        except (DamagedCheckpoint, KeyError) as error:
            raise UserError(NOT_OURS.format(path, error)) from None
        return state


def restore(run: "Run", state: State, checkpoints: Checkpoints) -> None:
    """Resume a run from the state that was read. Raises UserError if it is not a state of this run."""
    problem = f"it is of step {state['step']}, and the run has {run.steps}" if state["step"] > run.steps else None
    if problem is None:
        try:
            if state["x"]["x"].shape != run.weights.x.shape:
                raise ValueError(f"x has the shape {tuple(state['x']['x'].shape)}")
            if state["x"]["x"].isnan().any():
                raise ValueError("x is NaN")
            run.load_state_dict(state)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            problem = f"{type(error).__name__} {short(str(error), 300)}"
    if found := [problem for problem in run.world.gather(problem) if problem]:
        raise UserError(NOT_OURS.format(checkpoints.last, found[0]))


class _Writing:
    """A checkpoint that is being written; one thread per process writes its part."""

    def __init__(self, folder: Path, step: int, state: State, world: World):
        self.folder, self.step, self.rank = folder, step, world.rank
        self.error: str | None = None
        if world.main:
            for left in steps_in(folder.parent, ".partial"):  # left by a run that was killed
                remove(left)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                self.error = str(error)
        world.wait()
        tensors, self.facts = split(state)
        self.size = int(world.sum(torch.tensor(sum(tensor.nbytes for tensor in tensors.values()))))  # of all processes
        self.tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        self.thread = threading.Thread(target=self._write, name="checkpoint")
        self.thread.start()

    def _write(self) -> None:
        try:
            free = shutil.disk_usage(self.folder).free
            if free < 1.05 * self.size:
                raise OSError(f"{free / 1e9:.2f} GB are free on the disk, {self.size / 1e9:.2f} GB are needed")
            write_state(self.folder, self.rank, self.tensors, self.facts)
        except (OSError, safetensors.SafetensorError) as error:
            self.error = self.error or str(error)
        finally:
            self.tensors = {}
