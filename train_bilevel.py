"""Fine-tune a causal language model and learn, in the same run, how much every source or sample should count.

    python train_bilevel.py --config configs/tiny.yaml [--setting value ...]

Each step trains two copies of the model on the same weighted batch: u on it alone, w on validation data as well. The
difference of their losses on a sample moves the sample's weight. docs/algorithm.md has the equations, docs/settings.md
the settings, docs/contributing.md ("Where is it?") the place of everything else.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable

from bilevel.run.interrupt import Interrupt, Interrupted
from bilevel.run.libraries import quiet_libraries
from bilevel.run.start import Files, refuse, start
from bilevel.shell import to_reader

# --help, dry runs and mistakes are answered here, before seconds of imports.
if __name__ == "__main__":
    interrupt = Interrupt().begin()
    started = to_reader(start, sys.argv[1:])
    if isinstance(started, int):
        sys.exit(started)

quiet_libraries()

from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm.contrib.logging import logging_redirect_tqdm

from bilevel.baselines.scores import check_scorable, score
from bilevel.data.samples import load_samples
from bilevel.data.tokenise import make_tokeniser
from bilevel.errors import ConfigError, TrainingStopped, UserError
from bilevel.model.copies import make_copies, start_world
from bilevel.model.loading import load_tokenizer, model_shape
from bilevel.monitor.evaluation import evaluate
from bilevel.monitor.findings import evidence_row, source_table
from bilevel.monitor.metrics import MetricsLog
from bilevel.monitor.source_columns import source_row
from bilevel.report.command import report_on
from bilevel.run.checkpoint import Checkpoints, restore
from bilevel.run.ending import complete, is_written, keep_state, write_results
from bilevel.run.folder import open_folder
from bilevel.run.messages import describe, or_finish, what_next
from bilevel.run.preflight import check_steps, too_large
from bilevel.run.progress import Progress
from bilevel.run.stages import stage
from bilevel.run.state import Row, Run, make_weights
from bilevel.seeding import dropout_seed
from bilevel.settings.fields import Settings
from bilevel.settings.methods import METHODS
from bilevel.settings.run_length import steps_per_run
from bilevel.step.result import NonFiniteLoss

log = logging.getLogger("bilevel")


# ----------------------------------------------------------------------------------------------------------------------
# main


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 a mistake of the user, 1 training had to stop, 128 + n after signal n (143: SIGTERM)."""
    with Interrupt() as interrupt:
        started = start(argv)
        return started if isinstance(started, int) else run_to_end(*started, interrupt)


def run_to_end(settings: Settings, files: Files, interrupt: Interrupt) -> int:
    """Load, train and write the results of a run whose settings and files have been checked; the exit code."""
    try:
        if is_written(settings):
            return complete(settings, report_on)
        run, checkpoints = setup(settings, files)
        metrics = open_folder(run, checkpoints)
    except UserError as error:
        return refuse(error)
    interrupt.hold(run.world, settings.run_folder)
    code = fit(run, checkpoints, metrics, interrupt)
    run.world.leave()
    return code


# ----------------------------------------------------------------------------------------------------------------------
# setup


def setup(settings: Settings, files: Files) -> tuple[Run, Checkpoints]:
    """Load data, model and the checkpoint to resume from. Raises UserError before anything has been written."""
    world = start_world(settings)
    stage(f"reading and tokenising the data ({sum(map(len, files.values()))} sources)")
    with world.main_first("preparing the data"):  # it fills the cache that the others read
        tokenizer = load_tokenizer(settings, files["train"])
        tokeniser = make_tokeniser(tokenizer, settings)
        parts = {part: load_samples(files[part], tokeniser) for part in files if files[part]}
        pool = parts["train"]
        if settings.val_in_training:
            pool = load_samples(files["train"] + files["val"], tokeniser)
    if problems := too_large(settings, {part: len(samples) for part, samples in parts.items()}):
        raise ConfigError(problems)

    steps = steps_per_run(len(pool), settings.global_batch_size, settings.epochs, settings.max_steps)
    check_steps(settings, steps)
    weights = make_weights(settings, parts["train"])
    data = {
        f"{part} {name}": fingerprint
        for part, samples in parts.items()
        for name, fingerprint in samples.fingerprints.items()
    }
    folder = settings.run_folder / "checkpoints"
    checkpoints = Checkpoints(folder, world, dataclasses.asdict(settings), data, settings.checkpoints_kept)
    state = checkpoints.read(settings.resume)
    check_scorable(settings, parts["train"])
    steps_done = state["step"] if state else 0
    twice = len(settings.copies) == 2 and settings.lora_rank is None
    stage("loading the model" + (" twice, as w and u" if twice else ""))
    copies, lisa = make_copies(settings, world, model_shape(settings), tokenizer, steps_done)
    val, test = parts.get("val"), parts.get("test")
    run = Run(settings, world, tokenizer, parts["train"], val, test, pool, copies, lisa, weights, steps)
    if state:
        restore(run, state, checkpoints)
    return run, checkpoints


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def fit(run: Run, checkpoints: Checkpoints, metrics: MetricsLog, interrupt: Interrupt) -> int:
    """Train, log, evaluate, save. The exit code: 0 done, 1 training had to stop, 128 + n after signal n."""
    log.info(describe(run))
    try:
        with logging_redirect_tqdm([log]), Progress(run) as progress:
            if run.copies:
                row = train(run, checkpoints, metrics, progress, interrupt)
            else:
                score(run, lambda: (progress.advance(), interrupt.check()))
                row = log_row(run, metrics, True, interrupt.check)
        keep_state(run, checkpoints)
        interrupt.check()
        metrics.tracker.sources(source_table(run.weights, run.train.sources, run.train.sizes))
        metrics.flush()
        code = write_results(run, row, checkpoints, interrupt, report_on)
        page = run.settings.run_folder / "report.html"
        if run.settings.track_report and page.is_file():
            metrics.tracker.report(page)
        metrics.close()
        return code
    except TrainingStopped as error:
        checkpoints.finish()
        where = f"step {run.step + 1}: " if run.copies else ""  # a score's models say it themselves
        log.error(f"{where}{error}; {what_next(run.settings, checkpoints.last)}")
        tell_launcher(error)
        metrics.close()
        return 1
    except Interrupted as stopped:
        saved = ", saved" if keep_state(run, checkpoints) else ""
        then = what_next(run.settings, checkpoints.last) + or_finish(run) * bool(saved)
        log.info(f"{stopped}: ended after step {run.step}{saved}; {then}")
        metrics.close()
        return 128 + stopped.signal


