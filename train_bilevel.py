"""Fine-tune a causal language model and learn, in the same run, how much every source or sample should count.

    python train_bilevel.py --config configs/tiny.yaml [--setting value ...]

Each step trains two copies of the model on one weighted batch, w also on validation; what a sample's loss differs by
between them moves its weight. README.md has the equations, bilevel/settings/fields.py the settings.
"""

import dataclasses
import logging
import math
import os
import sys
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.errors import ConfigError, UserError
from bilevel.run.preflight import check_files, check_shape, check_steps, too_large
from bilevel.seeding import dropout_seed
from bilevel.settings.command_line import load_settings
from bilevel.settings.fields import Settings, dump
from bilevel.step.schedule import schedule

if TYPE_CHECKING:  # imported where they are used, so that --help and mistakes are answered at once
    from tqdm import tqdm

    from bilevel.monitor.metrics import MetricsLog
    from bilevel.run.checkpoint import Checkpoints
    from bilevel.run.interrupt import Interrupt
    from bilevel.run.state import Run

log = logging.getLogger("bilevel")


# ----------------------------------------------------------------------------------------------------------------------
# main


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 the user's mistake, 1 training had to stop, 143 and 130 after SIGTERM and SIGINT."""
    try:
        settings, dry_run = load_settings(argv)
        files = check_files(settings)
        if dry_run:
            print(dump(settings), end="")
            if settings.backend == "deepspeed" or settings.gpu_memory_gib:
                quiet_libraries()
                from bilevel.memory.plan import memory_report

                processes, on_host = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
                report = memory_report(settings, processes, hosts=math.ceil(processes / on_host))
                print(textwrap.indent(report, "# ", lambda _: True))
            return 0
        quiet_libraries()
        run, checkpoints = setup(settings, files)
        from bilevel.run.folder import open_folder

        metrics = open_folder(run, checkpoints)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    code = fit(run, checkpoints, metrics)
    run.world.leave()
    return code


def quiet_libraries() -> None:
    """Third-party progress bars and warnings are not the user's concern. Imports them, which takes seconds."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # on all cores; said, it gives no warning at a fork
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which else warns
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that deepspeed and transformers call
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


# ----------------------------------------------------------------------------------------------------------------------
# setup


def setup(settings: Settings, files: dict[str, list[Path]]) -> "tuple[Run, Checkpoints]":
    """Load data, model and the checkpoint to go on from. Raises UserError; nothing has been written when it does."""
    from bilevel.model.loading import load_tokenizer, model_shape

    shape = model_shape(settings)
    check_shape(settings, shape)  # before what else takes a second to import
    from bilevel.baselines.scores import check_scorable
    from bilevel.data.samples import load_samples
    from bilevel.data.stream import steps_per_run
    from bilevel.data.tokenise import make_tokeniser
    from bilevel.model.copies import make_copies, start_world
    from bilevel.run.checkpoint import Checkpoints
    from bilevel.run.state import Run, make_weights

    world = start_world(settings)
    with world.main_first():  # it fills the cache that the others read
        tokenizer = load_tokenizer(settings, files["train"])
        tokeniser = make_tokeniser(tokenizer, settings)
        parts = {part: load_samples(files[part], settings.format, tokeniser) for part in files if files[part]}
        pool = parts["train"]
        if settings.val_in_training:
            pool = load_samples(files["train"] + files["val"], settings.format, tokeniser)
    if problems := too_large(settings, {part: len(samples) for part, samples in parts.items()}):
        raise ConfigError(problems)

    steps = steps_per_run(len(pool), settings.global_batch_size, settings.epochs, settings.max_steps)
    check_steps(settings, steps)
    x = make_weights(settings, parts["train"])
    folder = settings.run_folder / "checkpoints"
    data = {
        f"{part} {name}": fingerprint
        for part, samples in parts.items()
        for name, fingerprint in samples.fingerprints.items()
    }
    checkpoints = Checkpoints(folder, world, dataclasses.asdict(settings), data, settings.keep_checkpoints)
    state = checkpoints.read(settings.resume)
    check_scorable(settings, parts["train"])
    copies, lisa = make_copies(settings, world, shape, tokenizer, steps_done=state["step"] if state else 0)
    val, test = parts.get("val"), parts.get("test")
    run = Run(settings, world, tokenizer, parts["train"], val, test, pool, copies, lisa, x, steps)
    if state:
        run.load_state_dict(state)
    return run, checkpoints


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def fit(run: "Run", checkpoints: "Checkpoints", metrics: "MetricsLog") -> int:
    """Train, log, evaluate, save. The exit code: 0 done, 1 training had to stop, 128 + n after signal n."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from bilevel.baselines.scores import score
    from bilevel.errors import TrainingStopped
    from bilevel.run.interrupt import Interrupt, Interrupted
    from bilevel.run.messages import describe, what_next

    log.info(describe(run))
    screen = run.world.main and sys.stderr.isatty()
    bar = tqdm(total=run.steps if run.copies else None, initial=run.step, unit="step", disable=not screen)
    with logging_redirect_tqdm([log]), bar, Interrupt(run.world) as interrupt:
        try:
            if run.copies:
                train(run, checkpoints, metrics, bar, interrupt)
            else:
                score(run, lambda: (bar.update(), interrupt.check()))
                log_row(run, metrics, True, interrupt)
        except TrainingStopped as error:
            checkpoints.finish()
            where = f"step {run.step + 1}: " if run.copies else ""  # a score's models say it themselves
            log.error(f"{where}{error}; {what_next(run.settings, checkpoints.last)}")
            tell_launcher(error)
            metrics.close()
            return 1
        except Interrupted as stopped:
            if run.copies and checkpoints.step != run.step:
                checkpoints.begin(run.step, run.state_dict())
            saved = ", saved" if checkpoints.finish() and run.copies else ""
            log.info(f"{stopped}: ended after step {run.step}{saved}; {what_next(run.settings, checkpoints.last)}")
            metrics.close()
            return 128 + stopped.signal
    checkpoints.finish()
    metrics.close()
    return finish(run, checkpoints)


