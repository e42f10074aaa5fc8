"""Which files of a run hold the user's paths and records, and that none holds the account or the environment.

docs/reading-the-result.md says so under "Before you pass a run on".
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT, SHIPPED, dump, make_data, settings, wandb_records

HOME = "home-of-4711"  # the folder that all paths of the user lead through
TEXT = "zq91 the text of a record 19qz"
CONFIG = "folder-of-settings-5512"  # only the command line has it
SECRETS = {
    "USER": "user-zz-0815",
    "LOGNAME": "user-zz-0815",
    "HOSTNAME": "host-yy-3344",
    "SERVICE_TOKEN": "token-77-of-a-service",
    "HF_TOKEN": "hf_8765432100planted",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "feedbeef",
}
# What is looked for -> the files of a run that hold it; {wandb} is the folder of the offline run.
HOLD = {
    HOME: {
        *("config.yaml", "data.json", "report.html", "run.log", "checkpoints/step_000002/manifest.json"),
        *("{wandb}/run.wandb", "{wandb}/logs/debug.log"),
    },
    TEXT: {"report.html"},
    CONFIG: set(),
    str(ROOT): {"run.log"},  # the commands that come next are typed there
    sys.executable: set(),
} | {secret: set() for secret in SECRETS.values()}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a per-sample run, with wandb offline, of records that stand in val, too."""
    home = tmp_path_factory.mktemp("a") / HOME
    data, out = make_data(home / "data", size=24), home / "project" / "r"
    mixed = data / "mixed" / "train_mixed.json"
    planted = SHIPPED[0] | {"instruction": "Say it.", "input": "", "output": TEXT}
    for file in (mixed, data / "val.json"):
        dump(file, [planted, *json.loads(file.read_text())])
    changes = {"train_data": [str(mixed)], "weights": "sample", "tracker": "wandb", "max_steps": 2, "save_every": 2}
    settings(data, out, **changes, global_batch_size=4, val_batch_size=4)
    (home / CONFIG).mkdir()
    config = out.with_suffix(".yaml").rename(home / CONFIG / "c.yaml")
    environment = os.environ | SECRETS | {"HOME": str(home), "WANDB_MODE": "offline"}
    command = [sys.executable, ROOT / "train_bilevel.py", "--config", config]
    subprocess.run(command, env=environment, cwd=home, check=True, capture_output=True)
    files = [path for path in out.rglob("*") if path.is_file() and not path.is_symlink()]
    return {_name(path, out): path.read_bytes() for path in files}


def _name(path: Path, out: Path) -> str:
    """The path in the run's folder, without the parts that differ from run to run."""
    parts = path.relative_to(out).parts
    if parts[0] == "wandb" and len(parts) > 2:
        return "{wandb}/" + ("run.wandb" if path.suffix == ".wandb" else "/".join(parts[2:]))
    return "/".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize("what", HOLD)
def test_the_files_hold_what_the_docs_say(told: dict[str, bytes], what: str) -> None:
    assert len(told) > 20 and "{wandb}/run.wandb" in told
    found = {name for name, content in told.items() if what.encode() in content}
    assert found == HOLD[what]


@pytest.mark.slow
def test_wandb_gets_no_host_and_no_command_line(told: dict[str, bytes]) -> None:
    """Its record of the environment has them, the programs and the disks."""
    kinds = [record.WhichOneof("record_type") for record in wandb_records(told["{wandb}/run.wandb"])]
    assert kinds.count("run") == 1 and "environment" not in kinds
    (run,) = (r.run for r in wandb_records(told["{wandb}/run.wandb"]) if r.WhichOneof("record_type") == "run")
    assert run.host == "" and not run.HasField("git")
    assert "{wandb}/files/requirements.txt" not in told
