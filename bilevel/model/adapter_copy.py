"""A copy that is an adapter on a frozen model, which all copies share (bilevel.model.adapters)."""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
import transformers

from bilevel.data.batches import MicroBatch
from bilevel.model.adapters import merge_adapter
from bilevel.model.loading import save_adapter, save_model
from bilevel.model.losses import knows_head, sample_losses
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import World
from bilevel.seeding import seed_masks


class AdapterCopy(TorchCopy):
    """One adapter of a model with its AdamW. Several processes hold equal adapters and sum their gradients.

    one_pass: whether a step takes the rows of all copies through the model together, token_budget padded tokens at a
    time (bilevel.step.gradient). merged: whether `save` merges the adapter into the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        name: str,
        world: World,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        bf16: bool = False,
        one_pass: bool = True,
        token_budget: int = 4096,
        merged: bool = True,
    ):
        self.name, self.adapters, self.merged = name, model.adapters, merged
        self.one_pass, self.token_budget = one_pass, token_budget
        self.own = self.adapters.parameters[name]
        super().__init__(model, weight_decay, clip_grad_norm, bf16=bf16, world=world)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return self.own

    def computing(self) -> AbstractContextManager:
        self.adapters.select(self.name)
        return super().computing()

    def shared_losses(
        self, batch: MicroBatch, shares: dict[str, int], seed: int, factors: torch.Tensor
    ) -> torch.Tensor:
        """Losses (B,) of a micro-batch with rows of several copies: so many tokens of each, in this order.

        The pass is counted as one of this copy. seed, factors: as in ModelCopy.losses.
        """
        self.passed.add(batch, backward=True)
        seed_masks(seed, self.world)
        batch = batch.to(self.world.device)
        with super().computing():
            self.adapters.select(self.name)
            knows_head(self.model, batch)  # it runs one row through the model, the first time
            self.adapters.share(shares)
            return sample_losses(self.model, batch, factors, self.in_place)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        super().backward(loss, last)
        if last:
            self.sum_gradients()

    def sum_gradients(self) -> None:
        """Sum the accumulated gradients over all processes; a process may have none."""
        if self.world.size == 1:
            return
        for p in self.own.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = self.world.sum(torch.cat([p.grad.flatten() for p in self.own.values()]))
        for p, total in zip(self.own.values(), flat.split([p.numel() for p in self.own.values()]), strict=True):
            p.grad.copy_(total.view_as(p))

    def save(self, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        if not self.world.main:
            return
        if self.merged:
            merge_adapter(self.model, self.name)
            save_model(self.model, folder, tokenizer)
        else:
            save_adapter(self.model, self.name, self.own, folder, tokenizer)
