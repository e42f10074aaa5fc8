"""A model copy under plain torch in one process; bilevel.model.zero_copy does the same under DeepSpeed."""

from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers

from bilevel.data.batches import MicroBatch
from bilevel.model.base_copy import Active, ModelCopy, Parameters
from bilevel.model.flops import Passes
from bilevel.model.loading import save_model
from bilevel.processes import World, moved


class TorchCopy(ModelCopy):
    """A model copy in one process. Its weights are fp32; with bf16 the trained ones are cast once per step."""

    def __init__(
        self,
        model: torch.nn.Module,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        active: Active | None = None,
        bf16: bool = False,
        world: World | None = None,
    ):
        # in_place sums gradients in another order than autograd, a difference that bf16 would amplify.
        self.bf16, self.in_place = bf16, not bf16
        self.model, self.weight_decay, self.clip_grad_norm = model, weight_decay, clip_grad_norm
        self.keeps_casts = False
        self.world, self.passed = world or World(device=next(model.parameters()).device), Passes()
        self.optimizer = self._adamw(list(self.trained().values()))
        if active is not None:
            self.activate(*active)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters of this copy by name, also those that are frozen now: all of the model's."""
        return dict(self.model.named_parameters())

    def computing(self) -> AbstractContextManager:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16)

    def losses(self, batch: MicroBatch, seed: int, factors: torch.Tensor | None = None) -> torch.Tensor:
        if self.bf16 and torch.is_grad_enabled() and not self.keeps_casts:
            torch.autocast_increment_nesting()  # autocast keeps its casts of weights while one more level is open
            self.keeps_casts = True
        return super().losses(batch, seed, factors)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()
        if last:
            self._drop_casts()

    def _drop_casts(self) -> None:
        """Forget the bf16 casts of the weights, which are about to change."""
        if self.keeps_casts:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            self.keeps_casts = False

    def gradient_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.trained().values() if p.grad is not None]))

    def step(self, lr: float, norm: float) -> None:
        self._drop_casts()
        if self.clip_grad_norm is not None:
            (total,) = moved([torch.tensor(norm)], self.world.device)
            torch.nn.utils.clip_grads_with_norm_(self.trained().values(), self.clip_grad_norm, total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        self._drop_casts()
        self.optimizer.zero_grad()

    def activate(self, always_on: Parameters, drawn: list[Parameters]) -> None:
        self._drop_casts()
        trained = [*always_on, *chain.from_iterable(drawn)]
        active = {id(p) for p in trained}
        for p in self.model.parameters():
            p.requires_grad_(id(p) in active)
            p.grad = None
        kept = {p: self.optimizer.state[p] for p in always_on if p in self.optimizer.state}
        self.optimizer = self._adamw(trained)
        self.optimizer.state.update(kept)

    def state_dict(self) -> dict[str, Any]:
        trained, state = self.trained(), self.optimizer.state
        return {"parameters": trained, "moments": {name: state[p] for name, p in trained.items() if p in state}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, p in self.trained().items():
                p.copy_(state["parameters"][name])
                if name in state["moments"]:
                    self.optimizer.state[p] = {k: v.to(p.device) for k, v in state["moments"][name].items()}

    def save(self, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        save_model(self.model, folder, tokenizer)

    def _adamw(self, parameters: Parameters) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, weight_decay=self.weight_decay, fused=True)
