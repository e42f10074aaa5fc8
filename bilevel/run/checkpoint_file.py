"""A checkpoint on the disk: a tensor file and a JSON file per process, and a manifest with checksums."""

import contextlib
import hashlib
import json
import re
import stat
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bilevel.errors import short
from bilevel.files import open_regular, remove_unfinished, sync

State = dict[str, Any]
STATE_VERSION = 3  # raise it when older states can no longer be resumed
SEPARATOR = " > "  # between the keys of a tensor's path


class DamagedCheckpoint(Exception):
    """A checkpoint differs from what was written; the message says how."""


def split(state: State, path: tuple[str, ...] = ()) -> tuple[dict[str, torch.Tensor], State]:
    """Split a nested state into its tensors by path and the same nesting without tensors."""
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
    """The nested state that split took apart."""
    for path, tensor in tensors.items():
        *keys, last = path.split(SEPARATOR)
        place = facts
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = tensor
    return facts


def write_state(folder: Path, rank: int, tensors: dict[str, torch.Tensor], facts: State) -> None:
    """Write one process's part and its checksums; they are on the disk when this returns."""
    names = files_of(rank)
    safetensors.torch.save_file(tensors, folder / names[0])
    (folder / names[1]).write_text(json.dumps(facts), encoding="utf-8")
    for name in names:
        sync(folder / name)
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
    sync(path)
    for path in sums:
        path.unlink()


def verify(path: Path, rank: int) -> None:
    """Raises DamagedCheckpoint if the manifest or this process's files differ from what was written."""
    manifest = read_manifest(path)
    if name_of(manifest["step"]) != path.name:
        raise DamagedCheckpoint(f"it is {name_of(manifest['step'])} under another name")
    missing = [name for name in files_of(min(rank, manifest["processes"] - 1)) if name not in manifest["files"]]
    missing += [name for name in manifest["files"] if not _OURS.fullmatch(name) or not (path / name).is_file()]
    if missing:
        raise DamagedCheckpoint(f"{short(missing[0])} is missing")
    for name, expected in manifest["files"].items():
        try:
            if name in files_of(rank) and fingerprint(path / name) != expected:
                raise DamagedCheckpoint(f"{name} has been changed")
        except OSError as error:
            raise DamagedCheckpoint(f"{name} cannot be read ({error})") from None


# Keys of a manifest and their types; it also has a checksum of all of them.
FACTS = {"version": int, "step": int, "processes": int, "settings": dict, "data": dict, "files": dict}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises DamagedCheckpoint if it is missing, changed or malformed."""
    try:
        with open_regular(path / "manifest.json") as file:
            manifest = json.loads(file.read())
        sealed = manifest.pop("sha256")
        if sealed != _digest(manifest):
            raise DamagedCheckpoint("manifest.json has been changed")
        manifest.setdefault("version", 0)
        wrong = [name for name, kind in FACTS.items() if type(manifest.get(name)) is not kind]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"manifest.json cannot be read ({error})") from None
    if wrong or manifest["step"] < 0 or manifest["processes"] < 1:
        raise DamagedCheckpoint(f"manifest.json is not what a run writes ({', '.join(wrong) or 'step, processes'})")
    return manifest


def files_of(rank: int) -> tuple[str, str]:
    """The files of one process."""
    return f"rank{rank}.safetensors", f"rank{rank}.json"


_OURS = re.compile(r"rank\d+\.(safetensors|json|sums)|manifest\.json")


def remove(folder: Path) -> None:
    """Remove a checkpoint, whole or not. Files that no run has written stay, and then the folder stays, too."""
    with contextlib.suppress(OSError):  # a checkpoint that stays only takes space
        remove_unfinished(folder)
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and stat.S_ISREG(path.lstat().st_mode):
                path.unlink()
        folder.rmdir()


def clear(folder: Path) -> int:
    """Remove all checkpoints in a run's folder of checkpoints, whole or not, and the folder; return their bytes.

    Files that no run has written stay.
    """
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_[0-9]+(\.partial|\.aside)?", path.name)]
    size = sum(_size(path) for path in found)
    for path in found:
        remove(path)
    size -= sum(_size(path) for path in found)
    with contextlib.suppress(OSError):
        folder.rmdir()
    return size


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.glob("*")) if folder.is_dir() else 0


def read_state(path: Path, rank: int) -> State:
    """One process's state; call `verify` first. Raises DamagedCheckpoint if the files do not hold a state."""
    tensors, facts = files_of(rank)
    try:
        return join(safetensors.torch.load_file(path / tensors), json.loads((path / facts).read_bytes()))
    except (safetensors.SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{type(error).__name__} {short(str(error), 300)}") from None
    except RecursionError:
        raise DamagedCheckpoint(f"{facts} is nested too deeply") from None


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with open_regular(path) as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder, whatever its ending."""
    return int(path.stem.removeprefix("step_"))


def steps_in(folder: Path, ending: str) -> list[Path]:
    """The folders with the name of a checkpoint and this ending, in order of steps."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(rf"step_[0-9]+{re.escape(ending)}", path.name)]
    return sorted(found, key=step_of)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _plain(value: dict[str, Any]) -> bool:
    return not any(isinstance(inner, (torch.Tensor, dict)) for inner in value.values())
