"""Check settings against files before anything is loaded."""

import dataclasses
import math
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.errors import ConfigError, UserError, plain, short
from bilevel.files import is_unfinished
from bilevel.run import lock
from bilevel.run.lock import at_work
from bilevel.settings.command_line import read_yaml
from bilevel.settings.deepspeed import zero_config
from bilevel.settings.fields import Settings
from bilevel.settings.methods import METHODS
from bilevel.settings.rules import validate
from bilevel.settings.written import differing

if TYPE_CHECKING:  # imported where they are used: mistakes are told at once
    import transformers

    from bilevel.data.sources import Source

# Files and folders that a run writes into its folder.
FILES = ("config.yaml", "data.json", "metrics.csv", "timing.csv", "run.log")
FILES += ("machine.json", "overlap.json", "weights.csv", "weights.png", "report.html")
FOLDERS = ("checkpoints", "model", "wandb")


def check_files(settings: Settings) -> dict[str, list["Source"]]:
    """The sources of train, val and test. Raises ConfigError with every problem of settings and files."""
    files, records, problems = read_files(settings)
    if settings.weights == "source" and not METHODS[settings.method].weights_stay and len(files.get("train", [])) == 1:
        problems.append(
            f"weights=source needs two training files or more to weigh against each other, found {files['train'][0]}; "
            "give more files or use weights=sample"
        )
    problems += too_large(settings, records) + _too_short(settings, records)
    if settings.backend == "deepspeed":
        try:
            zero_config(settings, settings.dtype or "fp32")
        except UserError as error:
            problems.append(str(error))
    problems += _wrong_start(settings, files.get("train", []))
    if os.environ.get("RANK", "0") == "0":  # the other ranks may get here after rank 0 has begun to write
        problems += folder_taken(settings)
    if problems:
        raise ConfigError(problems)
    return files


def read_files(settings: Settings) -> tuple[dict[str, list["Source"]], dict[str, float], list[str]]:
    """The sources of train, val and test, the most samples of each part, and every problem of the files."""
    from bilevel.data.overlap import shared_files
    from bilevel.data.sources import Reading, find_sources
    from bilevel.errors import DataError

    problems: list[str] = []
    files: dict[str, list[Source]] = {}
    records: dict[str, float] = {}
    for part in ("train", "val", "test"):
        try:
            unread = part == "val" and not settings.reads_validation
            files[part] = [] if unread else find_sources(getattr(settings, f"{part}_data"), Reading.of(settings))
        except DataError as error:
            problems.append(f"{part}_data: {error}")
            continue
        records[part], unreadable = _read(files[part])
        problems += [f"{part}_data: {problem}" for problem in unreadable]
    return files, records, problems + shared_files(files)


def _read(sources: list["Source"]) -> tuple[float, list[str]]:
    """The most samples that the sources can become, and the problems of all their records."""
    from bilevel.data.bad_records import BadRecords
    from bilevel.data.records import most_samples
    from bilevel.errors import DataError

    samples, problems = 0.0, []
    for source in sources:
        try:
            samples += most_samples(source)
        except BadRecords as error:
            problems += str(error).splitlines()
        except DataError as error:
            problems.append(str(error))
    return (math.inf if problems else samples), problems


def _wrong_start(settings: Settings, train: list["Source"]) -> list[str]:
    """A problem if x_init is neither a weights.csv nor a finished run on the same training files."""
    name = f"x_init: {short(settings.x_init, 300)}"
    if settings.x_init_file is None:
        return []
    if not os.path.isdir(settings.x_init) and not os.path.isfile(settings.x_init):
        return [f"{name} is neither uniform, size, a file nor a run's folder"]
    if not os.path.isfile(settings.x_init_file):
        return [f"{name} is a folder without weights.csv, which a run leaves when it is finished"]
    from bilevel.run.finished import read_data
    from bilevel.weights.csv_file import check_kind

    try:
        check_kind(settings.x_init_file, settings.weights == "sample", str(settings.x_init_file))
        if not os.path.isdir(settings.x_init):
            return []
        then = {file.file: file.sha256 for file in read_data(Path(settings.x_init)).train}
    except UserError as error:
        return [f"x_init: {error}"]
    now = {source.name: source.content for source in train}
    if changed := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
        return [f"{name} was made on other training files: {', '.join(map(short, changed))} differ"]
    return []


