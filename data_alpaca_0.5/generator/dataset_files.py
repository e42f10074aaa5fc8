"""Read the source dataset and write the results of process.py."""

import hashlib
import json
import os
import re
import secrets
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SHIPPED = "alpaca_synthetic.json"
FILES = ("train_clean.json", "train_noisy.json", "val.json", "test.json", "mixed/train_mixed.json")
MANIFEST = "process.json"
MADE_BY = "data_alpaca_0.5/process.py"

Record = dict[str, object]


class UserError(Exception):
    """A mistake that the user can correct. The program ends with exit code 2."""


def as_lines(records: list[Record]) -> bytes:
    """The records as a JSON array with one record per line."""
    rows = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    return ("[\n" + ",\n".join(rows) + "\n]\n").encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def locate(source: str) -> Path | None:
    """The local file that a source names, or None for a dataset of the hub."""
    path = HERE / SHIPPED if source == SHIPPED else Path(source)
    if path.is_file():
        return path
    looks_like_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and path.suffix not in (".json", ".jsonl")
    if path.exists() or not looks_like_id:
        problem = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"source {path} {problem}; give a .json or .jsonl file, or a dataset id of the hub")
    return None


def load_hub(name: str) -> list[object]:
    try:
        from datasets import load_dataset

        return load_dataset(name, split="train").to_list()
    except Exception as error:  # the hub client raises many unrelated types
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(
            f"cannot load {name} from the hub ({reason}). "
            "If there is no network, give a local .json or .jsonl file with --source"
        ) from None


def parse_json(where: str, content: bytes) -> object:
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None


def parse(path: Path, content: bytes) -> list[object]:
    """The records in a JSON array or in JSON Lines."""
    content = content.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some editors
    if content.lstrip().startswith(b"["):
        return parse_json(str(path), content)
    lines = enumerate(content.split(b"\n"), 1)
    return [parse_json(f"{path}, line {number},", line) for number, line in lines if line.strip()]


def check_record(where: str, record: object) -> Record:
    """The record with its three fields first; a missing input becomes an empty string. Raises UserError."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object but {json.dumps(record)[:60]}")
    fields = {"input": ""} | {name: value for name, value in record.items() if name != "input" or value is not None}
    for name in ("instruction", "input", "output"):
        if not isinstance(fields.get(name), str):
            problem = f"field {name!r} is {fields[name]!r}, not text" if name in fields else f"no field {name!r}"
            raise UserError(f"{where}: {problem}")
    if "is_noisy" in fields:
        raise UserError(f"{where} has a field is_noisy, so it was written by process.py; give the original dataset")
    try:
        as_lines([fields])
    except ValueError as error:
        raise UserError(f"{where} cannot be written as JSON in UTF-8: {error}") from None
    return {name: fields[name] for name in ("instruction", "input", "output")} | fields


def load(source: str, out: Path) -> tuple[list[Record], str]:
    """The checked records of the source, and its checksum. Raises UserError."""
    path = locate(source)
    if path is None:
        records = load_hub(source)
        digest = sha256(json.dumps(records, default=str).encode())
    else:
        if path.resolve() in [(out / name).resolve() for name in FILES]:
            raise UserError(f"source {path} is also an output file; give another --out")
        content = path.read_bytes()
        records, digest = parse(path, content), sha256(content)
    if not records:
        raise UserError(f"{path or source} has no records")
    return [check_record(f"{path or source}: record {i} (from 0)", r) for i, r in enumerate(records)], digest


def read_manifest(out: Path) -> dict[str, object]:
    """The manifest of an earlier run; empty if there is none or another program wrote it."""
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    ours = isinstance(manifest, dict) and manifest.get("made_by") == MADE_BY
    whole = ours and {"settings", "from_flags", "source", "files"} <= manifest.keys()
    return manifest if whole else {}


def check_out(out: Path, manifest: dict[str, object], contents: dict[str, bytes], force: bool) -> None:
    """Raise UserError if a file to be replaced or removed was not written by this program or was changed since."""
    present = {name: sha256((out / name).read_bytes()) for name in FILES if (out / name).exists()}
    before = manifest.get("files", {})
    after = {name: sha256(content) for name, content in contents.items()}
    foreign = [name for name, digest in present.items() if digest not in (before.get(name), after.get(name))]
    if (out / MANIFEST).exists() and not manifest:
        foreign.append(MANIFEST)
    if foreign and not force:
        raise UserError(
            f"{out} has files that process.py did not write or that were changed since: {', '.join(foreign)}. "
            "Move them away, choose another --out, or replace them with --force"
        )


def write(out: Path, contents: dict[str, bytes]) -> None:
    """Write all files under temporary names, remove files of an earlier run without a successor, then rename."""
    aside = {out / name: (out / name).with_name(f".{secrets.token_hex(8)}.new") for name in contents}
    try:
        for (path, temporary), content in zip(aside.items(), contents.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:  # a random name: nobody's file is opened
                file.write(content)
        for name in set(FILES) - set(contents):
            (out / name).unlink(missing_ok=True)
        for path, temporary in aside.items():
            os.replace(temporary, path)
    finally:
        for temporary in aside.values():
            temporary.unlink(missing_ok=True)
