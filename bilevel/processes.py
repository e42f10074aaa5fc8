"""The processes of a run: who this one is, and sums over all of them."""

import contextlib
import dataclasses
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed

HOST = torch.device("cpu")
ASK, TELL = 0.2, 60.0  # seconds between two questions of a waiting process, and between two lines of the main one


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
    def main_first(self, work: str) -> Iterator[None]:
        """The main process goes through the block before the others enter it, however long it takes.

        They ask the launcher's store for its word, because a barrier gives up after some minutes. Each minute the main
        process says on stderr what they wait for; work names it. If it ends, the launcher ends the others.
        """
        if self.size == 1:
            yield
            return
        store, word = _store(), f"bilevel/main_first/{next(_words)}"
        while not self.main and not store.check([word]):
            time.sleep(ASK)
        with _told(work) if self.main else contextlib.nullcontext():
            yield
        if self.main:
            store.set(word, "done")

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
_words = itertools.count()  # every process enters the same blocks in the same order


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


def _store() -> distributed.Store:
    """The store of the process group, which its processes share."""
    return distributed.distributed_c10d._get_default_store()


@contextlib.contextmanager
def _told(work: str) -> Iterator[None]:
    """A context that says on stderr, once a minute, that it is not over."""
    over = threading.Event()

    def tell() -> None:
        minutes = 0
        while not over.wait(TELL):
            minutes += 1
            print(f"{work}: minute {minutes}; the other processes wait for it", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