def folder_taken(settings: Settings) -> list[str]:
    """A problem if the run's folder is in use, cannot be written, or holds anything but this run, unfinished."""
    folder = settings.run_folder
    remedy = "give another run_name or output_dir, or move that folder away"
    try:
        names = set(os.listdir(folder))
        if working := at_work(folder):
            return [working]
    except FileNotFoundError:
        return _unwritable(folder)
    except UserError as error:
        return [str(error)]
    except (OSError, ValueError) as error:  # a file of that name, one too long or with a NUL, no permission
        return [f"output_dir {plain(str(folder), 300)}: {getattr(error, 'strerror', error)}; {remedy}"]
    if all(name == lock.NAME or is_unfinished(name) for name in names):  # a start that failed early
        return _unwritable(folder)
    if "config.yaml" not in names or ("weights.csv" in names and lock.NAME not in names):
        return [f"{folder} already holds a run, which is never overwritten: {remedy}"]
    if settings.resume == "never":
        return [f"{folder} already holds an unfinished run and resume is never: {remedy}"]
    then, problems = validate(read_yaml(str(folder / "config.yaml")))
    if then is None:
        return [f"{folder} already holds an unfinished run of another version ({problems[0]}): {remedy}"]
    if found := differing(dataclasses.asdict(then), dataclasses.asdict(settings)):
        return [f"{folder} already holds an unfinished run of other settings, {found}: change them back, or {remedy}"]
    if foreign := _foreign(folder, names):
        return [f"{', '.join(foreign)} in {folder}: a link, a device or a folder that no run has written; {remedy}"]
    return _unwritable(folder)


def _foreign(folder: Path, names: set[str]) -> list[str]:
    """Names of a run's files that are no regular files, and of its folders that are no folders (links may be)."""
    files = [name for name in FILES if name in names and not stat.S_ISREG(os.lstat(folder / name).st_mode)]
    return files + [name for name in FOLDERS if name in names and not os.path.isdir(folder / name)]


def _unwritable(folder: Path) -> list[str]:
    """A problem if the folder, or the nearest one above it that exists, cannot be written."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return []
    why = "cannot be written" if there.is_dir() else "is not a folder"
    return [f"output_dir {plain(str(folder), 300)}: {plain(str(there), 300)} {why}; give another output_dir"]


def too_large(settings: Settings, sizes: dict[str, float]) -> list[str]:
    """A problem for each batch larger than the data it is drawn from."""
    return [
        f"{name} {getattr(settings, name)} is larger than the data, {sizes[part]:.0f} usable records; make it smaller"
        for part, name in (("train", "global_batch_size"), ("val", "val_batch_size"))
        if (part == "train" or settings.learned) and getattr(settings, name) > sizes.get(part, math.inf)
    ]


def _too_short(settings: Settings, records: dict[str, float]) -> list[str]:
    """A problem if x makes no step even when each record becomes as many samples as it can."""
    s = settings
    steps = s.max_steps or s.epochs * records.get("train", math.inf) / s.global_batch_size
    if steps > s.x_warmup_steps + s.x_every:  # which holds if the number of samples is not known
        return []
    try:
        check_steps(s, max(1, math.ceil(steps)))
    except UserError as error:
        return [str(error)]
    return []


def check_steps(settings: Settings, steps: int) -> None:
    """Raises UserError if weights are to be learned but x makes no step in the run's steps."""
    s = settings
    if s.learned and steps // s.x_every <= s.x_warmup_steps // s.x_every:
        rate = f" and upper_every {s.upper_every}" if s.x_has_rate else ""
        raise UserError(
            f"x_warmup_steps {s.x_warmup_steps}{rate} leave x no step to learn in the run's {steps} steps: make them "
            "smaller, or the run longer (epochs, max_steps, a smaller global_batch_size)"
        )


def check_shape(settings: Settings, shape: "transformers.PretrainedConfig") -> None:
    """Raises UserError if a model of this shape cannot be trained with these settings; needs no weights."""
    layers, blocks = settings.lisa_layers, getattr(shape.get_text_config(), "num_hidden_layers", None)
    if layers is not None and blocks is not None and layers > blocks:
        raise UserError(f"lisa_layers {layers}: the model has {blocks} decoder blocks; use at most that many")
    from bilevel.model.frozen_base import check_quantised

    check_quantised(settings, shape)
    if settings.packing:
        import torch

        from bilevel.model.copies import chosen_dtype
        from bilevel.model.packing import why_padded

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        why_padded(settings, shape, device, chosen_dtype(settings, device))
