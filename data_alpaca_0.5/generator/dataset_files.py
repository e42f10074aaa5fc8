"""Reading the source and writing the results, for process.py."""

import hashlib
import json
import os
import re
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SHIPPED = "alpaca_synthetic.json"
FILES = ("train_clean.json", "train_noisy.json", "val.json", "test.json", "mixed/train_mixed.json")
MANIFEST = "process.json"
MADE_BY = "data_alpaca_0.5/process.py"

Record = dict[str, object]


class UserError(Exception):
    """Something the user can put right; ends the program with exit code 2."""


def as_lines(records: list[Record]) -> bytes:
    """A JSON array with one record per line."""
    rows = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    return ("[\n" + ",\n".join(rows) + "\n]\n").encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def locate(source: str) -> Path | None:
    """The local file a source means, or None for a data set of the hub."""
    path = HERE / SHIPPED if source == SHIPPED else Path(source)
    if path.is_file():
        return path
    looks_like_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and path.suffix not in (".json", ".jsonl")
    if path.exists() or not looks_like_id:
        problem = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"source {path} {problem}; give a .json or .jsonl file or a hub data set id")
    return None


def load_hub(name: str) -> list[object]:
    try:
        from datasets import load_dataset

        return load_dataset(name, split="train").to_list()
    except Exception as error:  # the hub client raises many unrelated types
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(
            f"cannot load {name} from the hub ({reason}). "
            "Without a network, give a local .json or .jsonl file with --source"
        ) from None


def parse_json(where: str, content: bytes) -> object:
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None


def parse(path: Path, content: bytes) -> list[object]:
    """The records of a JSON array or of JSON lines."""
    content = content.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some editors
    if content.lstrip().startswith(b"["):
        return parse_json(str(path), content)
    lines = enumerate(content.split(b"\n"), 1)
    return [parse_json(f"{path}, line {number},", line) for number, line in lines if line.strip()]


def check_record(where: str, record: object) -> Record:
    """The record with its three fields first and an input in any case."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object but {json.dumps(record)[:60]}")
    fields = {"input": ""} | {name: value for name, value in record.items() if name != "input" or value is not None}
    for name in ("instruction", "input", "output"):
        if not isinstance(fields.get(name), str):
            problem = f"field {name!r} is {fields[name]!r}, not text" if name in fields else f"no field {name!r}"
            raise UserError(f"{where}: {problem}")
    if "is_noisy" in fields:
        raise UserError(f"{where} is marked is_noisy: it was made by process.py; give the original data set")
    try:
        as_lines([fields])
    except ValueError as error:
        raise UserError(f"{where} cannot be written as JSON in UTF-8: {error}") from None
    return {name: fields[name] for name in ("instruction", "input", "output")} | fields


def load(source: str, out: Path) -> tuple[list[Record], str]:
    """The checked records of the source and its checksum."""
    path = locate(source)
    if path is None:
        records = load_hub(source)
        digest = sha256(json.dumps(records, default=str).encode())
    else:
        if path.resolve() in [(out / name).resolve() for name in FILES]:
            raise UserError(f"source {path} is a file that would be written; give another --out")
        content = path.read_bytes()
        records, digest = parse(path, content), sha256(content)
    if not records:
        raise UserError(f"{path or source} holds no records")
    return [check_record(f"{path or source}: record {i} (from 0)", r) for i, r in enumerate(records)], digest


def read_manifest(out: Path) -> dict[str, object]:
    """What an earlier run wrote about its files; empty if there is none or it is not ours."""
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    ours = isinstance(manifest, dict) and manifest.get("made_by") == MADE_BY
    whole = ours and {"settings", "from_flags", "source", "files"} <= manifest.keys()
    return manifest if whole else {}


def check_out(out: Path, manifest: dict[str, object], contents: dict[str, bytes], force: bool) -> None:
    """Stop if a file to be replaced or removed is not as this program wrote or would write it."""
    present = {name: sha256((out / name).read_bytes()) for name in FILES if (out / name).exists()}
    before = manifest.get("files", {})
    after = {name: sha256(content) for name, content in contents.items()}
    foreign = [name for name, digest in present.items() if digest not in (before.get(name), after.get(name))]
    if (out / MANIFEST).exists() and not manifest:
        foreign.append(MANIFEST)
    if foreign and not force:
        raise UserError(
            f"in the way in {out}: {', '.join(foreign)}, not written by process.py or changed since. "
            "Move it, choose another --out, or replace it with --force"
        )


def write(out: Path, contents: dict[str, bytes]) -> None:
    """Write all files aside, remove those of an earlier run that have no successor, then rename."""
    aside = {out / name: (out / name).with_name(f".{Path(name).name}.{os.getpid()}") for name in contents}
    try:
        for (path, temporary), content in zip(aside.items(), contents.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
        for name in set(FILES) - set(contents):
            (out / name).unlink(missing_ok=True)
        for path, temporary in aside.items():
            os.replace(temporary, path)
    finally:
        for temporary in aside.values():
            temporary.unlink(missing_ok=True)