def train(run: "Run", checkpoints: "Checkpoints", metrics: "MetricsLog", bar: "tqdm", interrupt: "Interrupt") -> None:
    """The loop, to the last step and its row. Raises TrainingStopped, and Interrupted between two steps."""
    from bilevel.run.messages import show

    s = run.settings
    eval_every, save_every = (
        every if every is not None else max(1, run.steps // 10) for every in (s.eval_every, s.save_every)
    )
    while True:
        evaluating = run.step % eval_every == 0 or run.step == run.steps
        if evaluating or run.step % s.log_every == 0:
            log_row(run, metrics, evaluating, interrupt)
            show(bar, run.row, run.steps, evaluating)
        if run.step == run.steps:
            return
        metrics.count(one_step(run))
        run.step += 1
        bar.update()
        checkpoints.poll()
        if save_every and run.step % save_every == 0:
            checkpoints.begin(run.step, run.state_dict())
        interrupt.check()


def log_row(run: "Run", metrics: "MetricsLog", evaluating: bool, interrupt: "Interrupt") -> None:
    """Complete the last step's row with the weights, and with what an evaluation finds, and write it."""
    from bilevel.monitor.evaluation import evaluate

    s, x, train = run.settings, run.x, run.train
    run.row = {"step": run.step, "epoch": run.step * s.global_batch_size / len(run.pool)} | run.row
    if not run.per_sample:
        run.row |= {f"weight/{name}": p for name, p in zip(train.sources, x.p.tolist(), strict=True)}
    if evaluating:
        run.row |= evaluate(run.copies, x, train, run.test, s.micro_batch_tokens, pause=interrupt.check)
        if s.learned:
            run.watch.weights(run.step)
    metrics.write(run.row, x if evaluating and run.per_sample else None, run.all_operations)


def one_step(run: "Run") -> int:
    """A step of the copies, and of x when it is its turn; returns the tokens that the passes have read."""
    from bilevel.step.align import align_step
    from bilevel.step.f2sa import penalty_step
    from bilevel.step.plain import plain_step
    from bilevel.step.result import NonFiniteLoss

    s, x, step = run.settings, run.x, run.step
    if run.lisa:
        run.lisa.switch(step, run.copies)
    lr_y = s.lr_y * schedule(step, run.steps, s.warmup_ratio, "cosine")
    seed = dropout_seed(s.seed, step)
    train, validation = run.draw()
    try:
        if s.method == "fixed":
            result = plain_step(run.copies["w"], train, lr_y, seed)
        elif s.method == "align":
            result = align_step(run.copies["w"], x, train, validation, lr_y, seed)
        else:
            result = penalty_step(**run.copies, x=x, train=train, validation=validation, nu=s.nu, lr_y=lr_y,
                                  seed=seed, order=s.order)  # fmt: skip
    except NonFiniteLoss as error:
        run.skip(error)
        result, signal = error.result, {}
    else:
        signal = run.guard.check(step + 1, train, result.gaps)
        run.watch.loss(step + 1, result)
        run.watch.ascent(result.val_loss_u)
        if run.lisa:
            run.lisa.verify(moved=lr_y > 0 and result.grad_norm_w > 0 and result.grad_norm_u != 0)
    run.row = result.row() | {"lr_y": lr_y} | signal
    if s.learned:
        run.row |= step_x(run)
        if s.sampling == "weighted":
            run.row["computed"] = len(train.sample_ids) / train.drawn
    return result.tokens


def step_x(run: "Run") -> dict[str, float]:
    """A step of x when it is its turn, and its column of metrics.csv."""
    s, step = run.settings, run.step
    lr_x = s.lr_x * schedule(step, run.steps, s.warmup_ratio, s.x_lr_schedule)
    if step < s.x_warmup_steps:
        run.x.clear()
    elif (step + 1) % s.upper_every == 0:
        run.x.step(lr_x)
    return {"lr_x": lr_x}


def finish(run: "Run", checkpoints: "Checkpoints") -> int:
    """What a finished run leaves, and its closing words; the exit code."""
    from safetensors import SafetensorError

    from bilevel.report.command import report_on
    from bilevel.run.messages import what_next
    from bilevel.run.results import draw_weights, summary, write_weights

    s, folder = run.settings, run.settings.run_folder
    try:
        if s.save_model in run.copies:
            run.copies[s.save_model].save(folder / "model", run.tokenizer)
        if run.world.main:
            draw_weights(folder, run.x, run.train)
            # Last of the results: it says that the run is finished.
            write_weights(folder / "weights.csv", run.x, run.train, run.scores)
            report_on(folder)
            log.info(summary(folder, run.x, run.train, run.row))
            (folder / "lock").unlink()
    except (OSError, SafetensorError) as error:
        log.error(f"the results cannot be written: {error}. Make room; {what_next(s, checkpoints.last)}")
        return 1
    return 0


def tell_launcher(error: Exception) -> None:
    """torchrun ends its report with the first error of all ranks, if it is told."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Exception as error:
        tell_launcher(error)
        raise
