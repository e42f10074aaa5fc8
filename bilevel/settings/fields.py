"""Every setting of a run: typed, with its unit and the meaning of null.

`python -m bilevel.settings` prints the settings' names, which are also the environment variables of run_F2SA.sh.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


def _setting(group: str, help: str, default: Any = ..., **rules) -> Any:
    return Field(default=default, description=help, json_schema_extra={"group": group}, **rules)


# The length is that of the longest path; with one, pydantic also refuses text that has no UTF-8.
_RULES = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, str_max_length=4096)


@dataclass(config=_RULES, kw_only=True)
class Settings:
    """One field per setting; YAML key = flag = environment variable of run_F2SA.sh."""

    train_data: list[str] = _setting("data", "training files or patterns; one file is one source", min_length=1)
    val_data: list[str] = _setting(
        "data", "trusted files or patterns, the upper level's data; method=fixed needs none", []
    )
    test_data: list[str] = _setting("data", "held-out files or patterns, only ever evaluated", [])
    val_in_training: bool = _setting(
        "data", "method=fixed trains on the validation records as well, each with weight 1", False
    )
    format: Literal["auto", "alpaca", "chat", "text"] = _setting(
        "data", "record format of all files; auto looks at each file's first record", "auto"
    )
    max_length: int = _setting("data", "longest sample, in tokens; what is longer is cut", 512, ge=2)
    loss_on: Literal["response", "all"] = _setting(
        "data", "tokens that enter the loss: responses (with EOS) or all", "response"
    )
    turns: Literal["all", "shared", "last"] = _setting(
        "data",
        "assistant turns to learn: all (one whose context the chat template rewrites later becomes a sample of its "
        "own), shared (those that share one text with the last), or the last of each record",
        "all",
    )
    template_kwargs: dict[str, Any] | None = _setting(
        "data", "variables of the chat template, such as {enable_thinking: false}; a record's own go first", None
    )
    special_tokens_in_text: bool = _setting(
        "data", "text records that spell special tokens of the tokenizer mean these tokens, not letters", False
    )

    model_name_or_path: str | None = _setting("model", "hub id or folder of any causal language model", None)
    model_config: dict[str, Any] | None = _setting(
        "model",
        "build the model from these numbers (model_type, vocab_size, ...) and train its tokenizer",
        None,
    )
    dropout: float | None = _setting(
        "model", "probability of every dropout in the model; null keeps the model's own", 0.0, ge=0, lt=1
    )
    dtype: Literal["fp32", "bf16"] | None = _setting(
        "model",
        "of the forward and backward passes, masters are fp32; null: bf16 on a GPU that has it, else fp32",
        None,
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = _setting(
        "model", "attention kernel; null lets transformers choose", None
    )
    rounding_guard: Literal["stop", "warn", "off"] = _setting(
        "model", "where bf16 rounding hides the gaps that move x: end the run, only warn, or do not look", "stop"
    )
    gradient_checkpointing: bool = _setting("model", "recompute activations in the backward pass: less memory", False)

    method: Literal["f2sa", "fixed", "uniform", "loss", "perplexity", "rho", "influence", "ifd", "align", "oracle"] = (
        _setting(
            "weights",
            "f2sa learns the weights; fixed trains one model on those of x_init, which stay; the others are baselines",
            "f2sa",
        )
    )
    keep: float = _setting("weights", "share of the samples with the best scores that baselines keep", 0.5, gt=0, le=1)
    score_epochs: float = _setting(
        "weights", "passes over the training samples of each model that a baseline trains to score them", 1.0, gt=0
    )
    weights: Literal["source", "sample"] = _setting("weights", "what gets a weight: each file or each record", "source")
    x_map: Literal["sigmoid", "softmax"] = _setting(
        "weights", "map from x to per-sample weights (per source it is always softmax)", "sigmoid"
    )
    sigmoid_start: float = _setting(
        "weights", "sigmoids of the records at the start; near 1 sound ones keep equal weights", 0.5, gt=0, lt=1
    )
    x_init: str = _setting(
        "weights",
        "start: uniform (sources equal), size (records equal; same as uniform per sample), or a weights.csv or its run",
        "uniform",
    )
    sampling: Literal["uniform", "weighted"] = _setting(
        "weights",
        "weighted: of a drawn batch, compute samples of small weight with a probability in proportion to it",
        "uniform",
    )
    sampling_floor: float = _setting("weights", "least probability of a sample to be computed", 0.1, gt=0, le=1)
    x_warmup_steps: int = _setting("weights", "steps before x starts to learn", 0, ge=0)
    x_optimizer: Literal["adam", "sgd", "mirror"] = _setting(
        "weights",
        "optimizer of x, without decay; adam is that of the papers, mirror descent keeps equals equal",
        "adam",
    )
    lr_x: float = _setting("weights", "peak step size of x; each x_optimizer needs another", 1e-1, ge=0)
    x_lr_schedule: Literal["cosine", "constant"] = _setting(
        "weights", "schedule of lr_x after its warm-up (lr_y's is cosine)", "cosine"
    )

    alpha: float = _setting("step", "penalty; nu = 1/alpha multiplies the validation loss in w's objective", 10.0, gt=0)
    order: int = _setting(
        "step", "power of nu in the x-gradient's error; with 2, u ascends the validation loss", 1, ge=1, le=2
    )
    lr_y: float = _setting("step", "peak step size of both model copies", 1e-5, ge=0)
    upper_every: int = _setting("step", "model steps per step of x", 5, ge=1)
    global_batch_size: int = _setting("step", "training samples per step", 64, ge=1)
    val_batch_size: int = _setting("step", "validation samples per step", 64, ge=1)
    micro_batch_tokens: int = _setting("step", "padded tokens per forward pass; memory only", 4096, ge=1)
    clip_grad_norm: float | None = _setting("step", "gradient norm limit of each model copy; null is off", None, gt=0)
    weight_decay: float = _setting("step", "AdamW decay of the model copies", 0.0, ge=0)
    warmup_ratio: float = _setting("step", "share of the steps in which lr_y and lr_x rise from 0", 0.03, ge=0, le=1)
    epochs: float = _setting("step", "passes over the training samples", 1.0, gt=0)
    max_steps: int | None = _setting("step", "number of steps; null lets epochs decide", None, ge=1)
    seed: int = _setting(
        "step", "seed of the batches, the dropout masks and a model built from model_config", 0, ge=0, lt=2**63
    )

    lisa_layers: int | None = _setting(
        "LISA", "decoder blocks that train at a time, drawn at random; null trains all always", None, ge=1
    )
    lisa_interval: int = _setting("LISA", "steps between draws", 20, ge=1)
    lisa_train_embeddings: bool = _setting("LISA", "train embedding, head and final norm all the time, or never", True)
    lisa_shared_draw: bool = _setting("LISA", "u and w draw the same blocks", True)
    lisa_residual: Literal["device", "host", "off"] = _setting(
        "LISA", "where 16 bits per resting weight are kept under DeepSpeed bf16; off loses small updates", "device"
    )

    lora_rank: int | None = _setting(
        "LoRA",
        "rank of adapters beside all linear layers but the head, which then train alone; null is off",
        None,
        ge=1,
    )
    lora_alpha: float = _setting("LoRA", "what the adapters add is multiplied by lora_alpha / lora_rank", 16.0, gt=0)

    backend: Literal["torch", "deepspeed"] = _setting(
        "machine", "plain torch in one process, or DeepSpeed in as many as are launched", "torch"
    )
    zero_stage: int | None = _setting(
        "machine", "shorthand for deepspeed: configs/zero<k>.json; null is 2 under DeepSpeed", None, ge=0, le=3
    )
    deepspeed: str | None = _setting("machine", "DeepSpeed configuration file", None)
    gpu_memory_gib: float | None = _setting(
        "machine", "memory of a GPU, for the memory plan; null: as found", None, gt=0
    )

    run_name: str | None = _setting("run", "null: the config's name and what the command line changed", None)
    output_dir: str | None = _setting("run", "the run's folder; null: outputs/<run_name>", None)
    eval_every: int | None = _setting("run", "steps between test evaluations; null: a tenth of the run", None, ge=1)
    log_every: int = _setting("run", "steps between rows of metrics.csv", 1, ge=1)
    save_every: int | None = _setting(
        "run", "steps between checkpoints; null: a tenth of the run; 0: only when a signal ends it", None, ge=0
    )
    skip_nonfinite: int = _setting(
        "run", "steps that may be left out since a loss or gradient is not finite, before that ends the run", 0, ge=0
    )
    keep_checkpoints: int = _setting("run", "newest checkpoints that are kept", 2, ge=1)
    resume: str = _setting(
        "run", "auto: go on with the unfinished run in the folder; never; or a checkpoint's path", "auto"
    )
    save_model: Literal["w", "u", "none"] = _setting("run", "which copy is saved to model/", "w")
    tracker: Literal["wandb", "none"] = _setting("run", "where metrics go besides metrics.csv", "wandb")

    @property
    def nu(self) -> float:
        return 1 / self.alpha

    @property
    def x_factor(self) -> float:
        """What x multiplies d/dx g(x, w) - d/dx g(x, u) by: 1/nu, or 1/(2 nu) where u and w differ by 2 nu f."""
        return self.alpha / (self.order if self.method == "f2sa" else 1)

    @property
    def copies(self) -> tuple[str, ...]:
        """Names of the model copies that train; a baseline that scores has none, it makes models as it needs them."""
        return {"f2sa": ("u", "w"), "fixed": ("w",), "align": ("w",)}.get(self.method, ())

    @property
    def learned(self) -> bool:
        """Whether the weights are learned while the copies train."""
        return self.method in ("f2sa", "align")

    @property
    def reads_validation(self) -> bool:
        return self.method != "fixed" or self.val_in_training

    @property
    def x_init_file(self) -> Path | None:
        """The weights.csv to start from; None where x_init is a word."""
        if self.x_init in ("uniform", "size"):
            return None
        return Path(self.x_init, "weights.csv") if os.path.isdir(self.x_init) else Path(self.x_init)

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir or f"outputs/{self.run_name}")


FIELDS = Settings.__pydantic_fields__


def meaning(name: str) -> str:
    """What a setting is, with the words that it takes where it takes no others."""
    field = FIELDS[name]
    members = [field.annotation, *get_args(field.annotation)]
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    return field.description + (f" ({', '.join(words[:-1])} or {words[-1]})" if words else "")


# What a resumed run may change, as it does not enter the results.
FREE = {"resume", "save_every", "keep_checkpoints", "skip_nonfinite", "rounding_guard", "output_dir", "run_name"}
FREE |= {"tracker", "gpu_memory_gib"}
LISTS = {f.name for f in dataclasses.fields(Settings) if str(f.type).startswith("list")}


def differing(then: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that a resumed run may not change and that differ, with both values; empty without one."""
    return ", ".join(
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if name not in FREE and then.get(name) != now.get(name)
    )


class _Dumper(yaml.SafeDumper):
    """Writes a value out wherever it stands: read_yaml takes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(settings: Settings) -> str:
    """The resolved settings as YAML, enough to run again."""
    return yaml.dump(dataclasses.asdict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
