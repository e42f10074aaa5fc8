"""The interface of one model copy (w or u) with its optimizer, which every backend implements."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from bilevel.data.batches import MicroBatch
from bilevel.model.flops import Passes
from bilevel.model.losses import sample_losses
from bilevel.processes import World
from bilevel.seeding import seed_masks

Parameters = list[torch.nn.Parameter]


Active = tuple[Parameters, list[Parameters]]  # always trained, and those of each drawn block (bilevel.model.lisa)


class ModelCopy:
    """A model copy: w, trained with validation, or u, trained without. It owns its AdamW and its gradients."""

    model: torch.nn.Module  # call it, or read its parameters
    world: World
    bf16: bool  # dtype of the forward and backward passes
    in_place = False  # whether the head may accumulate its gradient already in the forward pass
    packed = False  # whether its passes take packed rows (bilevel.model.packing)
    passed: Passes  # counts the passes of this process, without evaluations

    @property
    def size(self) -> int:
        """Number of parameters, trainable or frozen."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())

    @property
    def shape(self) -> transformers.PretrainedConfig:
        """The model's configuration."""
        return self.model.config

    def losses(self, batch: MicroBatch, seed: int, factors: torch.Tensor | None = None) -> torch.Tensor:
        """Losses l_i of the micro-batch, (B,) float32; the dropout masks depend on seed and rank.

        factors (B,): pass them if backward will be called on sum(factors * losses) and on nothing else. The pass then
        saves time and memory.
        """
        self.passed.add(batch, backward=torch.is_grad_enabled())
        seed_masks(seed, self.world)
        with self.computing():
            return sample_losses(self.model, batch.to(self.world.device), factors, self.in_place)

    def computing(self) -> AbstractContextManager:
        """A context in which a forward pass of `model` is one of this copy, in its dtype."""
        return nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of a scalar, summed over ranks. `last`: this is the last call before step."""
        raise NotImplementedError

    def gradient_norm(self) -> float:
        """Euclidean norm of the accumulated gradient before clipping; NaN if an entry is not finite."""
        raise NotImplementedError

    def step(self, lr: float, norm: float) -> None:
        """Make an optimizer step with the accumulated gradient, whose norm is `norm`, and clear the gradient."""
        raise NotImplementedError

    def discard(self) -> None:
        """Clear the accumulated gradient without a step; parameters and optimizer state do not change."""
        raise NotImplementedError

    def activate(self, always_on: Parameters, drawn: list[Parameters]) -> None:
        """Train these parameters, freeze all others, and drop the optimizer state of the frozen ones.

        The moments of always_on are kept; those of drawn start from zero.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """This process's share of parameters and optimizer state, as nested dicts, to resume in as many processes."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned; the same parameters must be active."""
        raise NotImplementedError

    def save(self, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Write the model and its tokenizer in the format of AutoModelForCausalLM.from_pretrained(folder).

        Call it last, because it merges adapters into the weights.
        """
        raise NotImplementedError
