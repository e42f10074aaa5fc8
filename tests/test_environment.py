"""Tests give the same answers whatever the user has exported."""

import os
import subprocess
import sys

import own_environment
import pytest
from run_helpers import ROOT

from bilevel.run.libraries import quiet_libraries
from bilevel.settings.fields import FIELDS

EXPORTED = {  # as people have it: something of each group, and what would make a run hang, stop or go elsewhere
    **{"WANDB_MODE": "offline", "WANDB_API_KEY": "0" * 40, "WANDB_DISABLED": "true", "WANDB_PROJECT": "mine"},
    **{"WANDB_RESUME": "must", "WANDB_RUN_ID": "abc", "WANDB_DIR": "/nowhere", "WANDB_BASE_URL": "http://127.0.0.1:9"},
    **{"HF_HOME": "/nowhere", "HF_DATASETS_CACHE": "/nowhere", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"},
    **{"TRANSFORMERS_VERBOSITY": "info", "TRANSFORMERS_OFFLINE": "0", "TOKENIZERS_PARALLELISM": "true"},
    **{"OMP_NUM_THREADS": "64", "OMP_PROC_BIND": "close", "MKL_NUM_THREADS": "64", "XDG_CACHE_HOME": "/nowhere"},
    **{"CUDA_VISIBLE_DEVICES": "0,1,2,3", "CUDA_HOME": "/nowhere", "DS_ACCELERATOR": "cuda", "DS_BUILD_OPS": "1"},
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1"},
    **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
    **{"NPROC": "3", "NGPU": "2", "HOSTFILE": "/nowhere", "DRY_RUN": "1", "CONFIG": "/nowhere", "data_dir": "/nowhere"},
    **{"MPLBACKEND": "TkAgg", "COLUMNS": "20", "https_proxy": "http://127.0.0.1:9"},
    **dict.fromkeys(FIELDS, "7"),
}
AFFECTED = [
    "tests/test_environment.py::test_no_exported_variable_is_left",
    "tests/settings/test_config.py",
    "tests/run/test_faults.py::test_a_wandb_server_that_hangs_costs_nothing",
    "tests/run/test_faults.py::test_a_resumed_run_is_the_same_run_in_wandb",
    "tests/run/test_train.py::test_a_users_command_is_that_run",
    "tests/run/test_launcher.py::test_settings_from_the_environment_and_flags_that_win",
    "tests/settings/test_start.py::test_help_and_mistakes_need_no_heavy_import",
]


def test_every_exported_variable_is_foreign():
    assert own_environment.foreign(EXPORTED) == set(EXPORTED)
    assert not own_environment.foreign(["PATH", "HOME", "LANG", "TMPDIR", "CI", "PYTHONPATH", "PYTEST_XDIST_WORKER"])


def test_no_exported_variable_is_left():
    """What has such a name now was set by the tests, or by a library."""
    left = {name for name, value in EXPORTED.items() if os.environ.get(name) == value}
    assert not left and not os.path.exists(os.path.expanduser("~/.netrc"))


def test_what_torch_reads_at_its_import_is_set_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch):
    for name in ("GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF", "OMP_WAIT_POLICY", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    quiet_libraries()
    assert os.environ["GOMP_SPINCOUNT"] == "1000" and os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for ours, theirs in ({"GOMP_SPINCOUNT": "7"}, {}), ({}, {"OMP_WAIT_POLICY": "active"}):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        for name, value in (ours | theirs).items():
            monkeypatch.setenv(name, value)
        quiet_libraries()
        assert os.environ.get("GOMP_SPINCOUNT") == ours.get("GOMP_SPINCOUNT")


@pytest.mark.slow
def test_nothing_imports_torch_before_they_are_set():
    look = (
        "import sys, bilevel.run.libraries; assert 'torch' not in sys.modules; bilevel.run.libraries.quiet_libraries()"
    )
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


@pytest.mark.slow
def test_tests_do_not_depend_on_the_users_environment():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", "-p", "no:cacheprovider", *AFFECTED]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | EXPORTED, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
