"""LoRA by peft: low-rank adapters beside every linear layer but the head train, and everything else rests.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". A layer's weight W acts as W + alpha/r B A, with A
(r, K) drawn at random and B (N, r) zero at the start, so that the model begins as it was.
"""

import torch
import transformers

NAME = "trained"  # of our adapters, beside which a model may have come with others


def add_adapters(model: transformers.PreTrainedModel, rank: int, alpha: float, seed: int) -> None:
    """Put adapters into the model, in place; only they can be trained then."""
    import peft  # takes a second to import

    conv = any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in model.modules())
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", fan_in_fan_out=conv)
    peft.inject_adapter_in_model(config, model, NAME)


def merge_adapters(model: transformers.PreTrainedModel) -> None:
    """Add what our adapters, if there are any, have learned to the weights, in place: a plain model is left."""
    if NAME not in getattr(model, "peft_config", {}):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
