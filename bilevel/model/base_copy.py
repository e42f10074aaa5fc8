"""One copy of the model with its optimizer: what every backend offers."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from bilevel.data.samples import MicroBatch
from bilevel.model.flops import Passes
from bilevel.model.losses import sample_losses
from bilevel.processes import World
from bilevel.seeding import seed_masks

Parameters = list[torch.nn.Parameter]


Active = tuple[Parameters, list[Parameters]]  # always on, and those of each drawn block (bilevel.model.lisa)


class ModelCopy:
    """A model (u or w), its AdamW and its gradients since the last step."""

    model: torch.nn.Module  # call it, or read its parameters
    world: World
    bf16: bool  # of the forward and backward passes
    in_place = False  # whether the head may add to its gradient before the backward pass
    passed: Passes  # of this process, but for evaluations

    @property
    def size(self) -> int:
        """Number of parameters, trained or not."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())

    @property
    def shape(self) -> transformers.PretrainedConfig:
        """The model's own configuration."""
        return self.model.config

    def losses(self, batch: MicroBatch, seed: int, factors: torch.Tensor | None = None) -> torch.Tensor:
        """l_i of the micro-batch, (B,) float32, with dropout masks drawn from seed and rank.

        factors (B,): when backward will be given sum(factors * losses), and nothing else, a pass can save time and
        memory by knowing them now.
        """
        self.passed.add(batch, backward=torch.is_grad_enabled())
        seed_masks(seed, self.world)
        with self.precision():
            return sample_losses(self.model, batch.to(self.world.device), factors, self.in_place)

    def precision(self) -> AbstractContextManager:
        """Inside, the forward pass computes in the copy's dtype."""
        return nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of a scalar, summed over ranks, to those since the last step; `last` before the step."""
        raise NotImplementedError

    def gradient_norm(self) -> float:
        """Euclidean norm of the summed gradients since the last step, before clipping; nan where one is not finite."""
        raise NotImplementedError

    def step(self, lr: float, norm: float) -> None:
        """Step with the gradients since the last step, whose norm is given, and clear them."""
        raise NotImplementedError

    def discard(self) -> None:
        """Forget the gradients since the last step; parameters and optimizer stay as they are."""
        raise NotImplementedError

    def activate(self, always_on: Parameters, drawn: list[Parameters]) -> None:
        """Train these parameters and freeze all others, whose optimizer state is dropped.

        The moments of always_on go on, those of drawn start anew.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """This process's share of parameters and optimizer state, nested, to go on from with the same processes."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what state_dict gave, with the same parameters active."""
        raise NotImplementedError

    def save(self, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Write the model and its tokenizer so that AutoModelForCausalLM.from_pretrained(folder) reads them.

        Comes last: adapters are merged into the weights.
        """
        raise NotImplementedError
