"""Every setting of a run, with its type, its unit, its default, and what null means.

`python -m bilevel.settings` prints the settings' names, which are also the environment variables of run_F2SA.sh.
"""

import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.dataclasses import dataclass

from bilevel.settings.data_fields import RULES, DataSettings, setting
from bilevel.settings.methods import METHODS
from bilevel.settings.optimizers import OPTIMIZERS


@dataclass(config=RULES, kw_only=True)
class Settings(DataSettings):
    """One field per setting. Its name is the YAML key, the flag, and the environment variable of run_F2SA.sh."""

    model_name_or_path: str | None = setting(
        "model", "Hugging Face hub id or local folder of a causal language model", None
    )
    model_config: dict[str, Any] | None = setting(
        "model",
        "build a new model with this configuration (model_type, vocab_size, ...) and train a tokenizer for it",
        None,
    )
    dropout: float | None = setting(
        "model", "dropout probability everywhere in the model; null keeps the model's own values", 0.0, ge=0, lt=1
    )
    dtype: Literal["fp32", "bf16"] | None = setting(
        "model",
        "dtype of forward and backward passes (master weights are fp32); null: bf16 on a GPU that has it, else fp32",
        None,
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = setting(
        "model", "attention implementation; null lets transformers choose", None
    )
    packing: bool | None = setting(
        "model",
        "rows of a pass stand one after another in one sequence, without padding; null: on a GPU in bf16, where the "
        "model allows it; true: required",
        None,
    )
    rounding_guard: Literal["stop", "warn", "off"] = setting(
        "model",
        "if bf16 rounding error hides the loss gaps that move x: stop the run, only warn, or do not check",
        "stop",
    )
    gradient_checkpointing: bool = setting("model", "recompute activations in the backward pass, to save memory", False)

    method: Literal[*METHODS] = setting(
        "weights",
        "f2sa learns the weights; fixed trains one model with the constant weights of x_init; others are baselines",
        "f2sa",
    )
    keep: float = setting(
        "weights",
        "fraction of the samples, the best, that a baseline keeps; not for uniform, oracle, doremi",
        0.5,
        gt=0,
        le=1,
    )
    score_epochs: float = setting(
        "weights", "epochs of each model that a baseline trains in order to score the samples", 1.0, gt=0
    )
    weights: Literal["source", "sample"] = setting(
        "weights", "what gets a weight: each source (file) or each sample (record)", "source"
    )
    x_map: Literal["sigmoid", "softmax"] = setting(
        "weights", "function that maps x to per-sample weights; per-source weights always use softmax", "sigmoid"
    )
    sigmoid_start: float = setting(
        "weights",
        "initial sigmoid(x) of every record; near 1, clean records keep nearly equal weights",
        0.5,
        gt=0,
        lt=1,
    )
    x_init: str = setting(
        "weights",
        "initial weights: uniform (equal per source), size (equal per record), or a path of a weights.csv or run",
        "uniform",
    )
    sampling: Literal["uniform", "weighted"] = setting(
        "weights",
        "weighted: compute the low-weight samples of a batch only with a probability proportional to their weight",
        "uniform",
    )
    sampling_floor: float = setting(
        "weights", "with sampling=weighted: smallest probability that a sample is computed", 0.1, gt=0, le=1
    )
    x_warmup_steps: int = setting("weights", "model steps before x starts to move", 0, ge=0)
    x_optimizer: Literal[*OPTIMIZERS] | None = setting(
        "weights",
        "what moves x: auto needs no learning rate, adam is the papers'; null: auto, or adam per sample without u",
        None,
    )
    lr_x: float = setting(
        "weights", "peak learning rate of x; the right value depends on x_optimizer, auto does not use it", 1e-1, ge=0
    )
    x_lr_schedule: Literal["cosine", "constant"] = setting(
        "weights", "schedule of lr_x after its warm-up (lr_y always follows a cosine)", "cosine"
    )

    alpha: float = setting("step", "penalty; w minimises training loss + validation loss / alpha", 10.0, gt=0)
    alpha_start: float | None = setting(
        "step", "alpha at the first step; it grows evenly to alpha at the last one; null: alpha throughout", None, gt=0
    )
    order: int = setting(
        "step", "the x-gradient's error is O(1/alpha^order); with order 2, u ascends the validation loss", 1, ge=1, le=2
    )
    lr_y: float = setting("step", "peak learning rate of both model copies, w and u", 1e-5, ge=0)
    upper_every: int = setting("step", "number of model steps per step of x; always 1 with x_optimizer=auto", 5, ge=1)
    global_batch_size: int = setting("step", "training samples per step", 64, ge=1)
    val_batch_size: int = setting("step", "validation samples per step", 64, ge=1)
    micro_batch_tokens: int = setting(
        "step",
        "maximum tokens per forward pass, padding included; affects memory and speed",
        4096,
        ge=1,
    )
    clip_grad_norm: float | None = setting(
        "step", "maximum gradient norm of each model copy; null turns clipping off", None, gt=0
    )
    weight_decay: float = setting("step", "AdamW weight decay of the model copies; never applied to x", 0.0, ge=0)
    warmup_ratio: float = setting("step", "fraction of the steps in which lr_y and lr_x rise from 0", 0.03, ge=0, le=1)
    epochs: float = setting("step", "number of passes over the training samples", 1.0, gt=0)
    max_steps: int | None = setting("step", "number of model steps; null: computed from epochs", None, ge=1)
    seed: int = setting(
        "step",
        "seed of the batches, the dropout masks, and the weights of a model built from model_config",
        0,
        ge=0,
        lt=2**63,
    )

    lisa_layers: int | None = setting(
        "LISA",
        "number of decoder blocks trained at a time, drawn at random; null trains all of them (no LISA)",
        None,
        ge=1,
    )
    lisa_interval: int = setting("LISA", "model steps between two draws of blocks", 20, ge=1)
    lisa_train_embeddings: bool = setting(
        "LISA", "train embedding, head and final norm in every step; false keeps them frozen", True
    )
    lisa_shared_draw: bool = setting("LISA", "draw the same blocks for u and w", True)
    lisa_residual: Literal["device", "host", "off"] = setting(
        "LISA",
        "where DeepSpeed in bf16 keeps the 16 residual bits of each frozen weight; off loses small updates",
        "device",
    )

    lora_rank: int | None = setting(
        "LoRA",
        "rank of LoRA adapters; only they are trained, and u and w are two adapters on one frozen model; null is off",
        None,
        ge=1,
    )
    lora_alpha: float = setting(
        "LoRA", "scale of the adapters: their output is multiplied by lora_alpha / lora_rank", 16.0, gt=0
    )
    lora_rank_stabilised: bool = setting("LoRA", "rsLoRA: multiply by lora_alpha / sqrt(lora_rank) instead", False)
    lora_dropout: float = setting(
        "LoRA", "dropout probability at the adapters' inputs; u and w get the same masks", 0.0, ge=0, lt=1
    )
    lora_targets: list[str] | None = setting(
        "LoRA",
        "layers that get adapters: names such as q_proj, or regular expressions; null: all linear layers but the head",
        None,
        min_length=1,
    )
    base_dtype: Literal["fp32", "bf16", "nf4"] | None = setting(
        "LoRA",
        "how the frozen model under the adapters is stored; nf4 is 4 bit, by bitsandbytes; null: in the dtype of the "
        "passes",
        None,
    )
    lora_merge: bool | None = setting(
        "LoRA",
        "model/ is a whole model with the adapter merged in; false: an adapter folder for peft; null: false in 4 bit, "
        "else true",
        None,
    )

    backend: Literal["torch", "deepspeed"] | None = setting(
        "machine",
        "plain torch, or DeepSpeed in all launched processes; null: torch in one process and with adapters, else "
        "deepspeed",
        None,
    )
    zero_stage: int | None = setting(
        "machine", "ZeRO stage k, short for deepspeed=configs/zero<k>.json; null: 2 under DeepSpeed", None, ge=0, le=3
    )
    deepspeed: str | None = setting("machine", "path of a DeepSpeed configuration file", None)
    gpu_memory_gib: float | None = setting(
        "machine",
        "memory of one GPU in GiB, the limit in the plan of --dry_run; null: this machine's",
        None,
        gt=0,
    )

    run_name: str | None = setting(
        "run", "name of the run; null: the name of the config and the settings changed on the command line", None
    )
    output_dir: str | None = setting("run", "run folder; null: outputs/<run_name>", None)
    eval_every: int | None = setting(
        "run", "model steps between evaluations on test_data; null: a tenth of the run", None, ge=1
    )
    log_every: int = setting("run", "model steps between rows of metrics.csv", 1, ge=1)
    save_every: int | None = setting(
        "run",
        "model steps between checkpoints; null: a tenth of the run; 0: only when a signal stops the run",
        None,
        ge=0,
    )
    skip_nonfinite: int = setting(
        "run", "number of steps with a non-finite loss or gradient that are skipped before the run stops", 0, ge=0
    )
    keep_checkpoints: int | None = setting(
        "run",
        "number of newest checkpoints to keep, also when the run has finished; null: 2 until then, and none afterwards",
        None,
        ge=1,
    )
    resume: str = setting(
        "run",
        "auto: continue an unfinished run in the run folder; never: do not; or the path of a checkpoint folder",
        "auto",
    )
    save_model: Literal["w", "u", "none"] = setting(
        "run", "model copy saved to model/: the one trained with validation (w) or without (u)", "w"
    )
    tracker: Literal["wandb", "none"] = setting("run", "where metrics are logged in addition to metrics.csv", "wandb")
    track_report: bool = setting(
        "run", "send report.html to wandb, too, as an artifact; it holds the texts of the training records", False
    )

    def __post_init__(self):
        if self.x_optimizer is None:
            self.x_optimizer = "auto" if self.weights == "source" or "u" in self.copies else "adam"
        if self.backend is None:
            several = int(os.environ.get("WORLD_SIZE", "1")) > 1
            self.backend = "deepspeed" if several and self.lora_rank is None else "torch"

    @property
    def x_factor(self) -> float:
        """Factor of d/dx g(x, w) - d/dx g(x, u) in the x-gradient: alpha, or alpha/2 for f2sa with order 2."""
        return self.alpha / (self.order if "u" in self.copies else 1)

    @property
    def copies(self) -> tuple[str, ...]:
        """Names of the trained model copies. A baseline that scores has none; it makes models when it needs them."""
        return METHODS[self.method].copies

    @property
    def learned(self) -> bool:
        """Whether the weights are learned while the copies train."""
        return METHODS[self.method].learned

    @property
    def x_has_rate(self) -> bool:
        """Whether lr_x moves the weights."""
        return self.learned and OPTIMIZERS[self.x_optimizer].rate

    @property
    def x_every(self) -> int:
        """Model steps per step of x."""
        return self.upper_every if OPTIMIZERS[self.x_optimizer].rate else 1

    @property
    def weighted_draws(self) -> bool:
        """Whether a step computes only a part of the samples drawn (bilevel.weights.sampling)."""
        return self.learned and self.sampling == "weighted"

    @property
    def reads_validation(self) -> bool:
        return METHODS[self.method].validation or self.val_in_training

    @property
    def checkpoints_kept(self) -> int:
        """Number of newest checkpoints that are kept while the run is unfinished."""
        return self.keep_checkpoints or 2

    @property
    def x_init_file(self) -> Path | None:
        """The weights.csv to start from, or None if x_init is `uniform` or `size`."""
        if self.x_init in ("uniform", "size"):
            return None
        return Path(self.x_init, "weights.csv") if os.path.isdir(self.x_init) else Path(self.x_init)

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir or f"outputs/{self.run_name}")


FIELDS = Settings.__pydantic_fields__


def meaning(name: str) -> str:
    """Description of a setting; if it accepts only certain words, they follow in parentheses."""
    words = choices(name)
    return FIELDS[name].description + (f" ({', '.join(words[:-1])} or {words[-1]})" if words else "")


def choices(name: str) -> list[str]:
    """The words that a setting accepts; none if it accepts other values."""
    members = [FIELDS[name].annotation, *get_args(FIELDS[name].annotation)]
    return [word for member in members if get_origin(member) is Literal for word in get_args(member)]


DATA = {"train_data", "val_data", "test_data"}
LISTS = DATA | {
    name for name, field in FIELDS.items() if list in map(get_origin, [field.annotation, *get_args(field.annotation)])
}
