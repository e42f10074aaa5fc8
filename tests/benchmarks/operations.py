"""Floating-point operations of a step: counted, and the fewest that its arithmetic can do with.

A decoder block whose matrices hold b numbers, in the l blocks of a model of attention width d (heads times their
size), head (V, H); a sample of t inputs, m of them supervised. In units of one multiplication and one addition, a pass
forward and backward over that sample needs at least

    l b t             forward through the blocks            l 2 t^2 d      scores and their product with the values
    l b t             back to their inputs                  l 4 t^2 d      back through both
    l_trained b t     to the matrices of trained blocks
    V H m  (2 + 1 if the head trains)                       the head forward, back to its input, to its matrix

Norms, activation functions and softmax are left out, as torch.utils.flop_counter does. t^2 is what eager attention
computes and the counter sees; the causal half alone would be t (t + 1) / 2. A bilevel step is three such passes: u and
w over the training samples, w over the validation samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop
from transformers.pytorch_utils import Conv1D

from bilevel.data.samples import Samples
from bilevel.data.tokenise import IGNORE
from bilevel.model.lisa import find_blocks


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Counts all operations inside but those of sdpa on a CPU: get_total_flops()."""

    def linear_flop(a: tuple, b: tuple, *_, **__) -> int:
        return mm_flop(a, (b[1], b[0]))

    product = torch.ops.mkldnn._linear_pointwise
    with FlopCounterMode(display=False, custom_mapping={product: linear_flop}) as counter:
        yield counter


def sizes(samples: Samples, sample_ids: torch.Tensor) -> np.ndarray:
    """(n, 2): inputs and supervised positions of these samples."""
    rows = samples.table.select_columns(["input_ids", "labels"])[sample_ids.tolist()]
    inputs = [len(ids) - 1 for ids in rows["input_ids"]]
    supervised = [sum(label != IGNORE for label in labels[1:]) for labels in rows["labels"]]
    return np.array([inputs, supervised]).T


def least_pass(
    model: torch.nn.Module, sizes: np.ndarray, trained_blocks: int | None = None, head_everywhere: bool = False
) -> float:
    """The fewest operations of a forward and backward pass over samples of these sizes (n, 2).

    trained_blocks: of LISA, with the head trained; None is all. head_everywhere: logits at all t inputs.
    """
    blocks, config = find_blocks(model), model.config
    trained = len(blocks) if trained_blocks is None else trained_blocks
    matrices = sum(m.weight.numel() for m in blocks[0].modules() if isinstance(m, (torch.nn.Linear, Conv1D)))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    t, m = sizes.T.astype(float)
    through_blocks = (2 * len(blocks) + trained) * matrices * t.sum() + len(blocks) * 6 * (t**2).sum() * width
    through_head = 3 * model.get_output_embeddings().weight.numel() * (t if head_everywhere else m).sum()
    return 2 * (through_blocks + through_head)
