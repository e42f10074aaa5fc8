"""LoRA with peft: low-rank adapters on linear layers are trained, one set for each copy; the model itself is frozen.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". A layer with weight W (N, K) computes with
W + s B A, where s is alpha/r, or alpha/sqrt(r) with rank stabilisation (Kalajdzievski 2023, rsLoRA). A (r, K) is random
and B (N, r) zero at the start, so the model starts unchanged. All copies share the frozen model and start with equal A.
A pass can hold rows of several copies; each layer adds to a row what the adapter of its copy computes.
"""

import os
import re
import warnings
from typing import Any

import torch
import transformers

from bilevel.errors import UserError, first
from bilevel.model.pretrained import read_by_a_library
from bilevel.settings.fields import Settings

CONV = transformers.pytorch_utils.Conv1D
Shares = dict[str, slice]  # adapter -> its tokens of a flattened micro-batch


class Adapters:
    """The adapters of a model, by name (u, w), and which tokens of the next pass belong to which.

    `shares` covers the `size` tokens of a micro-batch, row by row, without gaps and in order. It stays as it is until
    the next pass, because gradient checkpointing computes layers again in the backward pass.
    """

    def __init__(self, model: transformers.PreTrainedModel, names: tuple[str, ...]):
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model, self.names = model, names
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
        self.shares: Shares = {names[-1]: slice(None)}
        self.size: int | None = None  # None: all tokens are those of one adapter, whatever a layer makes of them
        for layer in self.layers.values():
            layer.forward = _Forward(self, layer)
        self.parameters = {name: _of_adapter(model, name) for name in names}  # by name of the adapter and of each

    def select(self, name: str) -> None:
        """All tokens of the next pass belong to this adapter."""
        self.shares, self.size = {name: slice(None)}, None

    def share(self, tokens: dict[str, int]) -> None:
        """The next pass has rows of several adapters: so many tokens of each, padding included, in this order."""
        self.shares, start = {}, 0
        for name, count in tokens.items():
            if count:
                self.shares[name] = slice(start, start + count)
                start += count
        self.size = start

    def equal(self) -> bool:
        """Whether all adapters are equal, bit for bit."""
        one, *others = (each.values() for each in self.parameters.values())
        return all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))

    @torch.no_grad()
    def rows_stay_apart(self) -> bool:
        """Whether every adapted layer sees the rows of a pass in order, so that it can tell whose they are.

        Layers of experts that get the tokens routed to them do not. Tried with one pass of a few tokens.
        """
        was_training = self.model.training
        self.model.eval()  # evaluation mode draws no random numbers
        tokens = torch.zeros(3, 5, dtype=torch.long, device=self.model.device)
        self.share({self.names[0]: 5, self.names[-1]: 10})
        try:
            self.model(input_ids=tokens, use_cache=False)
        except RowsMixed:
            return False
        finally:
            self.select(self.names[-1])
            self.model.train(was_training)
        return True


class RowsMixed(Exception):
    """A layer sees positions that are not those of all rows in order."""


