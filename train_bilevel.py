"""Fine-tune a causal language model and learn, in the same run, how much every source or sample should count.

    python train_bilevel.py --config configs/tiny.yaml [--setting value ...]

Each step trains two copies of the model on one weighted batch, w also on validation; what a sample's loss differs by
between them moves its weight. README.md has the equations, bilevel/config.py the settings.
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

from bilevel.check import check_files, check_shape, hold, too_large
from bilevel.command_line import load_settings
from bilevel.config import ConfigError, Settings, UserError, dump

if TYPE_CHECKING:  # imported where they are used, so that --help and mistakes are answered at once
    from tqdm import tqdm

    from bilevel.checkpoint import Checkpoints
    from bilevel.interrupt import Interrupt
    from bilevel.metrics import MetricsLog
    from bilevel.run import Run

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
                from bilevel.plan import memory_report

                processes, on_host = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
                report = memory_report(settings, processes, hosts=math.ceil(processes / on_host))
                print(textwrap.indent(report, "# ", lambda _: True))
            return 0
        quiet_libraries()
        run, checkpoints = setup(settings, files)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return fit(run, checkpoints)


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
    from bilevel.model import load_tokenizer, model_shape

    shape = model_shape(settings)
    check_shape(settings, shape)  # before what else takes a second to import
    from bilevel.checkpoint import Checkpoints
    from bilevel.copies import start_world, two_copies
    from bilevel.data import load_samples, steps_per_run
    from bilevel.results import read_start
    from bilevel.run import Run
    from bilevel.tokenise import Tokeniser
    from bilevel.weights import SampleWeights, SourceWeights

    world = start_world(settings)
    with world.main_first():  # it fills the cache that the others read
        tokenizer = load_tokenizer(settings, files["train"])
        tokeniser = Tokeniser(tokenizer, settings.max_length, settings.loss_on)
        train, val = (load_samples(files[part], settings.format, tokeniser) for part in ("train", "val"))
        test = load_samples(files["test"], settings.format, tokeniser) if files["test"] else None
    if problems := too_large(settings, {"train": len(train), "val": len(val)}):
        raise ConfigError(problems)

    start = read_start(settings.x_init, settings.weights == "sample", train)
    if settings.weights == "sample":
        x = SampleWeights(len(train), start, settings.x_map, settings.x_factor, settings.x_optimizer)
    else:
        x = SourceWeights(train.source_ids, start, settings.x_factor, settings.x_optimizer)
    folder = settings.run_folder / "checkpoints"
    data = {
        f"{part} {name}": fingerprint
        for part, samples in (("train", train), ("val", val), ("test", test))
        if samples is not None
        for name, fingerprint in samples.fingerprints.items()
    }
    checkpoints = Checkpoints(folder, world, dataclasses.asdict(settings), data, settings.keep_checkpoints)
    state = checkpoints.read(settings.resume)
    copies, lisa = two_copies(settings, world, shape, tokenizer, steps_done=state["step"] if state else 0)
    steps = steps_per_run(len(train), settings.global_batch_size, settings.epochs, settings.max_steps)
    run = Run(settings, world, tokenizer, train, val, test, copies, lisa, x, steps)
    if state:
        run.load_state_dict(state)
    return run, checkpoints


def open_metrics(run: "Run") -> "MetricsLog":
    """metrics.csv, timing.csv and the tracker of a run."""
    from bilevel.metrics import Columns, MetricsLog
    from bilevel.tracker import NoTracker, WandbTracker

    s = run.settings
    columns = Columns(
        run.train.sources,
        run.per_sample,
        tested=run.test is not None,
        noise_known=run.train.is_noisy is not None,
        bf16=run.copies["u"].bf16,
        weighted=s.sampling == "weighted",
        central=s.order == 2,
    )
    tracker = NoTracker()
    if s.tracker == "wandb" and run.world.main:
        tracker = WandbTracker(s.run_folder, s.run_folder.name, dataclasses.asdict(s))
    return MetricsLog(s.run_folder if run.world.main else None, columns, tracker, run.step)


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def fit(run: "Run", checkpoints: "Checkpoints") -> int:
    """Train, log, evaluate, save. The exit code: 0 done, 1 training had to stop, 128 + n after signal n."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from bilevel.f2sa import TrainingStopped
    from bilevel.interrupt import Interrupt, Interrupted
    from bilevel.screen import describe

    open_folder(run)
    log.info(describe(run))
    metrics = open_metrics(run)
    screen = run.world.main and sys.stderr.isatty()
    bar = tqdm(total=run.steps, initial=run.step, unit="step", disable=not screen)
    with logging_redirect_tqdm([log]), bar, Interrupt(run.world) as interrupt:
        try:
            train(run, checkpoints, metrics, bar, interrupt)
        except TrainingStopped as error:
            checkpoints.finish()
            saved = checkpoints.all()
            last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
            log.error(f"step {run.step + 1}: {error}; {last}")
            tell_launcher(error)
            metrics.close()
            return 1
        except Interrupted as stopped:
            if checkpoints.step != run.step:
                checkpoints.begin(run.step, run.state_dict())
            saved = checkpoints.finish()
            log.info(f"{stopped}: ended after step {run.step}" + (", saved; the same command goes on" if saved else ""))
            metrics.close()
            return 128 + stopped.signal
    checkpoints.finish()
    metrics.close()
    return finish(run)


