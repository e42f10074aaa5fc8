"""machine.json of a run: the processor, the GPUs, the versions. It holds no host name, no path and no variable."""

import functools
import os
import platform
import subprocess
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from bilevel.files import open_regular, whole_file

ROOT = Path(__file__).parents[2]


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class Machine:
    """The machine and the software of a run's main process, as it was started last.

    commit: of this project, with "-dirty" if files differ from it; empty if it is not a git checkout.
    """

    cpu: str
    cores: int
    gpu: str
    processes: int
    python: str
    torch: str
    transformers: str
    commit: str

    @property
    def hardware(self) -> str:
        several = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{self.gpu or self.cpu}{'' if self.gpu else f', {self.cores} cores'}{several}"

    @property
    def version(self) -> str:
        commit = f"commit {self.commit}, " if self.commit else ""
        return f"{commit}torch {self.torch}, transformers {self.transformers}, Python {self.python}"


def this_machine(processes: int) -> Machine:
    import torch
    import transformers

    return Machine(
        cpu=processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        processes=processes,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        commit=commit(),
    )


@functools.cache
def commit() -> str:
    """The commit of this project, or an empty string."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def write_machine(folder: Path, processes: int) -> None:
    with whole_file(folder / "machine.json") as file:
        file.write_bytes(TypeAdapter(Machine).dump_json(this_machine(processes), indent=1) + b"\n")


def read_machine(folder: Path) -> Machine | None:
    """The machine of a run; None if its folder does not tell."""
    try:
        with open_regular(folder / "machine.json") as file:
            return TypeAdapter(Machine).validate_json(file.read())
    except (OSError, ValueError):
        return None


def processor() -> str:
    """The processor's name, or its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
