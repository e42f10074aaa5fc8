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
from typing import TYPE_CHECKING, Any

from bilevel.check import check_files, check_shape, too_large
from bilevel.command_line import load_settings
from bilevel.config import ConfigError, Settings, UserError, dump

if TYPE_CHECKING:  # imported where they are used, so that --help and mistakes are answered at once
    import transformers

    from bilevel.backend import ModelCopy
    from bilevel.data import Samples
    from bilevel.lisa import Lisa
    from bilevel.metrics import MetricsLog
    from bilevel.weights import SampleWeights, SourceWeights
    from bilevel.world import World

log = logging.getLogger("bilevel")


# ----------------------------------------------------------------------------------------------------------------------
# main


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 the user's mistake, 1 training failed."""
    try:
        settings, dry_run = load_settings(argv)
        quiet_libraries()
        files = check_files(settings)
        if dry_run:
            print(dump(settings), end="")
            if settings.backend == "deepspeed" or settings.gpu_memory_gib:
                from bilevel.plan import memory_report

                processes, on_host = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
                report = memory_report(settings, processes, hosts=math.ceil(processes / on_host))
                print(textwrap.indent(report, "# ", lambda _: True))
            return 0
        run = setup(settings, files)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if fit(run) else 1


def quiet_libraries() -> None:
    """Third-party progress bars and warnings are not the user's concern."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which else warns
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that deepspeed and transformers call
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


# ----------------------------------------------------------------------------------------------------------------------
# setup


@dataclasses.dataclass
class Run:
    """All that training needs, loaded and checked."""

    settings: Settings
    world: "World"
    tokenizer: "transformers.PreTrainedTokenizerBase"
    train: "Samples"
    val: "Samples"
    test: "Samples | None"
    copies: "dict[str, ModelCopy]"  # u and w
    lisa: "Lisa | None"
    x: "SourceWeights | SampleWeights"
    steps: int

    @property
    def per_sample(self) -> bool:
        return self.settings.weights == "sample"


def setup(settings: Settings, files: dict[str, list[Path]]) -> Run:
    """Load data and model. Raises UserError; nothing has been written when it does."""
    from bilevel.copies import start_world, two_copies
    from bilevel.data import load_samples, steps_per_run
    from bilevel.model import load_tokenizer, model_shape
    from bilevel.results import read_start
    from bilevel.tokenise import Tokeniser
    from bilevel.weights import SampleWeights, SourceWeights

    shape = model_shape(settings)
    check_shape(settings, shape)
    world = start_world(settings)
    tokenizer = load_tokenizer(settings, files["train"])
    tokeniser = Tokeniser(tokenizer, settings.max_length, settings.loss_on)
    with world.main_first():  # it fills the cache that the others read
        train, val = (load_samples(files[part], settings.format, tokeniser) for part in ("train", "val"))
        test = load_samples(files["test"], settings.format, tokeniser) if files["test"] else None
    if problems := too_large(settings, {"train": len(train), "val": len(val)}):
        raise ConfigError(problems)

    start = read_start(settings.x_init, settings.weights == "sample", train)
    if settings.weights == "sample":
        x = SampleWeights(len(train), start, settings.x_map, settings.alpha, settings.x_optimizer)
    else:
        x = SourceWeights(train.source_ids, start, settings.alpha, settings.x_optimizer)
    copies, lisa = two_copies(settings, world, shape, tokenizer)
    steps = steps_per_run(len(train), settings.global_batch_size, settings.epochs, settings.max_steps)
    return Run(settings, world, tokenizer, train, val, test, copies, lisa, x, steps)


def open_log(run: Run) -> None:
    """What is said goes to the screen and to run.log, by the main process."""
    log.setLevel(logging.INFO if run.world.main else logging.CRITICAL)
    log.handlers = [logging.StreamHandler(sys.stdout)]
    if run.world.main:
        log.addHandler(logging.FileHandler(run.settings.run_folder / "run.log", encoding="utf-8"))


def open_metrics(run: Run) -> "MetricsLog":
    """metrics.csv, timing.csv and the tracker of a run."""
    from bilevel.metrics import Columns, MetricsLog, NoTracker, WandbTracker

    s = run.settings
    columns = Columns(
        run.train.sources, run.per_sample, run.test is not None, run.train.is_noisy is not None, run.copies["u"].bf16
    )
    tracker = NoTracker()
    if s.tracker == "wandb" and run.world.main:
        tracker = WandbTracker(s.run_folder, s.run_folder.name, dataclasses.asdict(s))
        log.info(tracker.notice)
    return MetricsLog(s.run_folder if run.world.main else None, columns, tracker)


def describe(run: Run) -> str:
    """What is about to happen, in a few lines."""
    s = run.settings
    processes = "" if run.world.size == 1 else f" in {run.world.size} processes"
    lines = [
        f"{run.copies['w'].size / 1e6:.1f}M parameters, two copies on {run.world.device.type}{processes}; {run.steps} "
        f"steps of {s.global_batch_size} training and {s.val_batch_size} validation samples",
        f"lr_y {s.lr_y:g}, lr_x {s.lr_x:g} every {s.upper_every} steps, alpha {s.alpha:g}",
    ]
    if run.lisa:
        lines.append(
            f"LISA: {s.lisa_layers} of {run.lisa.blocks} blocks at a time, redrawn every {s.lisa_interval} steps"
        )
    sizes = run.train.source_ids.bincount().tolist()
    for source, size, dropped in zip(run.train.sources, sizes, run.train.dropped, strict=True):
        lines.append(f"  {source}: {size} samples" + dropped_words(dropped))
    for name, part in (("validation", run.val), ("test", run.test)):
        if part is not None:
            lines.append(f"  {name}: {len(part)} samples" + dropped_words(sum(part.dropped)))
    return "\n".join(lines)


def dropped_words(dropped: int) -> str:
    return f" ({dropped} records dropped: no response within max_length)" if dropped else ""


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def fit(run: Run) -> bool:
    """Train, log, evaluate, save. False when training had to stop."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from bilevel.data import BatchStream
    from bilevel.f2sa import TrainingStopped, penalty_step
    from bilevel.rounding import RoundingGuard

    s, world, x = run.settings, run.world, run.x
    open_folder(run)
    log.info(describe(run))
    metrics = open_metrics(run)
    train_stream = BatchStream(len(run.train), s.global_batch_size, s.seed)
    val_stream = BatchStream(len(run.val), s.val_batch_size, s.seed + 1)
    eval_every = s.eval_every or max(1, run.steps // 10)
    guard = RoundingGuard(s, run.copies)
    screen = world.main and sys.stderr.isatty()

    row: dict[str, Any] = {}
    with logging_redirect_tqdm([log]), tqdm(total=run.steps, unit="step", disable=not screen) as bar:
        for step in range(run.steps + 1):
            evaluating = step % eval_every == 0 or step == run.steps
            if evaluating or step % s.log_every == 0:
                row = completed(run, step, row, evaluating)
                metrics.write(row, x.coefficients(run.train.all_ids) if evaluating and run.per_sample else None)
                show(bar, row, run.steps, evaluating)
            if step == run.steps:
                break

            if run.lisa:
                run.lisa.switch(step, run.copies)
            lr_y = s.lr_y * schedule(step, run.steps, s.warmup_ratio, "cosine")
            lr_x = s.lr_x * schedule(step, run.steps, s.warmup_ratio, s.x_lr_schedule)
            train = run.train.batch(next(train_stream), s.micro_batch_tokens, world)
            validation = run.val.batch(next(val_stream), s.micro_batch_tokens, world)
            try:
                result = penalty_step(**run.copies, x=x, train=train, validation=validation, nu=s.nu, lr_y=lr_y,
                                      seed=dropout_seed(s.seed, step))  # fmt: skip
                row = result.row() | {"lr_y": lr_y, "lr_x": lr_x} | guard.check(step + 1, train, result.gaps)
            except TrainingStopped as error:
                log.error(f"step {step + 1}: {error}")
                tell_launcher(error)
                metrics.close()
                return False
            if run.lisa and step == 0:
                run.lisa.verify(lr_y)
            if step < s.x_warmup_steps:
                x.clear()
            elif (step + 1) % s.upper_every == 0:
                x.step(lr_x)
            metrics.count(result.tokens)
            bar.update()
    metrics.close()
    finish(run, row)
    return True


def completed(run: Run, step: int, row: dict[str, Any], evaluating: bool) -> dict[str, Any]:
    """The row of metrics.csv of the last step, with the weights after it and with what an evaluation finds."""
    from bilevel.evaluate import evaluate

    s, x = run.settings, run.x
    row = {"step": step, "epoch": step * s.global_batch_size / len(run.train)} | row
    if not run.per_sample:
        row |= {f"weight/{name}": p for name, p in zip(run.train.sources, x.p.tolist(), strict=True)}
    if evaluating:
        row |= evaluate(run.copies, x, run.train, run.test, s.micro_batch_tokens)
    return row


def open_folder(run: Run) -> None:
    """The run's folder with its resolved settings, written first."""
    if run.world.main:
        run.settings.run_folder.mkdir(parents=True, exist_ok=True)
        (run.settings.run_folder / "config.yaml").write_text(dump(run.settings), encoding="utf-8")
    open_log(run)


def finish(run: Run, row: dict[str, Any]) -> None:
    """What a finished run leaves, and its closing words."""
    from bilevel.results import draw_weights, summary, write_weights

    s = run.settings
    if s.save_model != "none":
        run.copies[s.save_model].save(s.run_folder / "model", run.tokenizer)
    if run.world.main:
        write_weights(s.run_folder / "weights.csv", run.x, run.train)
        draw_weights(s.run_folder, run.x, run.train)
        log.info(summary(s.run_folder, run.x, run.train, row))


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


def show(bar: Any, row: dict[str, Any], steps: int, evaluating: bool) -> None:
    """Loss and the noisy (or lowest) source's weight on the bar; a plain line at evaluations without a terminal."""
    facts = {"loss": row.get("loss_w"), "test": row.get("test_loss_w"), "ROC": row.get("roc_auc")}
    shares = {name.removeprefix("weight/"): value for name, value in row.items() if name.startswith("weight/")}
    if len(shares) > 1:
        noisy = [name for name in shares if "noisy" in name]
        name = noisy[0] if len(noisy) == 1 else min(shares, key=shares.get)
        facts["w_noisy" if noisy == [name] else f"w({name})"] = shares[name]
    words = ", ".join(f"{name} {value:.4f}" for name, value in facts.items() if value is not None)
    bar.set_postfix_str(words)
    if bar.disable and evaluating:
        log.info(f"step {row['step']}/{steps}: {words}")


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