def _of_adapter(model: transformers.PreTrainedModel, name: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter, by their names in the model."""
    return {full: p for full, p in model.named_parameters() if re.search(rf"\.lora_\w+\.{name}\.", full)}


class _Forward:
    """The forward function of one adapted layer: the frozen layer, plus each token's own adapter."""

    def __init__(self, adapters: Adapters, layer: Any):
        self.adapters, self.layer = adapters, layer

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer, shares = self.layer, self.adapters.shares
        out = layer.base_layer(x, *args, **kwargs)
        if self.adapters.size is None:
            (name,) = shares
            return out + self._adapted(name, x).to(out.dtype)
        flat = x.flatten(0, -2)
        if len(flat) != self.adapters.size:
            raise RowsMixed(f"{len(flat)} positions of {self.adapters.size} tokens")
        parts = [self._adapted(name, flat[at]) for name, at in shares.items()]
        return out + torch.cat(parts).view_as(out).to(out.dtype)

    def _adapted(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            x = x.to(layer.lora_A[name].weight.dtype)
        x = layer.lora_dropout[name](x)
        return layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]


def add_adapters(model: transformers.PreTrainedModel, settings: Settings) -> Adapters:
    """Add an adapter for each copy to the model, in place, and freeze everything else. Raises UserError."""
    import peft  # takes a second to import

    s, names = settings, settings.copies or ("w",)
    targets = _targets(model, s.lora_targets)
    _check_rank(targets, s.lora_rank)
    conv = any(isinstance(module, CONV) for module in model.modules())
    config = peft.LoraConfig(
        r=s.lora_rank,
        lora_alpha=s.lora_alpha,
        lora_dropout=s.lora_dropout,
        use_rslora=s.lora_rank_stabilised,
        target_modules=_short(model, targets),
        fan_in_fan_out=conv,
        task_type="CAUSAL_LM",
        base_model_name_or_path=s.model_name_or_path,
    )
    torch.manual_seed(s.seed)
    for name in names:
        with warnings.catch_warnings(action="ignore"):  # about the adapters that are there already
            peft.inject_adapter_in_model(config, model, name)
    adapters = Adapters(model, names)
    for full, p in model.named_parameters():
        p.requires_grad_(".lora_" in full)
        if p.requires_grad and not p.is_meta:  # peft takes the dtype of the frozen layer
            p.data = p.data.float()
    one, *others = (each.values() for each in adapters.parameters.values())
    for other in others:
        for ours, same in zip(other, one, strict=True):
            ours.data.copy_(same.data)
    return adapters


def merge_adapter(model: transformers.PreTrainedModel, name: str) -> None:
    """Merge one adapter into the weights, in place, and remove all adapters. The result is a plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for full, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(adapter_names=[name])
            parent, _, child = full.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config


def put_on(model: transformers.PreTrainedModel, folder: str) -> None:
    """Put the adapter of a folder on the model that it was trained on, and take its generation configuration.

    Raises UserError.
    """
    import peft

    with read_by_a_library(folder):
        peft.PeftModel.from_pretrained(model, folder)  # in place
        if os.path.isfile(os.path.join(folder, "generation_config.json")):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


def linear_layers(model: transformers.PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The linear layers of the model by name, except the head."""
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, CONV)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds) and layer is not head}


def _targets(model: transformers.PreTrainedModel, patterns: list[str] | None) -> dict[str, torch.nn.Module]:
    """The layers that get adapters, by name. Raises UserError if a pattern matches none."""
    linear = linear_layers(model)
    if not linear:
        raise UserError("lora_rank: the model has no linear layer besides its head; train it without adapters")
    chosen: dict[str, torch.nn.Module] = {}
    for pattern in patterns or [".*"]:
        found = {name: layer for name, layer in linear.items() if _matches(pattern, name)}
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"lora_targets: {pattern!r} matches no linear layer of the model, whose layers are "
                f"{', '.join(first(kinds, 20))}"
            )
        chosen |= found
    return chosen


def _matches(pattern: str, name: str) -> bool:
    """Whether it is the end of a layer's name, or a regular expression for all of it. Raises UserError."""
    try:
        return name.endswith(f".{pattern}") or re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(
            f"lora_targets: {pattern!r} is neither the name of a layer nor a regular expression ({error})"
        ) from None


def _check_rank(targets: dict[str, torch.nn.Module], rank: int) -> None:
    """Raises UserError if the rank is larger than a layer."""
    sizes = {name: width(layer) for name, layer in targets.items()}
    name = min(sizes, key=sizes.get)
    if rank > sizes[name]:
        raise UserError(
            f"lora_rank {rank}: {name} is only {sizes[name]} wide, and an adapter of that rank would be larger than "
            f"the layer; use {sizes[name]} or less, or lora_targets without this layer"
        )


def width(layer: torch.nn.Module) -> int:
    """The smaller of a linear layer's two sizes; a quantised weight does not show them."""
    return min(layer.nx, layer.nf) if isinstance(layer, CONV) else min(layer.in_features, layer.out_features)


def _short(model: transformers.PreTrainedModel, targets: dict[str, torch.nn.Module]) -> list[str]:
    """The names for peft's configuration: the last parts, if they mean the same layers, as they do by default."""
    last = {name.rpartition(".")[2] for name in targets}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last) if meant == set(targets) else list(targets)
