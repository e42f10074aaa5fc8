"""The processes of a run: who this one is, and sums over all of them."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed


@dataclasses.dataclass(frozen=True)
class World:
    """`size` processes, of which this is `rank`, each with a device of its own; one process needs no group."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, equal on all, on the device of `tensor`."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device)
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (anything that pickle can write), in order of rank; equal on all."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    @property
    def main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through the block before the others enter it."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            distributed.barrier()

    def leave(self) -> None:
        """All processes leave the group together; call this in every process that ends normally.

        If a process exits without leaving, gloo's threads may still hold tensors while Python shuts down, which aborts
        the process, and NCCL warns.
        """
        self.wait()
        if distributed.is_initialized():
            distributed.destroy_process_group()


ALONE = World()


def start_world() -> World:
    """Join the processes that torchrun launched, without DeepSpeed; without a launcher, a world of one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(int(os.environ["RANK"]), size, device)
