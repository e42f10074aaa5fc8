"""LISA: which layers train in which interval (Pan et al. 2024, "LISA: Layerwise Importance Sampling").

Each interval of optimizer steps trains a few decoder blocks drawn at random; embedding, head and final norm train
always, or never.
"""

import torch

from bilevel.errors import UserError
from bilevel.model.base_copy import Active, ModelCopy
from bilevel.seeding import generator
from bilevel.settings.fields import Settings


class Layers:
    """A model's parameters as LISA sees them: decoder blocks, and the rest."""

    def __init__(self, model: torch.nn.Module):
        found = find_blocks(model)
        self.blocks = [list(block.parameters()) for block in found]
        inside = {id(p) for block in self.blocks for p in block}
        self.rest = [p for p in model.parameters() if id(p) not in inside]

    def active(self, drawn: tuple[int, ...], train_rest: bool) -> Active:
        """What trains when these blocks are drawn: always-on parameters, and each drawn block's."""
        return (self.rest if train_rest else []), [self.blocks[i] for i in drawn]


class LayerDraw:
    """The blocks drawn for each interval, by a generator of its own: the same on every rank and after a resume."""

    def __init__(self, blocks: int, layers: int, seed: int, shared: bool):
        if layers > blocks:
            raise UserError(f"lisa_layers {layers}: the model has {blocks} decoder blocks; draw at most that many")
        self.blocks, self.layers, self.seed, self.shared = blocks, layers, seed, shared

    def __call__(self, interval: int, copy: str) -> tuple[int, ...]:
        """Numbers of the blocks that train in an interval, sorted; copy is u or w, which draw alike when shared."""
        draw = generator(self.seed, "lisa", interval, "both" if self.shared else copy)
        return tuple(sorted(torch.randperm(self.blocks, generator=draw)[: self.layers].tolist()))


class Lisa:
    """What trains when, for all copies: `models` by their names u and w, after so many steps."""

    def __init__(self, settings: Settings, models: dict[str, torch.nn.Module], steps_done: int = 0):
        self.interval, self.train_rest = settings.lisa_interval, settings.lisa_train_embeddings
        self.layers = {name: Layers(model) for name, model in models.items()}
        self.blocks = len(next(iter(self.layers.values())).blocks)
        self.draw = LayerDraw(self.blocks, settings.lisa_layers, settings.seed, settings.lisa_shared_draw)
        interval = max(0, steps_done - 1) // self.interval
        self.drawn = {name: self.draw(interval, name) for name in models}
        self._before: list[torch.Tensor] = []

    def active(self, name: str) -> Active:
        """The parameters of a copy that train now: always on, and drawn."""
        return self.layers[name].active(self.drawn[name], self.train_rest)

    def switch(self, step: int, copies: dict[str, ModelCopy]) -> None:
        """Where an interval begins, activate its blocks; a draw equal to the one before changes nothing."""
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
        """After the first step that moves the copies: a drawn block has moved and a resting one has not.

        Both would fail silently if the optimizer underneath took no notice of what is frozen. Looks at the first
        interval alone. Raises RuntimeError.
        """
        if not moved or not self._before:
            return
        for number, (before, now) in enumerate(zip(self._before, self._watched(), strict=True)):
            drawn, same = number % 2 == 0, torch.equal(before, now)
            if drawn and same and before.numel():
                raise RuntimeError("LISA self-check: a drawn block did not move in the first step")
            if not drawn and not same:
                raise RuntimeError("LISA self-check: a resting block moved in the first step")
        self._before = []

    def _watched(self) -> list[torch.Tensor]:
        """This rank's values of a drawn and of a resting block of each copy, in turn; a resting one may be missing."""
        watched = []
        for name, layers in self.layers.items():
            resting = [i for i in range(self.blocks) if i not in self.drawn[name]]
            for block in (self.drawn[name][0], *resting[:1]):
                values = [getattr(p, "ds_tensor", p).detach().flatten() for p in layers.blocks[block]]
                watched.append(torch.cat(values))
            if not resting:
                watched.append(torch.empty(0))
        return watched


def find_blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder blocks, by structure: of all lists of modules, the one with most parameters, the outer of equals."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    largest = max(lists, key=_size, default=None)
    if largest is None or not _size(largest):
        raise UserError(
            f"lisa_layers: {type(model).__name__} has no list of decoder blocks to draw from; train it without LISA"
        )
    return largest


def _size(module: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
