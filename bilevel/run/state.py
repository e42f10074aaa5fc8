"""A run: its parts, loaded and checked, and the state that a checkpoint holds (Run.state_dict)."""

import dataclasses
import logging
from typing import IO, Any, TypeAlias

import torch
import transformers

from bilevel.data.batches import Batch
from bilevel.data.samples import Samples
from bilevel.data.stream import BatchStream, TrustedStream
from bilevel.model.base_copy import ModelCopy
from bilevel.model.lisa import Lisa
from bilevel.monitor.alarms import Watch
from bilevel.monitor.rounding_guard import RoundingGuard
from bilevel.processes import World
from bilevel.run.interrupt import FINISH
from bilevel.settings.fields import Settings
from bilevel.settings.methods import METHODS
from bilevel.settings.run_length import evaluation_interval
from bilevel.step.result import NonFiniteLoss, leave_out
from bilevel.step.schedule import Schedule
from bilevel.weights.draws import WeightedStream
from bilevel.weights.fixed import FixedSampleWeights, FixedSourceWeights
from bilevel.weights.learned import SampleWeights, SourceWeights
from bilevel.weights.sampling import choose
from bilevel.weights.start import read_start

log = logging.getLogger("bilevel")

Row: TypeAlias = dict[str, Any]  # columns of metrics.csv and their values


@dataclasses.dataclass
class Run:
    """Everything that training needs. Random numbers are functions of seed and step, so no generator is kept."""

    settings: Settings
    world: World
    tokenizer: transformers.PreTrainedTokenizerBase
    train: Samples
    val: Samples | None  # None if the settings do not read it
    test: Samples | None
    pool: Samples  # training batches are drawn from it: train and, with val_in_training, val after it
    copies: dict[str, ModelCopy]  # by name: u and w, or w
    lisa: Lisa | None
    weights: SourceWeights | SampleWeights
    steps: int
    step: int = 0  # steps done
    skipped: int = 0  # steps left out because a loss or gradient was not finite
    operations: float = 0.0  # of the passes before the checkpoint, and of scoring
    scores: torch.Tensor | None = None  # (N,), given to the samples by a baseline
    row: Row = dataclasses.field(default_factory=dict)  # values of the last step
    lock: IO | None = None  # the lock on the run's folder, held while it is open

    def __post_init__(self):
        s = self.settings
        self.streams: dict[str, BatchStream | TrustedStream] = {}
        if METHODS[s.method].weights_stay:
            c = torch.ones(len(self.pool), dtype=torch.float64)
            c[: len(self.train)] = self.weights.coefficients(slice(None))
            self.streams = {"train": WeightedStream(c, s.global_batch_size, s.seed)}
        elif s.learned:
            self.streams = {
                "train": BatchStream(len(self.train), s.global_batch_size, s.seed),
                "val": BatchStream(len(self.val), s.val_batch_size, s.seed + 1),
            }
            if self.per_sample and "u" in self.copies:
                once = min(self.steps, -(-len(self.train) // s.global_batch_size))
                keeps = self.weights.optimizer.sets_all
                self.streams["val"] = TrustedStream(len(self.val), s.val_batch_size, s.seed + 1, once, keeps)
        self.schedule = Schedule(s, self.steps)
        self.guard = RoundingGuard(s, self.copies)
        self.watch = Watch(s, self.weights, self.train.sources, self.steps)

    @property
    def per_sample(self) -> bool:
        return self.settings.weights == "sample"

    @property
    def evaluates(self) -> bool:
        """Whether the models are evaluated at this step."""
        return self.step % self.eval_every == 0 or self.step == self.steps

    @property
    def eval_every(self) -> int:
        """Steps between two evaluations."""
        return evaluation_interval(self.steps, self.settings.eval_every)

    @property
    def all_operations(self) -> float:
        """Floating-point operations of all passes so far except evaluations; NaN if they cannot be counted."""
        return self.operations + self.world.size * sum(c.passed.operations(c.shape) for c in self.copies.values())

    def end_here(self) -> None:
        """Make the step that is done the last one, as the user wishes (bilevel.run.interrupt)."""
        if self.step < self.steps:
            log.info(
                f"{FINISH} is in the run's folder: the run ends after step {self.step} of {self.steps}, with results"
            )
        self.steps = self.step

    def draw(self) -> tuple[Batch, Batch | None]:
        """The step's batches: of training samples and, if the weights are learned, of validation samples."""
        s = self.settings
        drawn, packed = next(self.streams["train"]), self.copies["w"].packed
        if not s.learned:
            return self.pool.batch(drawn, s.micro_batch_tokens, self.world, packed=packed), None
        sample_ids, counts = choose(drawn, self.weights, s, self.step)
        train = self.train.batch(sample_ids, s.micro_batch_tokens, self.world, counts, len(drawn), packed)
        validation = self.val.batch(next(self.streams["val"]), s.micro_batch_tokens, self.world, packed=packed)
        if (fresh := getattr(self.streams["val"], "fresh", None)) is not None:
            validation.fresh = self.val.batch(fresh, s.micro_batch_tokens, self.world, packed=packed)
        return train, validation

    def skip(self, error: NonFiniteLoss) -> None:
        """Leave the step out, as often as skip_nonfinite allows; after that, raises TrainingStopped."""
        parts = {"train": self.pool, "val": self.val}
        records = "; ".join(parts[part].places(ids) for part, ids in error.suspects.items() if len(ids))
        words = leave_out(error, records, self.copies.values(), self.skipped, self.settings.skip_nonfinite)
        self.skipped += 1
        if self.weights.evidence is not None:
            self.weights.evidence.steps += 1
        log.warning(f"step {self.step + 1}: {words}")

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint for this process, between two steps."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "operations": self.all_operations,
            "row": self.row,
            "watch": self.watch.state_dict(),
            "lost": self.guard.lost,
            "x": self.weights.state_dict(),
            "scores": self.scores,
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
            "copies": {name: copy.state_dict() for name, copy in self.copies.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned; LISA's blocks of the last step must be active in the copies."""
        self.step, self.skipped, self.row = state["step"], state["skipped"], state["row"]
        self.guard.lost, self.operations, self.scores = state["lost"], state["operations"], state["scores"]
        self.watch.load_state_dict(state["watch"])
        self.weights.load_state_dict(state["x"])
        for part in ("streams", "copies"):
            for name, thing in getattr(self, part).items():
                thing.load_state_dict(state[part][name])


def make_weights(settings: Settings, train: Samples) -> SourceWeights | SampleWeights:
    """The weights at the start of a run. Raises UserError if x_init does not fit the training samples."""
    s, per_sample = settings, settings.weights == "sample"
    start = read_start(s.x_init_file or s.x_init, per_sample, train)
    if not s.learned:
        return FixedSampleWeights(len(train), start) if per_sample else FixedSourceWeights(train.source_ids, start)
    if per_sample:
        return SampleWeights(len(train), start, s.x_map, s.x_factor, s.x_optimizer, s.sigmoid_start)
    return SourceWeights(train.source_ids, start, s.x_factor, s.x_optimizer)
