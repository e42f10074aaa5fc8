"""LISA: which decoder blocks are trained in which interval (Pan et al. 2024, "LISA: Layerwise Importance Sampling").

In each interval of optimizer steps a few decoder blocks, drawn at random, are trained and the others frozen. Embedding,
head and final norm are trained always or never.
"""

import torch

from bilevel.errors import UserError
from bilevel.model.base_copy import Active, ModelCopy
from bilevel.seeding import generator
from bilevel.settings.fields import Settings


class Layers:
    """A model's parameters, grouped for LISA: those of each decoder block, and the rest."""

    def __init__(self, model: torch.nn.Module):
        found = find_blocks(model)
        self.blocks = [list(block.parameters()) for block in found]
        inside = {id(p) for block in self.blocks for p in block}
        self.rest = [p for p in model.parameters() if id(p) not in inside]

    def active(self, drawn: tuple[int, ...], train_rest: bool) -> Active:
        """The trainable parameters when these blocks are drawn: always-on parameters, and those of each drawn block."""
        return (self.rest if train_rest else []), [self.blocks[i] for i in drawn]


class LayerDraw:
    """Draws the blocks of each interval from its own generator: the same on every rank and after a resume."""

    def __init__(self, blocks: int, layers: int, seed: int, shared: bool):
        if layers > blocks:
            raise UserError(f"lisa_layers {layers}: the model has {blocks} decoder blocks; use {blocks} or less")
        self.blocks, self.layers, self.seed, self.shared = blocks, layers, seed, shared

    def __call__(self, interval: int, copy: str) -> tuple[int, ...]:
        """Sorted indices of the blocks trained in an interval; copies u and w draw the same blocks if `shared`."""
        draw = generator(self.seed, "lisa", interval, "both" if self.shared else copy)
        return tuple(sorted(torch.randperm(self.blocks, generator=draw)[: self.layers].tolist()))


class Lisa:
    """The schedule of trainable blocks for all copies; `models` has them by name (u, w), after steps_done steps."""

    def __init__(self, settings: Settings, models: dict[str, torch.nn.Module], steps_done: int = 0):
        self.interval, self.train_rest = settings.lisa_interval, settings.lisa_train_embeddings
        self.layers = {name: Layers(model) for name, model in models.items()}
        self.blocks = len(next(iter(self.layers.values())).blocks)
        self.draw = LayerDraw(self.blocks, settings.lisa_layers, settings.seed, settings.lisa_shared_draw)
        interval = max(0, steps_done - 1) // self.interval
        self.drawn = {name: self.draw(interval, name) for name in models}
        self._before: list[torch.Tensor] = []

    def active(self, name: str) -> Active:
        """The parameters of a copy that are trainable now."""
        return self.layers[name].active(self.drawn[name], self.train_rest)

    def switch(self, step: int, copies: dict[str, ModelCopy]) -> None:
        """At the first step of an interval, activate its blocks, unless they are the same as before."""
        if step % self.interval:
            return
        if step == 0:
            self._before = [values.clone() for values in self._watched()]
        else:
            self._before = []
        for name, copy in copies.items():
            drawn = self.draw(step // self.interval, name)
            if drawn != self.drawn[name]:
                self.drawn[name] = drawn
                copy.activate(*self.active(name))

    def verify(self, moved: bool) -> None:
        """After the first step that moves the copies, check that a drawn block moved and a frozen one did not.

        Both could go wrong silently if the optimizer ignored what is frozen. Only the first interval is checked.
        Raises RuntimeError.
        """
        if not moved or not self._before:
            return
        for number, (before, now) in enumerate(zip(self._before, self._watched(), strict=True)):
            drawn, same = number % 2 == 0, torch.equal(before, now)
            if drawn and same and before.numel():
                raise RuntimeError("LISA self-check: a drawn block did not move in the first step")
            if not drawn and not same:
                raise RuntimeError("LISA self-check: a frozen block moved in the first step")
        self._before = []

    def _watched(self) -> list[torch.Tensor]:
        """This rank's values of one drawn and one frozen block of each copy, in turn; empty if no block is frozen."""
        watched = []
        for name, layers in self.layers.items():
            frozen = [i for i in range(self.blocks) if i not in self.drawn[name]]
            for block in (self.drawn[name][0], *frozen[:1]):
                values = [getattr(p, "ds_tensor", p).detach().flatten() for p in layers.blocks[block]]
                watched.append(torch.cat(values))
            if not frozen:
                watched.append(torch.empty(0))
        return watched


def find_blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder blocks: the module list with the most parameters, and the outer one of equals. Raises UserError."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    largest = max(lists, key=_size, default=None)
    if largest is None or not _size(largest):
        raise UserError(
            f"lisa_layers: {type(model).__name__} has no list of decoder blocks to draw from; remove lisa_layers"
        )
    return largest


def _size(module: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
