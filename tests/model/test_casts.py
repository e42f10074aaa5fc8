"""Under bf16, plain torch casts each trained weight once per step, however many micro-batches there are."""

import collections
import copy
from collections.abc import Iterator

import pytest
import torch
from step_helpers import NU, cut, flat, sample_weights, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.model.torch_copy import TorchCopy
from bilevel.step.f2sa import penalty_step


class Casts(TorchDispatchMode):
    """How often each of these tensors is cast to bf16, by its address."""

    def __init__(self, tensors: Iterator[torch.Tensor]):
        super().__init__()
        self.watched, self.count = {t.data_ptr() for t in tensors}, collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        cast = function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16
        if cast and args[0].data_ptr() in self.watched:
            self.count[args[0].data_ptr()] += args[0].nbytes
        return function(*args, **(kwargs or {}))


def stepped(rows: int, checkpointing: bool, order: int = 1) -> tuple[torch.Tensor, dict[str, Casts]]:
    """Parameters after two steps with micro-batches of so many rows, and the casts in the last step by copy."""
    start = tiny_model(0.1)
    if checkpointing:
        start.activation_checkpointing_enable({"use_reentrant": False})
    copies = {name: TorchCopy(copy.deepcopy(start), bf16=True) for name in "uw"}
    weights = sample_weights()
    for step in range(2):
        with Casts(copies["u"].model.parameters()) as u, Casts(copies["w"].model.parameters()) as w:
            train, validation = cut(list(range(12)), rows), cut(list(range(20, 32)), rows)
            penalty_step(**copies, weights=weights, train=train, validation=validation, nu=NU, lr_y=1e-3, seed=step,
                         order=order)  # fmt: skip
    assert not any(copy.keeps_casts for copy in copies.values()) and not torch.is_autocast_enabled("cpu")
    return torch.cat([flat(copy.model) for copy in copies.values()]), {"u": u, "w": w}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_cast_once_per_step(checkpointing: bool) -> None:
    """But for the head, which is cast in each pass."""
    model = tiny_model()
    head = model.lm_head.weight.nbytes
    linear = sum(p.nbytes for name, p in model.named_parameters() if ".attn." in name or ".mlp." in name)
    for rows, passes in ((12, 1), (2, 6)):
        _, casts = stepped(rows, checkpointing)
        assert sum(casts["u"].count.values()) == linear + passes * head
        assert sum(casts["w"].count.values()) == linear + 2 * passes * head


@pytest.mark.parametrize("order", [1, 2])
def test_kept_casts_change_no_bit(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    kept, _ = stepped(2, False, order)
    monkeypatch.setattr(TorchCopy, "losses", super(TorchCopy, TorchCopy).losses)
    fresh, _ = stepped(2, False, order)
    assert torch.equal(kept, fresh)