def train(run: Run, checkpoints: Checkpoints, metrics: MetricsLog, progress: Progress, interrupt: Interrupt) -> Row:
    """The loop; returns the row of the last step. Raises TrainingStopped, and Interrupted between two steps."""
    s = run.settings
    save_every = max(1, run.steps // 10) if s.save_every is None else s.save_every
    interrupt.check()
    while True:
        if interrupt.finishing and run.step:
            run.end_here()
        if run.step == run.steps:
            run.weights.conclude()
        evaluating = run.evaluates
        if evaluating or run.step % s.log_every == 0:
            row = log_row(run, metrics, evaluating, progress.patient(interrupt.check))
            if evaluating:
                progress.evaluated(row)
        if run.step == run.steps:
            return row
        metrics.count(one_step(run))
        run.step += 1
        progress.advance()
        checkpoints.poll()
        if save_every and run.step % save_every == 0:
            checkpoints.begin(run.step, run.state_dict())
        interrupt.check()


def log_row(run: Run, metrics: MetricsLog, evaluating: bool, pause: Callable[[], None]) -> Row:
    """Write the row of the last step: the values of the step, the weights and, at evaluations, their results."""
    s, weights = run.settings, run.weights
    row = {"step": run.step, "epoch": run.step * s.global_batch_size / len(run.pool)} | run.row
    if not run.per_sample:
        row |= {f"weight/{name}": p for name, p in zip(run.train.sources, weights.p.tolist(), strict=True)}
        row |= evidence_row(weights, run.train.sources)
    if evaluating:
        row |= evaluate(run.copies, weights, run.train, run.test, s.micro_batch_tokens, pause)
        if s.learned:
            run.watch.weights(run.step)
    metrics.write(row, weights if evaluating and run.per_sample else None, run.all_operations)
    return row


def one_step(run: Run) -> int:
    """One step of the copies, and of x if it is due; returns the number of tokens that the passes have read."""
    s, weights, step = run.settings, run.weights, run.step
    if run.lisa:
        run.lisa.switch(step, run.copies)
    lr_y, lr_x, alpha = run.schedule.lr_y(step), run.schedule.lr_x(step), run.schedule.alpha(step)
    seed = dropout_seed(s.seed, step)
    train, validation = run.draw()
    try:
        result = METHODS[s.method].function()(run.copies, weights, train, validation, lr_y, seed, 1 / alpha, s.order)
    except NonFiniteLoss as error:
        run.skip(error)
        result, signal = error.result, {}
    else:
        signal = run.guard.check(step + 1, train, result.gaps)
        run.watch.loss(step + 1, result)
        run.watch.ascent(result.val_loss_u)
        if run.lisa:
            run.lisa.verify(moved=lr_y > 0 and result.grad_norm_w > 0 and result.grad_norm_u != 0)
    if s.learned:
        move_weights(run, lr_x, alpha)
    rates = {"lr_y": lr_y, "lr_x": lr_x} if s.x_has_rate else {"lr_y": lr_y}
    rates |= {"alpha": alpha} if s.learned and s.alpha_start else {}
    computed = {"computed": len(train.sample_ids) / train.drawn} if s.weighted_draws else {}
    run.row = result.row() | source_row(run.pool, run.train.sources, train, result) | rates | signal | computed
    return result.tokens


def move_weights(run: Run, lr_x: float, alpha: float) -> None:
    """A step of x if it is due: after x_warmup_steps, every x_every steps (1 with x_optimizer=auto)."""
    s, step = run.settings, run.step
    if step < s.x_warmup_steps:
        run.weights.clear()
    elif (step + 1) % s.x_every == 0:
        run.weights.factor = s.x_factor * (alpha / s.alpha)
        run.weights.step(lr_x)


def tell_launcher(error: Exception) -> None:
    """Report the error to torchrun, which ends its output with the first error of all ranks."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


if __name__ == "__main__":
    try:
        sys.exit(run_to_end(*started, interrupt))
    except Exception as error:
        tell_launcher(error)
        raise
