"""LoRA with peft: low-rank adapters on every linear layer except the head are trained; all else is frozen.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". A layer with weight W (N, K)
computes with W + alpha/r B A. A (r, K) is random and B (N, r) zero at the start, so the model starts unchanged.
"""

import torch
import transformers

NAME = "trained"  # of our adapters; the model may already have others


def add_adapters(model: transformers.PreTrainedModel, rank: int, alpha: float, seed: int) -> None:
    """Add adapters to the model, in place, and freeze everything else."""
    import peft  # takes a second to import

    conv = any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in model.modules())
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", fan_in_fan_out=conv)
    peft.inject_adapter_in_model(config, model, NAME)


def merge_adapters(model: transformers.PreTrainedModel) -> None:
    """Merge our adapters, if there are any, into the weights, in place. The result is a plain model."""
    if NAME not in getattr(model, "peft_config", {}):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
