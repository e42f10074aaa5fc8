"""Small runs of the real script on a slice of the shipped data."""

import hashlib
import json
import os
import signal
import struct
from pathlib import Path
from unittest import mock

import pandas as pd
import yaml

import train_bilevel
from bilevel.data.containers.kinds import items
from bilevel.run.state import Run
from bilevel.settings import written
from bilevel.settings.fields import Settings

ROOT = Path(__file__).parents[1]
SHIPPED = json.loads((ROOT / "data_alpaca_0.5" / "alpaca_synthetic.json").read_text(encoding="utf-8"))
TINY = {"model_type": "gpt2", "vocab_size": 400, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}


def emptied(records: list[dict]) -> list[dict]:
    return [record | {"output": "", "is_noisy": True} for record in records]


def dump(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def make_data(folder: Path, size: int = 96) -> Path:
    """train_clean, train_noisy (emptied), mixed/train_mixed, val and test from records of all kinds of task."""
    records = SHIPPED[:: len(SHIPPED) // (4 * size)]
    clean = [record | {"is_noisy": False} for record in records[:size]]
    noisy = emptied(records[size : 2 * size])
    dump(folder / "train_clean.json", clean)
    dump(folder / "train_noisy.json", noisy)
    dump(folder / "mixed" / "train_mixed.json", [r for pair in zip(clean, noisy, strict=True) for r in pair])
    dump(folder / "val.json", records[2 * size : 3 * size])
    dump(folder / "test.json", records[3 * size : 3 * size + 16])
    return folder


def settings(data: Path, out: Path, **changes) -> list[str]:
    """The command line of a small run into `out`."""
    values = {
        "train_data": [str(data / "train_*.json")],
        "val_data": [str(data / "val.json")],
        "test_data": [str(data / "test.json")],
        "model_config": TINY,
        "max_length": 128,
        "global_batch_size": 16,
        "val_batch_size": 16,
        "micro_batch_tokens": 16384,  # one or two micro-batches: a pass costs the same for few tokens as for many
        "upper_every": 1,
        "lr_y": 3e-3,
        "max_steps": 6,
        "eval_every": 3,
        "tracker": "none",
        "keep_checkpoints": 2,
        "output_dir": str(out),
    } | changes
    config = out.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(values))
    return ["--config", str(config)]


def train(data: Path, out: Path, **changes) -> pd.DataFrame:
    """Run the script to its end; returns metrics.csv."""
    assert train_bilevel.main(settings(data, out, **changes)) == 0
    return pd.read_csv(out / "metrics.csv")


def finished_run(folder: Path, files: list[Path], weights: pd.DataFrame, sizes: list[int] | None = None) -> Path:
    """What a run of these training files leaves, without the run: config.yaml, data.json and the weights.csv given.

    sizes: how many samples the records of each file became; None is one each.
    """
    folder.mkdir(parents=True)
    per_sample = "index" in weights
    values = {"train_data": [str(file) for file in files], "val_data": ["val.json"], "model_config": TINY}
    run = Settings(**values, weights="sample" if per_sample else "source", output_dir=str(folder))
    (folder / "config.yaml").write_text(written.dump(run), encoding="utf-8")
    data = []
    for number, file in enumerate(files):
        content = file.read_bytes()
        records = len(list(items(str(file), hashlib.sha256(content).hexdigest())))
        data.append({"file": file.name, "path": str(file.absolute()), "sha256": hashlib.sha256(content).hexdigest(),
                     "records": records, "samples": sizes[number] if sizes else records})  # fmt: skip
    (folder / "data.json").write_text(json.dumps({"train": data, "val": [], "test": []}), encoding="utf-8")
    weights.to_csv(folder / "weights.csv", index=False)
    return folder


def train_until(step: int, arguments: list[str], number: int = signal.SIGTERM) -> int:
    """Run the script, which gets a signal when this step, from 0, begins; the exit code."""
    one_step = train_bilevel.one_step

    def ended(run: Run) -> int:
        if run.step == step:
            os.kill(os.getpid(), number)
        return one_step(run)

    with mock.patch.object(train_bilevel, "one_step", ended):
        return train_bilevel.main(arguments)


def wandb_records(content: bytes) -> list:
    """The records in the file of an offline run: log blocks in LevelDB's format, of wandb's protobuf records."""
    from wandb.proto import wandb_internal_pb2

    records, part, place = [], b"", 7
    while place < len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def read_wandb(run_folder: Path) -> list[dict]:
    """The history of an offline run."""
    (file,) = run_folder.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file.read_bytes())
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]
