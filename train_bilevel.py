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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.config import ConfigError, Settings, UserError, dump, load_settings

if TYPE_CHECKING:  # imported where they are used, so that --help and mistakes are answered at once
    import torch
    import transformers

    from bilevel.backend import ModelCopy
    from bilevel.data import Samples
    from bilevel.metrics import MetricsLog
    from bilevel.weights import SampleWeights, SourceWeights

log = logging.getLogger("bilevel")


# ----------------------------------------------------------------------------------------------------------------------
# main


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 the user's mistake, 1 training failed."""
    try:
        settings, dry_run = load_settings(argv)
        quiet_libraries()
        files = check(settings)
        if dry_run:
            print(dump(settings), end="")
            return 0
        run = setup(settings, files)
    except UserError as error:
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
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def check(settings: Settings) -> dict[str, list[Path]]:
    """The files of train, val and test. Raises ConfigError with all that is wrong between settings and files."""
    from bilevel.records import DataError, find_files, read_rows

    problems: list[str] = []
    files: dict[str, list[Path]] = {}
    records: dict[str, int] = {}
    for part in ("train", "val", "test"):
        try:
            files[part] = find_files(getattr(settings, f"{part}_data"))
            rows = [read_rows(file, settings.format) for file in files[part]]
        except DataError as error:
            problems.append(f"{part}_data: {error}")
            continue
        if all(table[0]["roles"] != ["text"] for table in rows):  # a text record makes any number of samples
            records[part] = sum(len(table) for table in rows)
    if settings.weights == "source" and len(files.get("train", [])) == 1:
        problems.append(
            f"weights=source needs two training files or more to weigh against each other, found {files['train'][0]}; "
            "give more files or use weights=sample"
        )
    problems += too_large(settings, records)
    if settings.x_init not in ("uniform", "size") and not Path(settings.x_init).is_file():
        problems.append(f"x_init: {settings.x_init!r} is neither uniform, size nor a file")
    if settings.run_folder.exists() and any(settings.run_folder.iterdir()):
        problems.append(
            f"{settings.run_folder} already holds a run, which is never overwritten: "
            "give another run_name or output_dir, or move that folder away"
        )
    if problems:
        raise ConfigError(problems)
    return files


