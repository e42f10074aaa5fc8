"""One copy of the model with its optimizer, under plain torch in one process; the only file that knows."""

import copy
from pathlib import Path

import torch
import transformers

from bilevel.data import MicroBatch
from bilevel.losses import sample_losses


class ModelCopy:
    """A model (u or w), its AdamW and its gradients since the last step."""

    def __init__(self, model: torch.nn.Module, weight_decay: float = 0.0, clip_grad_norm: float | None = None):
        self.model, self.clip_grad_norm = model, clip_grad_norm
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay, fused=True)

    def losses(self, batch: MicroBatch, seed: int) -> torch.Tensor:
        """l_i of the micro-batch, (B,) float32, with dropout masks drawn from seed."""
        torch.manual_seed(seed)
        return sample_losses(self.model, batch.to(self.device))

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a scalar to the gradients since the last step."""
        loss.backward()

    def gradient_norm(self) -> float:
        """Euclidean norm of the gradients since the last step, before clipping."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def step(self, lr: float, norm: float) -> None:
        """Step with the gradients since the last step, whose norm is given, and clear them."""
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.clip_grad_norm, torch.tensor(norm, device=self.device)
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Write the model and its tokenizer so that AutoModelForCausalLM.from_pretrained(folder) reads them."""
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def two_copies(
    model: torch.nn.Module, weight_decay: float, clip_grad_norm: float | None
) -> tuple[ModelCopy, ModelCopy]:
    """u and w, equal at the start."""
    return ModelCopy(model, weight_decay, clip_grad_norm), ModelCopy(copy.deepcopy(model), weight_decay, clip_grad_norm)


def device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
