"""A run: its parts, loaded and checked, and the state in which it goes on."""

import dataclasses
import logging
from typing import IO, Any

import transformers

from bilevel.backend import ModelCopy
from bilevel.config import Settings
from bilevel.data import Batch, BatchStream, Samples
from bilevel.f2sa import NonFiniteLoss, TrainingStopped
from bilevel.lisa import Lisa
from bilevel.rounding import RoundingGuard
from bilevel.sampling import choose
from bilevel.watch import Watch
from bilevel.weights import SampleWeights, SourceWeights
from bilevel.world import World

log = logging.getLogger("bilevel")


@dataclasses.dataclass
class Run:
    """All that training needs. Every random number comes from a seed and a step, so there is no generator to keep."""

    settings: Settings
    world: World
    tokenizer: transformers.PreTrainedTokenizerBase
    train: Samples
    val: Samples
    test: Samples | None
    copies: dict[str, ModelCopy]  # u and w
    lisa: Lisa | None
    x: SourceWeights | SampleWeights
    steps: int
    step: int = 0  # steps done
    skipped: int = 0  # of them, left out as a loss or gradient was not finite
    row: dict[str, Any] = dataclasses.field(default_factory=dict)  # of metrics.csv, of the last step
    lock: IO | None = None  # on the run's folder, while it is open

    def __post_init__(self):
        s = self.settings
        self.streams = {
            "train": BatchStream(len(self.train), s.global_batch_size, s.seed),
            "val": BatchStream(len(self.val), s.val_batch_size, s.seed + 1),
        }
        self.guard = RoundingGuard(s, self.copies)
        self.watch = Watch(s, self.x, self.train.sources, self.steps)

    @property
    def per_sample(self) -> bool:
        return self.settings.weights == "sample"

    def draw(self) -> tuple[Batch, Batch]:
        """The step's batches, of training and of validation samples."""
        s = self.settings
        drawn, trusted = next(self.streams["train"]), next(self.streams["val"])
        sample_ids, counts = choose(drawn, self.x, s, self.step)
        train = self.train.batch(sample_ids, s.micro_batch_tokens, self.world)
        validation = self.val.batch(trusted, s.micro_batch_tokens, self.world)
        return dataclasses.replace(train, counts=counts, drawn=len(drawn)), validation

    def skip(self, error: NonFiniteLoss) -> None:
        """Leave the step out and go on, as often as skip_nonfinite allows; else raises TrainingStopped."""
        allowed, parts = self.settings.skip_nonfinite, {"train": self.train, "val": self.val}
        records = "; ".join(parts[part].places(ids) for part, ids in error.suspects.items() if len(ids))
        if self.skipped == allowed:
            raise TrainingStopped(
                f"{error}; records {records}. Try a smaller lr_y or clip_grad_norm; the same command with "
                f"skip_nonfinite={allowed + 1} goes on and leaves such a step out"
            ) from error
        for copy in self.copies.values():
            copy.discard()
        self.skipped += 1
        log.warning(f"step {self.step + 1}: {error}; records {records}. Left out, {self.skipped} of {allowed}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of this process, between two steps."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "row": self.row,
            "watch": self.watch.state_dict(),
            "lost": self.guard.lost,
            "x": self.x.state_dict(),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
            "copies": {name: copy.state_dict() for name, copy in self.copies.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the copies have the parameters active that LISA had drawn for the last step."""
        self.step, self.skipped, self.row = state["step"], state["skipped"], state["row"]
        self.guard.lost = state["lost"]
        self.watch.load_state_dict(state["watch"])
        self.x.load_state_dict(state["x"])
        for part in ("streams", "copies"):
            for name, thing in getattr(self, part).items():
                thing.load_state_dict(state[part][name])
