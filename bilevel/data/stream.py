"""A resumable stream of global batches of sample numbers."""

from typing import Any

import numpy as np
import torch

from bilevel.data.kept_back import MOST, kept_back
from bilevel.seeding import Permutation


class BatchStream:
    """Endless batches of sample numbers: epoch after epoch, each in an order of its own; resumable by its state.

    The order is a function of seed, epoch and position, computed for each batch, so that none is stored.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.load_state_dict({"epoch": 0, "position": 0})

    def __next__(self) -> torch.Tensor:
        """(batch_size,) int64 sample numbers; a batch may end one epoch and begin the next."""
        parts, missing = [], self.batch_size
        while missing:
            end = min(self.n, self.position + missing)
            parts.append(self._order(np.arange(self.position, end)))
            missing -= end - self.position
            self.position = end
            if end == self.n:
                self.load_state_dict({"epoch": self.epoch + 1, "position": 0})
        return torch.from_numpy(np.concatenate(parts))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = Permutation(self.n, f"seed {self.seed}, epoch {self.epoch}")


class TrustedStream:
    """Batches of validation samples, some of which are fresh: w has not read them before. Resumable.

    While they last, fresh samples are compared with training samples (bilevel.weights.record_evidence). keeps: keep
    half of the samples back, MOST at most, and read them one after the other during the first pass over the training
    data, which has so many `steps`, so that all its samples can be compared. Otherwise the order is that of
    BatchStream, and the samples of its first pass are fresh.
    """

    def __init__(self, n: int, batch_size: int, seed: int, steps: int, keeps: bool):
        self.batch_size, self.step, self.all = batch_size, 0, BatchStream(n, batch_size, seed)
        self.fresh: torch.Tensor | None = None  # (k,) of the last batch; None if nothing is to be compared with it
        self.reserve = kept_back(n, batch_size, steps) if keeps else 0
        self.steps = steps if keeps else -(-n // batch_size)
        self.each = min(batch_size, -(-MOST // self.steps))  # fresh samples that a plain batch gives
        if self.reserve:
            order = torch.from_numpy(Permutation(n, f"seed {seed}, kept back")(np.arange(n)))
            self.kept, self.base = order[: self.reserve], order[self.reserve :]
            self.first = BatchStream(len(self.base), batch_size, seed)

    def __next__(self) -> torch.Tensor:
        """(batch_size,) int64 sample numbers."""
        number, self.step = self.step, self.step + 1
        if not self.reserve:
            left = self.all.n - self.all.position if self.all.epoch == 0 else 0
            if self.all.position // self.batch_size * self.each >= MOST:
                left = 0
            drawn = next(self.all)
            self.fresh = drawn[: min(left, self.each)] if left else None
            return drawn
        # The first step shows nothing, as u and w are still the same.
        start, end = (self.reserve * min(max(0, done), self.steps) // self.steps for done in (number - 1, number))
        self.fresh = self.kept[start:end]
        if number > self.steps:
            return next(self.all)
        self.first.batch_size = self.batch_size - len(self.fresh)
        return torch.cat([self.fresh, self.base[next(self.first)]]) if self.first.batch_size else self.fresh

    def state_dict(self) -> dict[str, Any]:
        return self.all.state_dict() | ({"step": self.step, "first": self.first.state_dict()} if self.reserve else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.all.load_state_dict({name: state[name] for name in ("epoch", "position")})
        if self.reserve:
            self.step = state["step"]
            self.first.load_state_dict(state["first"])
