"""Single changes of a run's settings that need less memory."""

import copy
import dataclasses
from typing import Any

import torch

from bilevel.memory.activations import micro_batch
from bilevel.model.adapters import linear_layers, width
from bilevel.model.lisa import Layers
from bilevel.settings.fields import Settings
from bilevel.settings.methods import METHODS

CPU = {"device": "cpu"}
RANK = 16  # of the adapters that are proposed


def changes(
    settings: Settings, model: torch.nn.Module, config: dict[str, Any]
) -> list[tuple[str, Settings, dict[str, Any]]]:
    """Changes that need less memory, adapters before single settings: (words, settings, DeepSpeed's config)."""
    s, change, found = settings, dataclasses.replace, _with_adapters(settings, model)
    shorter = max(s.max_length - 1, s.micro_batch_tokens // 2)
    if micro_batch(change(s, micro_batch_tokens=shorter)) != micro_batch(s):
        found.append((f"micro_batch_tokens {shorter}", change(s, micro_batch_tokens=shorter), config))
    if not s.gradient_checkpointing:
        found.append(("gradient_checkpointing true", change(s, gradient_checkpointing=True), config))
    if s.lisa_layers is None and s.lora_rank is None:
        found.append(("lisa_layers 2", change(s, lisa_layers=min(2, len(Layers(model).blocks))), config))
    elif s.lisa_layers is not None and s.lisa_layers > 1:
        found.append((f"lisa_layers {s.lisa_layers // 2}", change(s, lisa_layers=s.lisa_layers // 2), config))
    if s.lisa_layers is not None and s.lisa_train_embeddings:
        found.append(("lisa_train_embeddings false", change(s, lisa_train_embeddings=False), config))
    if s.backend == "torch":
        return found
    stage = config["zero_optimization"]["stage"]
    for higher in range(stage + 1, 4):
        found.append((f"zero_stage {higher}", s, _with(config, stage=higher)))
    if s.lisa_residual == "device":
        found.append(("lisa_residual host", change(s, lisa_residual="host"), config))
    offloading = _with(config, stage=max(2, stage), offload_optimizer=CPU)
    found.append(("offload_optimizer to cpu (in a DeepSpeed file, deepspeed=FILE)", s, offloading))
    found.append(
        ("offload_optimizer and offload_param to cpu (stage 3)", s, _with(offloading, stage=3, offload_param=CPU))
    )
    return found


def _with_adapters(settings: Settings, model: torch.nn.Module) -> list[tuple[str, Settings, dict[str, Any]]]:
    """Changes to adapters on one frozen copy, and to 4 bit; none for a model too narrow, or a method without them."""
    s, change = settings, dataclasses.replace
    narrow = s.lora_rank is None and min(map(width, linear_layers(model).values()), default=0) < RANK
    if METHODS[s.method].whole_gradients or narrow:
        return []
    given, words = {}, "base_dtype nf4"
    if s.lora_rank is None:
        given = {"lora_rank": RANK, "lisa_layers": None, "lisa_train_embeddings": True}
        given |= {"backend": "torch", "zero_stage": None, "deepspeed": None}
        words = f"lora_rank {RANK} base_dtype nf4"
    found = [(f"lora_rank {RANK}", change(s, **given), {})] if given else []
    if s.base_dtype != "nf4" and s.model_name_or_path is not None:
        found.append((words, change(s, **given, base_dtype="nf4"), {}))
    return found


def _with(config: dict[str, Any], **zero: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config["zero_optimization"] |= zero
    return config
