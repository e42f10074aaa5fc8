"""Warnings about trouble in a run: a loss that jumps or diverges, weights that collapse or never move."""

import logging
import math
import statistics
from typing import Any

from bilevel.errors import TrainingStopped
from bilevel.monitor.findings import more_steps
from bilevel.monitor.record_words import harm_words
from bilevel.settings.fields import Settings
from bilevel.step.result import StepResult
from bilevel.step.schedule import schedule
from bilevel.weights.chunks import chunks
from bilevel.weights.fixed import Weights

log = logging.getLogger("bilevel")

WINDOW = 32  # steps; a loss is compared with their median
COLLAPSED = 0.99  # weight of the largest source
SPREAD = 0.01  # effective number of records, as a share of all
MOVED = 0.01  # if no entry of x has moved so far, x has not started to learn
NEAR, FAR = 1, 3  # moves of x: less than NEAR leaves the weights similar, FAR brings a weight near 0
ASCENT = 5  # steps; their median is the present validation loss of u


class Watch:
    """Warns about each kind of trouble and says what to try; stops a run in which u diverges. It changes nothing.

    Create it while x is at its start.
    """

    def __init__(self, settings: Settings, weights: Weights, sources: list[str], steps: int):
        self.settings, self.watched, self.sources, self.steps = settings, weights, sources, steps
        equal = weights.x.min() == weights.x.max()
        self.start = weights.x[:1].clone() if equal else weights.x.clone()  # one number if all are equal
        self.losses: list[float] = []
        self.val_start: float | None = None  # u's first validation loss
        self.val_losses: list[float] = []  # its last ones
        self.told: list[str] = []

    def loss(self, step: int, result: StepResult) -> None:
        """Call after each step. A loss of twice the median of the last ones, and 0.5 nats above it, is a spike.

        NaN is ignored. With sampling=weighted, loss_w jumps with every sample that stands for many, so the validation
        loss is used instead; its batches are drawn uniformly.
        """
        weighted = self.settings.learned and self.settings.sampling == "weighted"
        name, loss = ("val_loss_w", result.val_loss) if weighted else ("loss_w", result.loss_w)
        if math.isnan(loss):
            return
        if len(self.losses) == WINDOW:
            usual = statistics.median(self.losses)
            if loss > usual + max(usual, 0.5):
                log.warning(
                    f"step {step}: {name} {loss:.4g} after {usual:.4g} in the {WINDOW} steps before. If it stays high, "
                    f"try a smaller lr_y ({self.settings.lr_y:g}), clip_grad_norm=1 or a larger warmup_ratio"
                )
                self.losses = []
        self.losses = [*self.losses, loss][-WINDOW:]

    def ascent(self, val_loss: float | None) -> None:
        """Call after each step with the validation loss of u, which u ascends with order 2; cross-entropy is unbounded.

        Raises TrainingStopped if the median of the last ones is twice the first and 0.5 nats above it.
        """
        if val_loss is None:
            return
        if self.val_start is None:
            self.val_start = val_loss
        self.val_losses = [*self.val_losses, val_loss][-ASCENT:]
        now, start = statistics.median(self.val_losses), self.val_start
        if len(self.val_losses) == ASCENT and now > start + max(start, 0.5):
            raise TrainingStopped(
                f"u's validation loss has risen from {start:.4g} to {now:.4g}: with order=2 u ascends it, and the "
                f"training loss no longer holds it back. Start again with a larger alpha ({self.settings.alpha:g}), "
                f"a smaller lr_y ({self.settings.lr_y:g}), or order=1"
            )

    def weights(self, step: int) -> None:
        """Call at evaluations. Warns once each if x cannot move far, the weights collapse, or x is idle halfway."""
        s = self.settings
        waits = self._waits()
        if step == 0 and waits:
            self._tell(step, "waits", waits)
        elif step == 0 and s.x_has_rate and s.lr_x and (reach := self.reach()) < NEAR:
            words = (
                f"in this run x_optimizer={s.x_optimizer} moves x by {reach:.2g} at most; about {FAR} bring a weight "
                f"near 0, so the weights will differ little. Try lr_x={s.lr_x * FAR / reach:.1g} ({s.lr_x:g}), more "
                f"steps or a smaller upper_every ({s.upper_every})"
            )
            if s.weights == "sample":
                words += "; or x_optimizer=auto, which needs no rate"
            self._tell(step, "slow", words)
        early = step <= self.steps / 10
        if not self.watched.per_sample:
            p = self.watched.p
            top = int(p.argmax())
            # One of two sources is meant to win, but not at the start.
            if p[top] > COLLAPSED and (early or len(self.sources) > 2):
                slower = f"a smaller lr_x ({s.lr_x:g}), " if s.x_has_rate else ""
                self._tell(
                    step,
                    "collapsed",
                    f"{p[top]:.1%} of the weight is on {self.sources[top]}, so the other sources hardly train the "
                    f"model. If that is too early or not wanted, try {slower}x_warmup_steps or more validation data",
                )
        elif (share := self.watched.effective_share()) < SPREAD:
            self._tell(
                step,
                "collapsed",
                f"the weights are as uneven as if {share:.2%} of the records counted and the others did not. If that "
                f"is not wanted, try a smaller lr_x ({s.lr_x:g}), x_map=sigmoid, or more validation data",
            )
        waiting = s.x_warmup_steps + 10 * s.upper_every if s.x_has_rate else 10
        if (s.lr_x or not s.x_has_rate) and step >= max(self.steps / 2, waiting) and self._moved() < MOVED:
            cause = waits or (self._rate_too_low() if s.x_has_rate else self._held_back())
            self._tell(step, "frozen", f"the weights are still where they started: {cause}")

    def reach(self) -> float:
        """The largest distance that x_optimizer can move an entry of x in this run, from its learning rates."""
        s, weights = self.settings, self.watched
        rates = [
            s.lr_x * schedule(step, self.steps, s.warmup_ratio, s.x_lr_schedule)
            for step in range(s.x_warmup_steps, self.steps)
            if (step + 1) % s.upper_every == 0
        ]
        # A record is visited at a share of the steps of x, a source at all of them.
        visited = min(1, s.upper_every * s.global_batch_size / weights.n) if weights.per_sample else 1
        return visited * weights.optimizer.reach(rates)

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

    def _waits(self) -> str:
        """What to do about a warm-up that takes more than half of the run; empty if it does not."""
        s = self.settings
        if 2 * s.x_warmup_steps <= self.steps:
            return ""
        longer = f"epochs={s.epochs * math.ceil(10 * s.x_warmup_steps / self.steps):g}"
        if s.max_steps is not None:
            longer = f"max_steps={10 * s.x_warmup_steps}"
        return (
            f"x_warmup_steps ({s.x_warmup_steps}) leaves x only the last {self.steps - s.x_warmup_steps} of the run's "
            f"{self.steps} steps. Give x_warmup_steps={self.steps // 10}, or make the run longer ({longer})"
        )

    def _rate_too_low(self) -> str:
        s = self.settings
        return (
            f"try a larger lr_x ({s.lr_x:g}) or a smaller upper_every ({s.upper_every}). If gap in metrics.csv is near "
            f"0, try a larger lr_y ({s.lr_y:g}) or a smaller alpha ({s.alpha:g})"
        )

    def _held_back(self) -> str:
        """The reason why x_optimizer=auto has not moved x, as sentences for the user."""
        s, evidence = self.settings, self.watched.evidence
        if evidence is None:
            return f"{harm_words(self.watched)}. Equally good records stay there"
        if not (evidence.H > 0).any():
            return (
                "there is no evidence at all, because in no step have gaps of two sources differed. Try a "
                f"global_batch_size ({s.global_batch_size}) that holds several sources, a larger lr_y ({s.lr_y:g}) or "
                f"a smaller alpha ({s.alpha:g})"
            )
        found = evidence.findings(self.watched.x)
        least, most, name = min(
            (each.steps_least, each.steps_most, name) for each, name in zip(found, self.sources, strict=True)
        )
        return (
            f"no difference between the sources has been shown yet; the nearest to a verdict is {name}, with "
            f"{more_steps(least, most)}. Equally good sources stay there"
        )

    def _moved(self) -> float:
        """The largest distance of an entry of x from its start."""
        x = self.watched.x
        start = self.start.expand(len(x))
        return max(float((x[part] - start[part]).abs().max()) for part in chunks(len(x)))

    def _tell(self, step: int, kind: str, words: str) -> None:
        if kind not in self.told:
            log.warning(f"step {step}: {words}")
            self.told.append(kind)
