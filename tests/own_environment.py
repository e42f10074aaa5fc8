"""The environment of the tests: the user's, without what changes how the program and its libraries behave.

conftest.py calls `take` before any library is imported. What a test sets itself stays, and programs that it starts
inherit this environment.
"""

import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from bilevel.run.libraries import BEFORE_TORCH
from bilevel.settings.fields import FIELDS

PREFIXES = (  # trackers and hubs; threads; accelerators; launchers and schedulers; folders
    *("WANDB_", "HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "TOKENIZERS_", "SAFETENSORS_", "ACCELERATE_"),
    *("OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_", "NUMEXPR_", "TORCH", "PYTORCH_", "TRITON_", "MPL"),
    *("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "DS_", "DEEPSPEED", "ROCR_", "HIP_"),
    *("MASTER_", "LOCAL_", "GROUP_", "ROLE_", "NODE_", "SLURM_", "PMI_", "PMIX_", "OMPI_", "MV2_"),
    "XDG_",
)
NAMES = {"RANK", "WORLD_SIZE", "NETRC", "PYTHON", "PYTHONWARNINGS", "COLUMNS", "FORCE_COLOR"}
LAUNCHER = {"CONFIG", "NPROC", "NGPU", "HOSTFILE", "DRY_RUN", "data_dir"}  # of run_F2SA.sh, besides the settings
GPU = ("CUDA_", "NVIDIA_", "NCCL_", "ROCR_", "HIP_")  # they also say which GPU a user may use


def foreign(names: Iterable[str]) -> set[str]:
    """Those of the variables that no test may see."""
    known = NAMES | LAUNCHER | set(FIELDS)
    return {name for name in names if name.startswith(PREFIXES) or name in known or name.lower().endswith("_proxy")}


def take(home: Path) -> dict[str, str]:
    """Remove foreign variables and give the tests a home folder of their own; returns the removed GPU variables.

    In the user's home there may be a login to wandb or the hub, and settings of matplotlib.
    """
    gpu = {name: value for name, value in os.environ.items() if name.startswith(GPU)}
    for name in foreign(os.environ):
        del os.environ[name]
    os.environ.setdefault("GIT_CONFIG_GLOBAL", os.path.expanduser("~/.gitconfig"))  # git may trust this folder there
    os.environ["HOME"] = str(home)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["HF_DATASETS_CACHE"] = str(home / "datasets")  # read when datasets is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Small models are slower on several threads, and six times slower when the machine has anything else to do.
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    os.environ["GOMP_SPINCOUNT"], _ = BEFORE_TORCH["GOMP_SPINCOUNT"]  # where a test starts more threads
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would programs that are tested for it
    return gpu
