"""run_F2SA.sh: environment, flags, data folders, and the choice of a configuration."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from run_helpers import ROOT, make_data, settings

from bilevel.config import ConfigError, load_settings

ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME", "HF_DATASETS_CACHE")}


def launch(*flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "run_F2SA.sh") if cwd != ROOT else "run_F2SA.sh", *flags],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def dry_run(*flags: str, cwd: Path = ROOT, **environment: str) -> dict:
    """The settings that the launcher would run with, in a folder that does not exist yet."""
    done = launch(*flags, cwd=cwd, DRY_RUN="1", output_dir="nowhere", **environment)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout[done.stdout.index("train_data:") :])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("my data"))


def test_without_a_gpu_it_takes_tiny_and_says_so():
    done = launch(DRY_RUN="1", output_dir="nowhere")
    assert "run_F2SA.sh: ./configs/tiny.yaml (no GPU was found); CONFIG=FILE chooses another" in done.stdout
    assert "run_name: tiny\n" in done.stdout


def test_with_a_gpu_it_takes_gpt2(tmp_path: Path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: some'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    settings = dry_run(PATH=f"{tmp_path}:{ENVIRONMENT['PATH']}")
    assert settings["run_name"] == "gpt2" and settings["model_name_or_path"] == "openai-community/gpt2"


def test_settings_from_the_environment_and_flags_that_win():
    settings = dry_run("--alpha", "7", lr_y="2e-5", lr_x="0.3", alpha="100", upper_every="4", tracker="none")
    assert (settings["lr_y"], settings["lr_x"], settings["alpha"], settings["upper_every"]) == (2e-5, 0.3, 7.0, 4)
    assert settings["run_name"] == "tiny-lr_x=0.3-alpha=7-lr_y=2e-5-upper_every=4"


def test_config_from_the_environment():
    assert dry_run(CONFIG="configs/gpt2.yaml")["run_name"] == "gpt2"


def test_data_dir_from_another_working_directory(data: Path, tmp_path: Path):
    settings = dry_run(cwd=tmp_path, data_dir=str(data))
    assert settings["train_data"] == [f"{data}/train_*.json"]
    assert settings["val_data"] == [f"{data}/val.json"] and settings["test_data"] == [f"{data}/test.json"]


@pytest.mark.parametrize("how", ["environment", "flag", "flag="])
def test_per_sample_runs_read_the_mixed_file(data: Path, how: str):
    flags = {"environment": [], "flag": ["--weights", "sample"], "flag=": ["--weights=sample"]}[how]
    environment = {"weights": "sample"} if how == "environment" else {}
    settings = dry_run(*flags, data_dir=str(data), **environment)
    assert settings["train_data"] == [f"{data}/mixed/train_mixed.json"] and settings["weights"] == "sample"
    shipped = dry_run(*flags, **environment)
    assert shipped["train_data"] == ["./data_alpaca_0.5/mixed/train_mixed.json"]


def test_mistakes_end_with_exit_code_2_and_no_traceback():
    done = launch("--lr_z", "3", DRY_RUN="1", alpha="-1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--lr_z: no such setting; did you mean --lr_x?" in done.stderr or "--lr_y?" in done.stderr
    assert "alpha: input should be greater than 0" in done.stderr


def test_a_run_by_the_launcher(data: Path, tmp_path: Path):
    model = "{model_type: gpt2, vocab_size: 400, n_positions: 256, n_embd: 32, n_layer: 2, n_head: 2}"
    done = launch(
        "--model_config", model, cwd=tmp_path, data_dir=str(data), max_steps="2", tracker="none", run_name="mine"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "mine" / "weights.csv").is_file() and "w_noisy: 0." in done.stdout


def test_two_processes_learn_what_one_learns(data: Path, tmp_path: Path):
    """NPROC=2 starts two gloo processes under DeepSpeed; without dropout the weights are those of one process."""
    model = "{model_type: gpt2, vocab_size: 400, n_positions: 256, n_embd: 32, n_layer: 3, n_head: 2}"
    short = {"max_steps": "8", "tracker": "none", "data_dir": str(data), "lisa_layers": "1", "lisa_interval": "3"}
    for name, processes in (("one", {}), ("two", {"NPROC": "2", "OMP_NUM_THREADS": "1"})):
        done = launch("--model_config", model, cwd=tmp_path, run_name=name, **short, **processes)
        assert done.returncode == 0, done.stderr
    one, two = (pd.read_csv(tmp_path / "outputs" / name / "metrics.csv") for name in ("one", "two"))
    assert "in 2 processes" in done.stdout and "w_noisy: 0." in done.stdout
    assert one["weight/train_noisy"].iloc[-1] < 0.45
    np.testing.assert_allclose(one["weight/train_noisy"], two["weight/train_noisy"], rtol=1e-4)
    np.testing.assert_allclose(one["test_loss_w"].dropna(), two["test_loss_w"].dropna(), rtol=1e-5)


def test_a_rank_that_dies_ends_the_others(data: Path, tmp_path: Path):
    """One of two ranks raises; the launcher returns soon, non-zero."""
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, sys, train_bilevel\n"
        "from bilevel import f2sa\n"
        "whole = f2sa.penalty_step\n"
        "def step(*args, **kwargs):\n"
        "    if os.environ['RANK'] == '1': raise RuntimeError('rank 1 is gone')\n"
        "    return whole(*args, **kwargs)\n"
        "f2sa.penalty_step = step\n"
        "sys.exit(train_bilevel.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    begun = time.monotonic()
    done = subprocess.run(
        [*command, *settings(data, tmp_path / "r", backend="deepspeed")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "rank 1 is gone" in done.stderr
    assert time.monotonic() - begun < 90


def test_plain_torch_refuses_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="several processes were launched, which needs backend=deepspeed"):
        load_settings(settings(tmp_path, tmp_path / "r"))
