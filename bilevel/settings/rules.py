"""Checks of the settings: unknown names, types, ranges and contradictions, all problems reported at once."""

import difflib
import os
import re
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bilevel.errors import first, plain, short
from bilevel.settings.data_fields import TAGS
from bilevel.settings.fields import FIELDS, Settings
from bilevel.settings.methods import METHODS
from bilevel.settings.other_names import unknown_setting

# Settings that only adapters have.
ADAPTERS = ("lora_targets", "lora_dropout", "lora_rank_stabilised", "lora_merge", "base_dtype")

Rule = tuple[set[str], bool, str]  # (settings involved, whether they break the rule, message if they do)


def validate(values: dict[str, Any]) -> tuple[Settings | None, list[str]]:
    """The settings in a mapping, or None if they are invalid, and a list of all problems."""
    adapter = TypeAdapter(Settings)
    problems = first([key for key in values if key not in FIELDS], 10, unknown_setting)
    known = {key: value for key, value in values.items() if key in FIELDS}
    try:
        settings = adapter.validate_python(known)
        found = problems + _contradictions(settings, set())
        return (None if problems else settings), found
    except ValidationError as error:
        items = error.errors()
        bad = {str(item["loc"][0]) for item in items}
        problems += first(items, 10, _problem)
    # Check the valid settings for contradictions as well, so that one error lists every problem.
    rest = {key: value for key, value in known.items() if key not in bad}
    rest.setdefault("train_data", ["?"])
    return None, problems + _contradictions(adapter.validate_python(rest), bad)


def _contradictions(s: Settings, bad: set[str]) -> list[str]:
    """Contradictions between settings. Rules about `bad` settings, which are reported already, are left out."""
    rules = [*_of_model_and_data(s), *_of_method(s), *_of_machine(s), *_of_what_trains(s)]
    return [message for fields, broken, message in rules if broken and not fields & bad]


def _of_model_and_data(s: Settings) -> list[Rule]:
    """Rules about model and data."""
    return [
        (
            {"model_name_or_path", "model_config"},
            (s.model_name_or_path is None) == (s.model_config is None),
            "give exactly one of model_name_or_path (a hub id or a folder) and model_config (a new model)",
        ),
        (
            {"model_config"},
            s.model_config is not None and not {"model_type", "vocab_size"} <= set(s.model_config),
            "model_config needs at least model_type (such as gpt2 or llama) and vocab_size",
        ),
        (
            {"val_data", "method", "val_in_training"},
            s.reads_validation and not s.val_data,
            f"val_data: missing ({FIELDS['val_data'].description})",
        ),
        (
            {"val_in_training", "method"},
            s.val_in_training and not METHODS[s.method].weights_stay,
            f"val_in_training=true needs method=fixed, but method is {s.method}",
        ),
    ]


def _of_method(s: Settings) -> list[Rule]:
    """Rules about what a method needs."""
    return [
        (
            {"save_model", "method"},
            s.save_model == "u" and "u" not in s.copies,
            f"save_model=u: there is no copy u; method={s.method} trains {'only w' if s.copies else 'no copy'}",
        ),
        (
            {"warmup_ratio", "x_warmup_steps", "max_steps", "method"},
            s.learned and s.max_steps is not None and s.x_warmup_steps >= s.max_steps,
            f"x_warmup_steps {s.x_warmup_steps}: x never moves in max_steps {s.max_steps}; use fewer warm-up steps",
        ),
        (
            {"alpha_start", "alpha"},
            s.alpha_start is not None and s.alpha_start > s.alpha,
            f"alpha_start {s.alpha_start}: alpha grows, and ends at {s.alpha}; give at most that, or a larger alpha",
        ),
        (
            {"x_optimizer", "weights", "method"},
            s.learned and s.weights == "sample" and s.x_optimizer == "auto" and "u" not in s.copies,
            f"x_optimizer=auto per record compares losses of w and u, and method={s.method} has no u; take adam, sgd "
            "or mirror",
        ),
        (
            {"method", "backend"},
            METHODS[s.method].one_process and (s.backend != "torch" or _launched() > 1),
            f"method={s.method} needs backend=torch in one process, because it uses gradients of whole batches",
        ),
        (
            {"method", "lisa_layers", "gradient_checkpointing"},
            METHODS[s.method].whole_gradients and (s.lisa_layers is not None or s.gradient_checkpointing),
            f"method={s.method} reads gradients of the last block: remove lisa_layers and gradient_checkpointing",
        ),
    ]


