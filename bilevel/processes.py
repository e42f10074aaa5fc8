"""The processes of a run: who this one is, and sums over all of them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed

HOST = torch.device("cpu")


def moved(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The tensors, all of one dtype, on a device. They share one copy, and hence memory.

    A copy to a GPU does not make the host wait; a copy from it waits once, however many tensors there are.
    """
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    on_host = whole.device.type == "cpu"
    if on_host and device.type == "cuda":
        whole = whole.pin_memory()  # from other memory the copy would wait
    whole = whole.to(device, non_blocking=on_host)
    parts = whole.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@dataclasses.dataclass(frozen=True)
class World:
    """`size` processes, of which this is `rank`, each with a device of its own; one process needs no group."""

    rank: int = 0
    size: int = 1
    device: torch.device = HOST

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
