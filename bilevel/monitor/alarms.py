"""What a person would notice in a run's curves: a loss that jumps or runs away, weights that collapse or never move."""

import logging
import math
import statistics
from typing import Any

from bilevel.errors import TrainingStopped
from bilevel.settings.fields import Settings
from bilevel.step.result import StepResult
from bilevel.step.schedule import schedule
from bilevel.weights.learned import SampleWeights, SourceWeights, parts

log = logging.getLogger("bilevel")

WINDOW = 32  # steps whose median a loss is compared with
COLLAPSED = 0.99  # share of the largest source
SPREAD = 0.01  # effective number of records, as a share of all
MOVED = 0.01  # of x, anywhere: less is frozen
NEAR, FAR = 1, 3  # x that is carried less than NEAR leaves the weights much alike; FAR takes one near 0
ASCENT = 5  # steps whose median says where u's validation loss is


class Watch:
    """Warns of each kind of trouble, with what to try; changes nothing, but ends a run whose u runs away.

    x is at its start when this is made.
    """

    def __init__(self, settings: Settings, x: SourceWeights | SampleWeights, sources: list[str], steps: int):
        self.settings, self.x, self.sources, self.steps = settings, x, sources, steps
        equal = x.x.min() == x.x.max()
        self.start = x.x[:1].clone() if equal else x.x.clone()  # one number where it is that of all
        self.losses: list[float] = []
        self.val_start: float | None = None  # u's first validation loss
        self.val_losses: list[float] = []  # its last ones
        self.told: list[str] = []

    def loss(self, step: int, result: StepResult) -> None:
        """After each step: twice the median of the last ones, and 0.5 nats above it, is a spike; nan is no loss.

        Weighted draws let loss_w jump with every sample that stands for many; validation is drawn uniformly.
        """
        weighted = self.settings.learned and self.settings.sampling == "weighted"
        name, loss = ("val_loss_w", result.val_loss) if weighted else ("loss_w", result.loss_w)
        if math.isnan(loss):
            return
        if len(self.losses) == WINDOW:
            usual = statistics.median(self.losses)
            if loss > usual + max(usual, 0.5):
                log.warning(
                    f"step {step}: {name} {loss:.4g} after {usual:.4g} in the {WINDOW} steps before; if it stays, "
                    f"try a smaller lr_y ({self.settings.lr_y:g}), clip_grad_norm=1 or a larger warmup_ratio"
                )
                self.losses = []
        self.losses = [*self.losses, loss][-WINDOW:]

    def ascent(self, val_loss: float | None) -> None:
        """After each step: u's validation loss, which order 2 lets it ascend; cross-entropy has no bound above.

        Raises TrainingStopped where the median of the last ones is twice the first, and 0.5 nats above it.
        """
        if val_loss is None:
            return
        if self.val_start is None:
            self.val_start = val_loss
        self.val_losses = [*self.val_losses, val_loss][-ASCENT:]
        now, start = statistics.median(self.val_losses), self.val_start
        if len(self.val_losses) == ASCENT and now > start + max(start, 0.5):
            raise TrainingStopped(
                f"u's validation loss has risen from {start:.4g} to {now:.4g}: with order=2 u ascends it, and training "
                f"no longer holds it back. Start again with a larger alpha ({self.settings.alpha:g}), a smaller lr_y "
                f"({self.settings.lr_y:g}), or order=1"
            )

    def weights(self, step: int) -> None:
        """At evaluations: all weight in one place, or none moved by the middle of the run. Each is told once."""
        s = self.settings
        if step == 0 and s.lr_x and s.x_optimizer == "adam" and (reach := self.reach()) < NEAR:
            words = (
                f"in this run Adam moves x by {reach:.2g} at most; about {FAR} bring a weight near 0, so the weights "
                f"will differ little. Try lr_x={s.lr_x * FAR / reach:.1g} ({s.lr_x:g}), more steps or a smaller "
                f"upper_every ({s.upper_every})"
            )
            if s.weights == "sample":
                words += f"; or x_optimizer=mirror sigmoid_start=0.98 lr_x={8 / s.alpha:.2g}"
            self._tell(step, "slow", words)
        early = step <= self.steps / 10
        if isinstance(self.x, SourceWeights):
            top = int(self.x.p.argmax())
            # Of two sources one is meant to win; at once is too soon.
            if self.x.p[top] > COLLAPSED and (early or len(self.sources) > 2):
                self._tell(
                    step,
                    "collapsed",
                    f"{self.x.p[top]:.1%} of the weight is on {self.sources[top]}, and the other sources hardly train "
                    f"the model. If that is too soon or not wanted, try a smaller lr_x ({s.lr_x:g}), x_warmup_steps or "
                    "more validation data",
                )
        elif (share := self.x.effective_share()) < SPREAD:
            self._tell(
                step,
                "collapsed",
                f"the weights are as uneven as if {share:.2%} of the records counted and no others. If that is not "
                f"wanted, try a smaller lr_x ({s.lr_x:g}), x_map=sigmoid, or more validation data",
            )
        waiting = s.x_warmup_steps + 10 * s.upper_every
        if s.lr_x and step >= max(self.steps / 2, waiting) and self._moved() < MOVED:
            self._tell(
                step,
                "frozen",
                f"the weights are still where they started. Try a larger lr_x ({s.lr_x:g}) or a smaller upper_every "
                f"({s.upper_every}); where gap in metrics.csv is near 0, a larger lr_y ({s.lr_y:g}) or a smaller alpha "
                f"({s.alpha:g})",
            )

    def reach(self) -> float:
        """How far Adam can carry an entry of x by the end of the run: lr_x at each of its visits."""
        s, x = self.settings, self.x
        rates = (
            s.lr_x * schedule(step, self.steps, s.warmup_ratio, s.x_lr_schedule)
            for step in range(s.x_warmup_steps, self.steps)
            if (step + 1) % s.upper_every == 0
        )
        visited = min(1, s.upper_every * s.global_batch_size / len(x.x)) if isinstance(x, SampleWeights) else 1
        return visited * sum(rates)

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "val_start": self.val_start,
            "val_losses": self.val_losses,
            "told": self.told,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _moved(self) -> float:
        """How far the entry of x that has moved furthest is from its start."""
        x, start = self.x.x, self.start.expand(len(self.x.x))
        return max(float((x[part] - start[part]).abs().max()) for part in parts(len(x)))

    def _tell(self, step: int, kind: str, words: str) -> None:
        if kind not in self.told:
            log.warning(f"step {step}: {words}")
            self.told.append(kind)
