"""Checkpoints: all that a run needs to go on as if it had never stopped; complete or absent.

    checkpoints/step_000100/rank0.safetensors   tensors of process 0, by their path in its state
                            rank0.json          everything else of its state
                            manifest.json       the run's settings and data, size and sha256 of every file

A state is a nested mapping of tensors and JSON values. It is copied to host memory between two steps and written by a
thread into `step_000100.partial`, which is renamed when all processes have written theirs. Reading needs no pickle.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from bilevel.config import UserError, differing
from bilevel.world import World

log = logging.getLogger("bilevel")

State = dict[str, Any]
SEPARATOR = " > "  # between the keys of a tensor's path


class DamagedCheckpoint(Exception):
    """A checkpoint is not what was written; the message says how."""


class Checkpoints:
    """The checkpoints of a run, written by all its processes together: every method is called on all of them."""

    def __init__(self, folder: Path, world: World, settings: dict[str, Any], data: dict[str, str], keep: int):
        """settings, data: what a checkpoint is of; data has a fingerprint of each file's samples."""
        self.folder, self.world, self.keep = folder, world, keep
        self.settings, self.data = settings, data
        self.writing: _Writing | None = None
        self.step: int | None = None  # of the newest, complete or in the making

    def begin(self, step: int, state: State) -> None:
        """Copy the state to host memory and start to write it."""
        self.finish()
        self.step = step
        self.writing = _Writing(self.folder / f"{_name(step)}.partial", step, state, self.world)

    def poll(self) -> None:
        """Complete the checkpoint in the making if all processes have written their part. Cheap; once per step."""
        if self.writing is not None:
            self._complete(wait=False)

    def finish(self) -> bool:
        """Wait for the checkpoint in the making, if any; whether it is complete now."""
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
                shutil.rmtree(writing.folder, ignore_errors=True)
                rank, error = found[0]
                log.warning(
                    f"step {writing.step}: NO CHECKPOINT WRITTEN to {self.folder}: {error}"
                    + (f" (process {rank})" if rank else "")
                    + ". The run goes on and will try again; the checkpoints before are as they were"
                )
        complete = self.world.gather(not any(errors))[0]
        self.step = writing.step if complete else None
        return complete

    def _publish(self, writing: "_Writing") -> str | None:
        """On the main process: seal what all have written, and remove checkpoints beyond `keep`; what went wrong."""
        try:
            facts = {"processes": self.world.size, "settings": self.settings, "data": self.data}
            write_manifest(writing.folder, {"step": writing.step} | facts)
            final = self.folder / _name(writing.step)
            if final.exists():  # of the same step, from before a resume that had found it damaged
                shutil.rmtree(final)
            writing.folder.rename(final)
            _sync(self.folder)
        except OSError as error:
            return str(error)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return None

    def all(self) -> list[Path]:
        """The checkpoints that have been completed, in order of steps."""
        found = [path for path in self.folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))

    def read(self, resume: str) -> State | None:
        """This process's state in the checkpoint to go on from, None without one. Raises UserError.

        resume: auto takes the newest of this folder that is whole, never takes none, and a path that one.
        """
        if resume == "never":
            return None
        path = self._newest() if resume == "auto" else Path(resume)
        if path is None:
            return None
        if resume != "auto" and (problem := self._problem(path)):
            raise UserError(f"resume {path}: {problem}; give another checkpoint or resume=auto")
        state = self._read(path)
        self.step = state["step"] if path.parent == self.folder else None
        return state

    def _newest(self) -> Path | None:
        """The newest checkpoint that is whole on all processes; damaged ones are warned about and passed over."""
        for path in reversed(self.all()):
            problem = self._problem(path)
            if problem is None:
                return path
            if self.world.main:
                log.warning(f"{path} is damaged and passed over: {problem}")
        return None

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint on any process; the main one tells."""
        try:
            verify(path, self.world.rank)
            problem = None
        except DamagedCheckpoint as error:
            problem = str(error)
        bad = int(self.world.sum(torch.tensor(int(problem is not None))))
        return problem or ("on another process" if bad else None)

    def _read(self, path: Path) -> State:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["processes"] != self.world.size:
            raise UserError(
                f"{path} was written by {manifest['processes']} processes and this run has {self.world.size}: each "
                "holds a share of its own; start as many, or give another output_dir"
            )
        if found := differing(manifest["settings"], self.settings):
            raise UserError(f"{path} is of another configuration: {found}; change it back, or give another output_dir")
        then = manifest["data"]
        if changed := sorted(name for name in then.keys() | self.data.keys() if then.get(name) != self.data.get(name)):
            raise UserError(
                f"{path} was made from other data ({', '.join(changed)}): a file, or what turns it into tokens, has "
                "changed; put it back, or give another output_dir"
            )
        return read_state(path, self.world.rank)


class _Writing:
    """A checkpoint in the making: one thread per process writes its part."""

    def __init__(self, folder: Path, step: int, state: State, world: World):
        self.folder, self.step, self.rank = folder, step, world.rank
        self.error: str | None = None
        if world.main:
            for left in folder.parent.glob("step_*.partial"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
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


# ----------------------------------------------------------------------------------------------------------------------
# files


def split(state: State, path: tuple[str, ...] = ()) -> tuple[dict[str, torch.Tensor], State]:
    """A nested state into its tensors by path, and the same nesting without them."""
    tensors, facts = {}, {}
    for key, value in state.items():
        here = (*path, str(key))
        if isinstance(value, torch.Tensor):
            tensors[SEPARATOR.join(here)] = value
        elif isinstance(value, dict) and not _plain(value):
            inner, facts[key] = split(value, here)
            tensors |= inner
        else:
            facts[key] = value
    return tensors, facts


def join(tensors: dict[str, torch.Tensor], facts: State) -> State:
    """What split took apart."""
    for path, tensor in tensors.items():
        *keys, last = path.split(SEPARATOR)
        place = facts
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = tensor
    return facts


def write_state(folder: Path, rank: int, tensors: dict[str, torch.Tensor], facts: State) -> None:
    """One process's part, and its checksums, on the disk when this returns."""
    names = [f"rank{rank}.safetensors", f"rank{rank}.json"]
    safetensors.torch.save_file(tensors, folder / names[0])
    (folder / names[1]).write_text(json.dumps(facts), encoding="utf-8")
    for name in names:
        _sync(folder / name)
    sums = {name: fingerprint(folder / name) for name in names}
    (folder / f"rank{rank}.sums").write_text(json.dumps(sums), encoding="utf-8")


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Seal a checkpoint: gather the processes' checksums into one file."""
    sums = [folder / f"rank{rank}.sums" for rank in range(facts["processes"])]
    files: dict[str, Any] = {}
    for path in sums:
        files |= json.loads(path.read_text(encoding="utf-8"))
    manifest = facts | {"files": files}
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1), encoding="utf-8")
    _sync(path)
    for path in sums:
        path.unlink()


def verify(path: Path, rank: int) -> None:
    """Raises DamagedCheckpoint unless manifest and this process's files are what was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        sealed = manifest.pop("sha256")
        if sealed != _digest(manifest) or _name(manifest["step"]) != path.name:
            raise DamagedCheckpoint("manifest.json has been changed")
        for name, expected in manifest["files"].items():
            if not (path / name).is_file():
                raise DamagedCheckpoint(f"{name} is missing")
            if name.startswith(f"rank{rank}.") and fingerprint(path / name) != expected:
                raise DamagedCheckpoint(f"{name} has been changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"manifest.json cannot be read ({error})") from None


def read_state(path: Path, rank: int) -> State:
    """One process's state."""
    tensors = safetensors.torch.load_file(path / f"rank{rank}.safetensors")
    return join(tensors, json.loads((path / f"rank{rank}.json").read_text(encoding="utf-8")))


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _plain(value: dict[str, Any]) -> bool:
    return not any(isinstance(inner, (torch.Tensor, dict)) for inner in value.values())


def _sync(path: Path) -> None:
    """What has been written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
