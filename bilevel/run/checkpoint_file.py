"""A checkpoint on the disk: every process's tensors and facts in files of its own, under a manifest with checksums."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

State = dict[str, Any]
SEPARATOR = " > "  # between the keys of a tensor's path


class DamagedCheckpoint(Exception):
    """A checkpoint is not what was written; the message says how."""


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
    """Raises DamagedCheckpoint unless manifest and this process's files are what was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        sealed = manifest.pop("sha256")
        if sealed != _digest(manifest):
            raise DamagedCheckpoint("manifest.json has been changed")
        if name_of(manifest["step"]) != path.name:
            raise DamagedCheckpoint(f"it is {name_of(manifest['step'])} under another name")
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


def name_of(step: int) -> str:
    """Of a checkpoint's folder."""
    return f"step_{step:06d}"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _plain(value: dict[str, Any]) -> bool:
    return not any(isinstance(inner, (torch.Tensor, dict)) for inner in value.values())


def sync(path: Path) -> None:
    """What has been written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