def train(run: "Run", checkpoints: "Checkpoints", metrics: "MetricsLog", bar: "tqdm", interrupt: "Interrupt") -> None:
    """The loop, to the last step and its row. Raises TrainingStopped, and Interrupted between two steps."""
    from bilevel.screen import show

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
    from bilevel.evaluate import evaluate

    s, x, train = run.settings, run.x, run.train
    run.row = {"step": run.step, "epoch": run.step * s.global_batch_size / len(train)} | run.row
    if not run.per_sample:
        run.row |= {f"weight/{name}": p for name, p in zip(train.sources, x.p.tolist(), strict=True)}
    if evaluating:
        run.row |= evaluate(run.copies, x, train, run.test, s.micro_batch_tokens, pause=interrupt.check)
        run.watch.weights(run.step)
    metrics.write(run.row, x if evaluating and run.per_sample else None)


def one_step(run: "Run") -> int:
    """A step of u and w, and of x when it is its turn; returns the tokens that the passes have read."""
    from bilevel.f2sa import NonFiniteLoss, penalty_step

    s, x, step = run.settings, run.x, run.step
    if run.lisa:
        run.lisa.switch(step, run.copies)
    lr_y = s.lr_y * schedule(step, run.steps, s.warmup_ratio, "cosine")
    lr_x = s.lr_x * schedule(step, run.steps, s.warmup_ratio, s.x_lr_schedule)
    train, validation = run.draw()
    more = {"computed": len(train.sample_ids) / train.drawn} if s.sampling == "weighted" else {}
    try:
        result = penalty_step(**run.copies, x=x, train=train, validation=validation, nu=s.nu, lr_y=lr_y,
                              seed=dropout_seed(s.seed, step), order=s.order)  # fmt: skip
    except NonFiniteLoss as error:
        run.skip(error)
        result = error.result
    else:
        more |= run.guard.check(step + 1, train, result.gaps)
        run.watch.loss(step + 1, result.loss_w)
        run.watch.ascent(result.val_loss_u)
        if run.lisa and step == 0:
            run.lisa.verify(lr_y)
    run.row = result.row() | {"lr_y": lr_y, "lr_x": lr_x} | more
    if step < s.x_warmup_steps:
        x.clear()
    elif (step + 1) % s.upper_every == 0:
        x.step(lr_x)
    return result.tokens


def open_folder(run: "Run") -> None:
    """The run's folder with its resolved settings, written first."""
    from bilevel.screen import open_log

    folder = run.settings.run_folder
    if run.world.main:
        folder.mkdir(parents=True, exist_ok=True)
        run.lock = hold(folder)
        (folder / "config.yaml.new").write_text(dump(run.settings), encoding="utf-8")
        (folder / "config.yaml.new").rename(folder / "config.yaml")
    open_log(run)
    run.world.wait()
    if unseen := [rank for rank, seen in enumerate(run.world.gather(folder.is_dir())) if not seen]:
        log.warning(
            f"NO CHECKPOINTS: processes {unseen} do not see {folder}, where each has to write its share. Give an "
            "output_dir that all machines see, or this run cannot be resumed"
        )


def finish(run: "Run") -> int:
    """What a finished run leaves, and its closing words; the exit code."""
    from safetensors import SafetensorError

    from bilevel.results import draw_weights, summary, write_weights

    s, folder = run.settings, run.settings.run_folder
    try:
        if s.save_model != "none":
            run.copies[s.save_model].save(folder / "model", run.tokenizer)
        if run.world.main:
            draw_weights(folder, run.x, run.train)
            write_weights(folder / "weights.csv", run.x, run.train)  # last: it says that the run is finished
            log.info(summary(folder, run.x, run.train, run.row))
            (folder / "lock").unlink()
    except (OSError, SafetensorError) as error:
        log.error(
            f"the results cannot be written: {error}. Make room; the same command goes on from the last checkpoint"
        )
        return 1
    return 0


def schedule(step: int, steps: int, warmup_ratio: float, kind: str) -> float:
    """Factor of a step size at step 0..steps-1: linear from 0 over the warm-up, then constant or half a cosine to 0."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def dropout_seed(seed: int, step: int) -> int:
    """Where the step's dropout masks start; far from the neighbours', as micro-batches count up from it."""
    return (seed * 1_000_003 + step) * 100_003


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