def _of_machine(s: Settings) -> list[Rule]:
    """Rules about the backend."""
    return [
        (
            {"zero_stage", "deepspeed"},
            s.zero_stage is not None and s.deepspeed is not None,
            "give either zero_stage or deepspeed (a file), not both",
        ),
        (
            {"backend", "zero_stage", "deepspeed"},
            s.backend == "torch" and (s.zero_stage is not None or s.deepspeed is not None),
            "zero_stage and deepspeed need backend=deepspeed",
        ),
        (
            {"backend", "lora_rank"},
            s.backend == "torch" and s.lora_rank is None and _launched() > 1,
            "several processes were launched; training in several processes needs backend=deepspeed or lora_rank",
        ),
    ]


def _launched() -> int:
    """The number of processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _of_what_trains(s: Settings) -> list[Rule]:
    """Rules about LISA and LoRA, which train a part of the model."""
    alone = [name for name in ADAPTERS if getattr(s, name) != FIELDS[name].default]
    return [
        (
            {"lisa_layers", "lisa_train_embeddings"},
            s.lisa_layers is None and not s.lisa_train_embeddings,
            "lisa_train_embeddings=false needs lisa_layers; without LISA all parameters are trained",
        ),
        (
            {"lora_rank", "lisa_layers"},
            s.lora_rank is not None and s.lisa_layers is not None,
            "lora_rank and lisa_layers: adapters freeze the blocks that LISA would train; give one of the two",
        ),
        (
            {"lora_rank", "backend"},
            s.lora_rank is not None and s.backend != "torch",
            "lora_rank needs backend=torch, also in several processes: each holds the frozen model and both adapters",
        ),
        (
            {"lora_rank", "method"},
            s.lora_rank is not None and METHODS[s.method].whole_gradients,
            f"method={s.method} reads gradients of the last block, which adapters freeze: remove lora_rank",
        ),
        (
            {"lora_rank", *ADAPTERS},
            s.lora_rank is None and bool(alone),
            f"{' and '.join(alone)} without adapters: give lora_rank, such as 16, too",
        ),
        (
            {"lora_merge", "model_name_or_path"},
            s.lora_merge is False and s.model_name_or_path is None,
            "lora_merge=false needs model_name_or_path: an adapter folder names the model that it belongs to",
        ),
        (
            {"base_dtype", "model_name_or_path"},
            s.base_dtype == "nf4" and s.model_name_or_path is None,
            "base_dtype=nf4 needs model_name_or_path: a new model with random weights is not frozen and quantised",
        ),
        (
            {"base_dtype", "dtype"},
            s.base_dtype == "bf16" and s.dtype == "fp32",
            "base_dtype=bf16 with dtype=fp32: products of a bf16 model are bf16; leave one of the two out",
        ),
    ]


def _problem(item: dict[str, Any]) -> str:
    key = str(item["loc"][0])
    if item["type"] in ("missing", "missing_argument"):
        return f"{key}: missing ({FIELDS[key].description})"
    where = ".".join(plain(str(part)) for part in item["loc"] if part not in (*TAGS, "[key]"))
    near = ""
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        words = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        near = "".join(f"; did you mean {word}?" for word in difflib.get_close_matches(item["input"][:40], words, 1))
    return f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}, got {short(item['input'])}{near}"
