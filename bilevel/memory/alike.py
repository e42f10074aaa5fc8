"""Decoder blocks that are alike: a pass through a few of them tells what a pass through all of them needs.

A pass through 60 blocks on the meta device takes seconds, and a plan that does not fit measures one for each remedy.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

INDEX = "layer_idx"  # the number of a block, which transformers gives to its attention
FEW = 2  # blocks that stay of a run of equal ones


@dataclasses.dataclass(frozen=True)
class Pass:
    """Bytes that one micro-batch needs in addition to weights and stored gradients.

    kept: activations alive after the forward pass of the blocks. logits: peak in addition to kept during forward and
    backward of head and loss. blocks: peak in addition to kept during the backward pass of the blocks. embeddings: peak
    in all during that of the embeddings, when the blocks' activations are freed. The peaks come one after the other.
    """

    kept: int
    logits: int
    blocks: int
    embeddings: int

    @property
    def backward(self) -> int:
        """Peak in addition to kept during the backward pass of blocks and embeddings."""
        return max(self.blocks, self.embeddings - self.kept, 0)


def extrapolated(blocks: torch.nn.ModuleList, measure: Callable[[], Pass]) -> Pass:
    """measure() of the model with all of these blocks, where possible from passes through a few of them.

    Each block of a run of equal ones adds the same to kept and nothing to the rest. That is found with FEW blocks of
    each long run and with one more of each run in turn, and checked with two more of all: the first FEW + 2 blocks of a
    run stand for the others. All blocks are measured where the check or a short pass fails, and where those passes
    would take as long.
    """
    runs = _runs(blocks)
    long = [i for i, run in enumerate(runs) if len(run) > FEW + 2]
    lengths = [FEW if i in long else len(run) for i, run in enumerate(runs)]
    if not long or (len(long) + 2) * sum(lengths) + 3 * len(long) >= len(blocks):
        return measure()

    def with_more(more: dict[int, int]) -> Pass:
        kept = [run[: length + more.get(i, 0)] for i, (run, length) in enumerate(zip(runs, lengths, strict=True))]
        with _only(blocks, list(itertools.chain(*kept))):
            return measure()

    try:
        first = with_more({})
        slopes = {i: with_more({i: 1}).kept - first.kept for i in long}
        check = with_more(dict.fromkeys(long, 2))
    except (LookupError, RuntimeError):  # the model needs all its blocks
        return measure()
    if check != dataclasses.replace(first, kept=first.kept + 2 * sum(slopes.values())):
        return measure()
    return dataclasses.replace(first, kept=first.kept + sum(slopes[i] * (len(runs[i]) - FEW) for i in long))


def _runs(blocks: torch.nn.ModuleList) -> list[list[int]]:
    """The numbers of the blocks, in runs of neighbours that are alike."""
    return [list(run) for _, run in itertools.groupby(range(len(blocks)), lambda i: _kind(blocks[i]))]


def _kind(block: torch.nn.Module) -> list[tuple]:
    """What decides what a block keeps: its modules, their plain attributes, and their tensors, trainable or not."""
    kind = []
    for name, module in block.named_modules():
        plain = {k: v for k, v in vars(module).items() if k != INDEX and isinstance(v, (int, float, str, type(None)))}
        own = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        tensors = [(key, value.shape, value.dtype, value.requires_grad) for key, value in own]
        kind.append((name, type(module), plain, tensors))
    return kind


@contextmanager
def _only(blocks: torch.nn.ModuleList, chosen: list[int]) -> Iterator[None]:
    """A context in which the list holds the chosen blocks alone."""
    whole = blocks._modules
    blocks._modules = {str(place): whole[str(number)] for place, number in enumerate(chosen)}
    try:
        yield
    finally:
        blocks._modules = whole
