"""One copy of the model with its optimizer: the interface, and plain torch in one process.

bilevel.zero has the same under DeepSpeed; nobody else knows which it is.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers

from bilevel.data import MicroBatch
from bilevel.lora import merge_adapters
from bilevel.losses import sample_losses
from bilevel.model import save_model
from bilevel.operations import Passes
from bilevel.schedule import process_seed
from bilevel.world import World

Parameters = list[torch.nn.Parameter]
Active = tuple[Parameters, list[Parameters]]  # always on, and those of each drawn block (bilevel.lisa)


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
        torch.manual_seed(process_seed(seed, self.world.rank, self.world.size))
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


class TorchCopy(ModelCopy):
    """A copy in one process under plain torch. Its weights are fp32; with bf16 they are cast in each forward pass."""

    def __init__(
        self,
        model: torch.nn.Module,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        active: Active | None = None,
        bf16: bool = False,
    ):
        # Another order of sums than autograd's, which bf16 would make more of than rounding.
        self.bf16, self.in_place = bf16, not bf16
        self.model, self.weight_decay, self.clip_grad_norm = model, weight_decay, clip_grad_norm
        self.world, self.passed = World(device=next(model.parameters()).device), Passes()
        self.optimizer = self._adamw(list(model.parameters()))
        if active is not None:
            self.activate(*active)

    def precision(self) -> AbstractContextManager:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def gradient_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))

    def step(self, lr: float, norm: float) -> None:
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.clip_grad_norm, torch.tensor(norm, device=self.world.device)
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def activate(self, always_on: Parameters, drawn: list[Parameters]) -> None:
        trained = [*always_on, *chain.from_iterable(drawn)]
        active = {id(p) for p in trained}
        for p in self.model.parameters():
            p.requires_grad_(id(p) in active)
            p.grad = None
        kept = {p: self.optimizer.state[p] for p in always_on if p in self.optimizer.state}
        self.optimizer = self._adamw(trained)
        self.optimizer.state.update(kept)

    def state_dict(self) -> dict[str, Any]:
        moments = {
            name: self.optimizer.state[p] for name, p in self.model.named_parameters() if p in self.optimizer.state
        }
        return {"parameters": dict(self.model.named_parameters()), "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(state["parameters"][name])
                if name in state["moments"]:
                    self.optimizer.state[p] = {k: v.to(p.device) for k, v in state["moments"][name].items()}

    def save(self, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        merge_adapters(self.model)
        save_model(self.model, folder, tokenizer)

    def _adamw(self, parameters: Parameters) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, weight_decay=self.weight_decay, fused=True)
