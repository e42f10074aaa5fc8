"""A run: its parts, loaded and checked, and the state in which it goes on."""

import dataclasses
from typing import IO, Any

import transformers

from bilevel.backend import ModelCopy
from bilevel.config import Settings
from bilevel.data import BatchStream, Samples
from bilevel.lisa import Lisa
from bilevel.rounding import RoundingGuard
from bilevel.weights import SampleWeights, SourceWeights
from bilevel.world import World


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
    row: dict[str, Any] = dataclasses.field(default_factory=dict)  # of metrics.csv, of the last step
    lock: IO | None = None  # on the run's folder, while it is open

    def __post_init__(self):
        s = self.settings
        self.streams = {
            "train": BatchStream(len(self.train), s.global_batch_size, s.seed),
            "val": BatchStream(len(self.val), s.val_batch_size, s.seed + 1),
        }
        self.guard = RoundingGuard(s, self.copies)

    @property
    def per_sample(self) -> bool:
        return self.settings.weights == "sample"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of this process, between two steps."""
        return {
            "step": self.step,
            "row": self.row,
            "lost": self.guard.lost,
            "x": self.x.state_dict(),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
            "copies": {name: copy.state_dict() for name, copy in self.copies.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the copies have the parameters active that LISA had drawn for the last step."""
        self.step, self.row, self.guard.lost = state["step"], state["row"], state["lost"]
        self.x.load_state_dict(state["x"])
        for part in ("streams", "copies"):
            for name, thing in getattr(self, part).items():
                thing.load_state_dict(state[part][name])
