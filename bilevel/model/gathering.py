"""How many parameters ZeRO-3 gathers ahead of the layer that computes: chosen from the model's layers.

DeepSpeed prefetches only while fewer than stage3_max_live_parameters are gathered, the computing layer's among them. If
that is less than one layer, nothing is prefetched, and each layer waits for its own weights.
"""

import copy
from typing import Any

import torch

AHEAD, LIVE = int(2e7), int(1e8)  # at least, so that small layers are gathered together


def with_prefetch(config: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """DeepSpeed's config, at stage 3 completed with what it leaves open, in numbers of parameters.

    While any layer computes, even the embedding, the largest layer of a block can be gathered ahead.
    """
    if config.get("zero_optimization", {}).get("stage") != 3:
        return config
    config = copy.deepcopy(config)
    zero, ends = config["zero_optimization"], (model.get_input_embeddings(), model.get_output_embeddings())
    sizes = {module: _own(module) for module in model.modules()}
    inner = max(size for module, size in sizes.items() if module not in ends)
    ahead = zero.setdefault("stage3_prefetch_bucket_size", max(AHEAD, inner))
    zero.setdefault("stage3_max_live_parameters", max(LIVE, max(sizes.values()) + int(ahead)))
    return config


def _own(module: torch.nn.Module) -> int:
    """Number of the module's parameters, without those of modules in it."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters(recurse=False))
