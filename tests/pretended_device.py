"""A pretended device, cpu:1. Its tensors compute on the CPU, and waits of the host that a GPU would cause are counted.

Within `Waits`, tensors get there as they get to a GPU: by `.to(DEVICE)`, by `device=DEVICE`, or computed from others
that are there. What the kernels of a GPU refuse cannot be seen here; only a GPU shows that (tests/gpu).
"""

import collections
import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cpu", 1)
aten = torch.ops.aten
ANSWERS = {  # operations whose result, or its size, the host has to know
    aten._local_scalar_dense.default: "a number is read",
    aten.equal.default: "tensors are compared",
    aten.nonzero.default: "places are looked for",
    aten.masked_select.default: "places are looked for",
    aten.bincount.default: "the largest number is looked for",
    aten._unique2.default: "different values are looked for",
    aten.repeat_interleave.Tensor: "lengths are summed",
}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}


class There(torch.Tensor):
    """A tensor on the pretended device; `here` holds its values."""

    @staticmethod
    def __new__(cls, here: torch.Tensor, requires_grad: bool = False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE,
            requires_grad=requires_grad,
        )  # fmt: skip
        made.here = here.detach()
        return made

    def __repr__(self) -> str:
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class Waits(TorchDispatchMode):
    """A context that counts waits: reason and place in this project -> how often; other copies are in `copies`."""

    def __init__(self):
        super().__init__()
        self.found: collections.Counter = collections.Counter()
        self.copies = 0  # from the host that do not make it wait

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reason = wait(function, args, kwargs or {})
        if reason == "copied without waiting":
            self.copies += 1
        elif reason:
            self.found[f"{reason} at {place()}"] += 1
        return computed(function, args, kwargs or {})


def put(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its parameters and buffers on the pretended device, in place; shared ones stay shared."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made.setdefault(id(p), torch.nn.Parameter(There(p.detach()), p.requires_grad))
                module._parameters[name] = made[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = There(buffer)
    return model


def wait(function: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why the operation would make the host wait for a GPU; None if it would not."""
    there = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, There)]
    if function in COPIES:
        to = on_pretended(kwargs.get("device", args[0].device)), isinstance(args[-1], There)
        if function is aten._to_copy.default and to == (True, False):
            return "copied without waiting" if kwargs.get("non_blocking") else "a copy from the host"
        if function is aten.copy_.default and isinstance(args[0], There) != isinstance(args[1], There):
            return "a copy between host and device"
        return "a copy to the host" if to == (False, True) else None
    if there and function in INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "places are looked for (a mask as index)"
        return None if all(isinstance(index, There) for index in indices) else "a copy from the host (an index)"
    return ANSWERS.get(function) if there else None


def on_pretended(device: torch.device | None) -> bool:
    return device is not None and torch.device(device) == DEVICE


def place() -> str:
    """Where in the project the operation was asked for, or in a library below it."""
    frames = [f for f in traceback.extract_stack() if "/bilevel/" in f.filename]
    return f"{frames[-1].filename.rpartition('/bilevel/')[2]}:{frames[-1].lineno}" if frames else "no place of ours"


def computed(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The operation's result, computed on the CPU; on the pretended device if its inputs are or it is asked for."""
    there = {id(leaf.here): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, There)}
    asked = kwargs.get("device")
    on_device = bool(there) if asked is None else on_pretended(asked)
    if on_device and function not in COPIES | INDEXED:
        mixed = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and not isinstance(x, There) and x.dim()]
        assert not mixed or not there, f"{function} mixes devices at {place()}"
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda leaf: leaf.here if isinstance(leaf, There) else leaf, (args, kwargs))
    result = function(*args, **kwargs)
    if not on_device:
        return result

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return there[id(leaf)] if id(leaf) in there else There(leaf)  # an operation in place returns its input

    return tree_map(wrapped, result)