def too_large(settings: Settings, sizes: dict[str, int]) -> list[str]:
    """A problem for each batch larger than the data it is drawn from."""
    return [
        f"{name} {getattr(settings, name)} is larger than the data, {sizes[part]} usable records; make it smaller"
        for part, name in (("train", "global_batch_size"), ("val", "val_batch_size"))
        if getattr(settings, name) > sizes.get(part, math.inf)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# setup


@dataclasses.dataclass
class Run:
    """All that training needs, loaded and checked."""

    settings: Settings
    tokenizer: "transformers.PreTrainedTokenizerBase"
    train: "Samples"
    val: "Samples"
    test: "Samples | None"
    u: "ModelCopy"
    w: "ModelCopy"
    x: "SourceWeights | SampleWeights"
    steps: int


def setup(settings: Settings, files: dict[str, list[Path]]) -> Run:
    """Load data and model. Raises UserError; nothing has been written when it does."""
    from bilevel.backend import device, two_copies
    from bilevel.data import load_samples, steps_per_run
    from bilevel.model import load_model, load_tokenizer, model_shape
    from bilevel.results import read_start
    from bilevel.tokenise import Tokeniser
    from bilevel.weights import SampleWeights, SourceWeights

    shape = model_shape(settings)
    tokenizer = load_tokenizer(settings, files["train"])
    tokeniser = Tokeniser(tokenizer, settings.max_length, settings.loss_on)
    train, val = (load_samples(files[part], settings.format, tokeniser) for part in ("train", "val"))
    test = load_samples(files["test"], settings.format, tokeniser) if files["test"] else None
    if problems := too_large(settings, {"train": len(train), "val": len(val)}):
        raise ConfigError(problems)

    per_sample = settings.weights == "sample"
    start = read_start(settings.x_init, per_sample, train)
    if per_sample:
        x = SampleWeights(len(train), start, settings.x_map, settings.alpha, settings.x_optimizer)
    else:
        x = SourceWeights(train.source_ids, start, settings.alpha, settings.x_optimizer)

    model = load_model(settings, shape, tokenizer).to(device())
    u, w = two_copies(model, settings.weight_decay, settings.clip_grad_norm)
    steps = steps_per_run(len(train), settings.global_batch_size, settings.epochs, settings.max_steps)
    return Run(settings, tokenizer, train, val, test, u, w, x, steps)


def open_log(folder: Path) -> None:
    """What is said goes to the screen and to run.log."""
    log.setLevel(logging.INFO)
    log.handlers = [
        logging.StreamHandler(sys.stdout),
        logging.FileHandler(folder / "run.log", encoding="utf-8"),
    ]


def open_metrics(run: Run) -> "MetricsLog":
    """metrics.csv, timing.csv and the tracker of a run."""
    from bilevel.metrics import Columns, MetricsLog, NoTracker, WandbTracker

    s = run.settings
    columns = Columns(run.train.sources, s.weights == "sample", run.test is not None, run.train.is_noisy is not None)
    tracker = NoTracker()
    if s.tracker == "wandb":
        tracker = WandbTracker(s.run_folder, s.run_folder.name, dataclasses.asdict(s))
        log.info(tracker.notice)
    return MetricsLog(s.run_folder, columns, tracker)


def describe(run: Run) -> str:
    """What is about to happen, in a few lines."""
    s = run.settings
    parameters = sum(p.numel() for p in run.w.model.parameters())
    lines = [
        f"{parameters / 1e6:.1f}M parameters, two copies on {run.w.device}; {run.steps} steps of "
        f"{s.global_batch_size} training and {s.val_batch_size} validation samples",
        f"lr_y {s.lr_y:g}, lr_x {s.lr_x:g} every {s.upper_every} steps, alpha {s.alpha:g}",
    ]
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
    from bilevel.f2sa import NonFiniteLoss, penalty_step
    from bilevel.results import draw_weights, summary, write_weights

    s = run.settings
    s.run_folder.mkdir(parents=True, exist_ok=True)
    (s.run_folder / "config.yaml").write_text(dump(s), encoding="utf-8")
    open_log(s.run_folder)
    log.info(describe(run))
    metrics = open_metrics(run)
    train_stream = BatchStream(len(run.train), s.global_batch_size, s.seed)
    val_stream = BatchStream(len(run.val), s.val_batch_size, s.seed + 1)
    eval_every = s.eval_every or max(1, run.steps // 10)

    row: dict[str, Any] = {}
    with (
        logging_redirect_tqdm([log]),
        tqdm(total=run.steps, unit="step", disable=not sys.stderr.isatty()) as bar,
    ):
        for step in range(run.steps + 1):
            evaluating = step % eval_every == 0 or step == run.steps
            if evaluating or step % s.log_every == 0:
                row = {"step": step, "epoch": step * s.global_batch_size / len(run.train)} | row | weight_row(run)
                row |= evaluate(run) if evaluating else {}
                metrics.write(row, sample_weights(run) if evaluating else None)
                show(bar, row, run.steps, evaluating)
            if step == run.steps:
                break

            lr_y = s.lr_y * schedule(step, run.steps, s.warmup_ratio, "cosine")
            lr_x = s.lr_x * schedule(step, run.steps, s.warmup_ratio, s.x_lr_schedule)
            train = run.train.micro_batches(next(train_stream), s.micro_batch_tokens)
            validation = run.val.micro_batches(next(val_stream), s.micro_batch_tokens)
            try:
                result = penalty_step(run.u, run.w, run.x, train, validation, s.nu, lr_y, dropout_seed(s.seed, step))
            except NonFiniteLoss as error:
                log.error(f"step {step + 1}: {error}")
                metrics.close()
                return False
            if step < s.x_warmup_steps:
                run.x.clear()
            elif (step + 1) % s.upper_every == 0:
                run.x.step(lr_x)
            metrics.count(result.tokens)
            row = result.row() | {"lr_y": lr_y, "lr_x": lr_x}
            bar.update()

    metrics.close()
    write_weights(s.run_folder / "weights.csv", run.x, run.train)
    draw_weights(s.run_folder, run.x, run.train)
    if s.save_model != "none":
        getattr(run, s.save_model).save(s.run_folder / "model", run.tokenizer)
    log.info(summary(s.run_folder, run.x, run.train, row))
    return True


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


def weight_row(run: Run) -> dict[str, float]:
    """The sources' shares; for per-sample runs they cost O(N) and are part of the evaluation."""
    if run.settings.weights == "sample":
        return {}
    return {f"weight/{name}": p for name, p in zip(run.train.sources, run.x.p.tolist(), strict=True)}


def evaluate(run: Run) -> dict[str, float]:
    """Held-out losses of both copies, and what the weights say about the records."""
    from bilevel.evaluate import heldout_loss, noise_detection
    from bilevel.metrics import QUANTILES
    from bilevel.results import source_shares

    run.x.refresh()
    row: dict[str, float] = {}
    if run.test is not None:
        for name, copy in (("w", run.w), ("u", run.u)):
            row[f"test_loss_{name}"] = heldout_loss(copy.model, run.test, run.settings.micro_batch_tokens)
    c = run.x.coefficients(run.train.all_ids)
    if run.settings.weights == "sample":
        shares = source_shares(run.x, run.train).tolist()
        row |= {f"weight/{name}": share for name, share in zip(run.train.sources, shares, strict=True)}
        row |= {f"weight_q/{q}": c.quantile(q).item() for q in QUANTILES}
    if run.train.is_noisy is not None:
        row |= noise_detection(c, run.train.is_noisy)
    return row


def sample_weights(run: Run) -> "torch.Tensor | None":
    """c of every sample for the tracker's histogram, in per-sample runs."""
    return run.x.coefficients(run.train.all_ids) if run.settings.weights == "sample" else None


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
