"""What a run says while it trains: a bar in a terminal, lines without one, and what is known about the weights."""

import logging
import re
import shlex
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from bilevel.errors import first
from bilevel.monitor import findings, record_words
from bilevel.monitor.metrics import peak_memory
from bilevel.monitor.words import duration, many, memory
from bilevel.run.interrupt import FINISH
from bilevel.run.state import Row, Run
from bilevel.settings.run_length import evaluations

log = logging.getLogger("bilevel")

MOST = 12  # sources that have a line each; of more, those with the lowest weights


class Progress:
    """The bar and the lines of a run. It only reads; nothing that is computed depends on it.

    Lines come at evaluations and, without a terminal, also after the first step and then at least once a minute.
    Create it just before the first step.
    """

    EVERY = 60.0  # seconds
    LONG = 20.0  # seconds; an evaluation that takes longer says that it is one

    def __init__(self, run: Run):
        self.run = run
        screen = run.world.main and sys.stderr.isatty()
        self.bar = tqdm(total=run.steps if run.copies else None, initial=run.step, unit="step", disable=not screen)
        self.lines = run.world.main and not screen
        self.done = 0  # steps of this process; a baseline that scores counts its steps and passes
        self.first = self.later = self.evaluating = 0.0  # seconds of the first step, of the others, of evaluations
        self.evaluations = 0
        self.began = self.said = self.mark = time.perf_counter()
        self.exported: list[str] = []  # what the export was last said to leave out
        self.tested: Row = {}  # the last results on test data and records known as noisy

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def advance(self) -> None:
        """Call after each step."""
        if not self.bar.disable:
            self.bar.set_postfix_str(self._short(), refresh=False)
        self.bar.update()
        self.done, now = self.done + 1, time.perf_counter()
        if self.done == 1:
            self.first = now - self.mark  # it also sets up what the others use
        else:
            self.later += now - self.mark
        self.mark = now
        soon = self.run.copies and self.run.evaluates  # an evaluation follows, and with it a line
        each = self.later / (self.done - 1) if self.done > 1 else 0.0
        if self.lines and not soon and (self.done == 1 or now + each - self.said >= self.EVERY):
            self._say(now)

    def evaluated(self, row: Row) -> None:
        """Call with the row of an evaluation, once it is written."""
        names = {"test": "test_loss_w", "ROC": "roc_auc"}
        self.tested = {name: row[column] for name, column in names.items() if column in row}
        now = time.perf_counter()
        self.evaluating, self.evaluations = self.evaluating + now - self.mark, self.evaluations + 1
        if self.run.world.main:
            self._say(now)
        self.mark = time.perf_counter()

    def patient(self, pause: Callable[[], None]) -> Callable[[], None]:
        """`pause`, which an evaluation calls again and again; the result also says so if it takes long."""
        began, told = time.perf_counter(), []

        def check() -> None:
            pause()
            if self.run.world.main and not told and time.perf_counter() - began > self.LONG:
                told.append(True)
                log.info(f"step {self.run.step}: evaluating on {many(len(self.run.test), 'test record')} ...")

        return check

    def _say(self, now: float) -> None:
        self.said = now
        run = self.run
        if not run.copies:
            log.info(f"scoring: {self.done:,} steps and passes in {duration(now - self.began)}")
            return
        left = run.steps - run.step
        lines = [f"step {run.step}/{run.steps}: {self._facts()}"]
        if self.done:
            each = self.later / (self.done - 1) if self.done > 1 else self.first
            rest = f", about {duration(left * each + self._evaluations_left())} left" if left else ""
            lines.append(f"{duration(each)} per step{rest}, memory {memory(peak_memory())}")
        if left and run.step:
            lines += self._known()
        log.info("\n  ".join(lines))

    def _evaluations_left(self) -> float:
        """Seconds of the evaluations to come, each as long as those so far."""
        run = self.run
        number = evaluations(run.steps, run.eval_every, run.step)
        return number * self.evaluating / max(1, self.evaluations)

    def _facts(self) -> str:
        """The losses of the last step and evaluation, in words; w is the copy that is trained with validation data."""
        row = self.run.row
        batch = _words({"loss": row.get("loss_w"), "validation": row.get("val_loss_w")})
        return "; ".join(words for words in (batch and f"batch {batch}", _words(self.tested)) if words)

    def _short(self) -> str:
        """The loss and the lowest weight of a source, beside the bar."""
        run, words = self.run, re.split("[,;]", self._facts())[0]
        if not run.copies or not run.settings.learned or run.per_sample:
            return words
        p = run.weights.p.tolist()
        return f"{words}, {run.train.sources[p.index(min(p))]} {findings.share(min(p))}"

    def _known(self) -> list[str]:
        """What is known about each source, or about the records."""
        run = self.run
        if not run.settings.learned:
            return []
        if run.per_sample:
            return record_words.lines(run.weights, run.train)
        order = sorted(range(len(run.train.sources)), key=run.weights.p.tolist().__getitem__)
        found = findings.lines(run.weights, run.train.sources)
        found = found if len(found) <= MOST else first([found[k] for k in order], MOST)
        return found + self._export()

    def _export(self) -> list[str]:
        """What the cleaned data would leave out if the run ended here, when it has changed."""
        run, now = self.run, findings.left_out(self.run.weights, self.run.train.sources, self.run.train.sizes)
        if now == self.exported:
            return []
        self.exported = now
        if not now:
            return ["the export leaves out no source any more"]
        finish = shlex.quote(str(run.settings.run_folder / FINISH))
        rest = f"; `touch {finish}` ends the run now, with results" if run.step < run.steps else ""
        return [f"the export leaves out {', '.join(first(now, 3))}{rest}"]


def _words(facts: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in facts.items() if value is not None)
