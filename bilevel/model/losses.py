"""Losses of a micro-batch, from logits at supervised positions only, in chunks, in fp32 (fp64 for fp64 models)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

from bilevel.data.batches import MicroBatch
from bilevel.model.chunked_head import head_losses, is_linear, wide_linear
from bilevel.model.masks import pass_arguments, unsearched_positions

_returned_as_they_are: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def token_losses(
    model: torch.nn.Module, batch: MicroBatch, factors: torch.Tensor | None = None, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats of every supervised token, (M,), and the row it belongs to, (M,).

    The head runs on supervised positions only: its input (B, T, H) is cut to (1, M, H), so the logits are (1, M, V). If
    the model returns the head's output unchanged and the head is linear, the head computes the losses itself in chunks
    of M, and the full logits never exist. It must then know the gradients before the backward pass: factors (B,) are
    what the rows' mean losses will be multiplied by. in_place: see bilevel.model.chunked_head.
    """
    at = batch.supervised
    head = model.get_output_embeddings()
    in_chunks = factors is not None or not torch.is_grad_enabled()
    if in_chunks and knows_head(model, batch):
        scales = None
        if factors is not None:
            scales = (factors / at.sizes.clamp_min(1)).index_select(0, at.rows)
        with _head_on(head, at.positions, lambda hidden: head_losses(head, hidden, at.targets, scales, in_place)):
            return _forward(model, batch)[0, :, 0], at.rows
    with _head_on(head, at.positions, (lambda hidden: wide_linear(head, hidden)) if is_linear(head) else None):
        logits = _forward(model, batch)[0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, at.targets, reduction="none"), at.rows


def sample_losses(
    model: torch.nn.Module, batch: MicroBatch, factors: torch.Tensor | None = None, in_place: bool = False
) -> torch.Tensor:
    """l_i, the mean cross-entropy in nats over the supervised tokens of each row, (B,); 0 for a row without any.

    factors, in_place: see token_losses.
    """
    losses, _ = token_losses(model, batch, factors, in_place)
    sizes = batch.supervised.sizes
    # Not index_add_, whose order of summation changes from run to run on a GPU. Unsafe: no check makes the host wait.
    return torch.segment_reduce(losses, "sum", lengths=sizes, unsafe=True) / sizes.clamp_min(1)


def _forward(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """The model's output, (1, M, V) logits or (1, M, 1) losses, within _head_on."""
    with unsearched_positions():
        return model(**pass_arguments(batch), use_cache=False).logits


def knows_head(model: torch.nn.Module, batch: MicroBatch) -> bool:
    """Whether the losses can be computed from the head's weights: it is linear, and its output is the model's."""
    head = model.get_output_embeddings()
    return is_linear(head) and returns_logits_as_they_are(model, head, input_ids=batch.input_ids[:1, :1])


@torch.no_grad()
def returns_logits_as_they_are(model: torch.nn.Module, head: torch.nn.Linear, **token: torch.Tensor) -> bool:
    """Whether the model returns its head's output unchanged. Most do; some scale, squash or cut it.

    Tested once per head, on one token, (1, 1) input_ids, with recognisable values in place of the logits.
    """
    if head not in _returned_as_they_are:
        values = torch.linspace(-1e5, 1e5, head.out_features, device=token["input_ids"].device)
        values = values.view(1, 1, -1) / 3
        was_training = model.training
        model.eval()  # evaluation mode draws no random numbers
        with _head_on(head, torch.zeros_like(token["input_ids"][0]), lambda _: values):
            found = model(**token, use_cache=False).logits
        model.train(was_training)
        # The same tensor, or an equal one, because ZeRO-3 wraps the outputs of modules.
        _returned_as_they_are[head] = found is values or (not found.is_meta and torch.equal(found, values))
    return _returned_as_they_are[head]


@contextmanager
def _head_on(
    head: torch.nn.Module, positions: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor] | None
) -> Iterator[None]:
    """A context in which the head runs at positions (M,) of the flattened (B * T,) inputs only, with this forward.

    Without a forward the head keeps its own. Other hooks of the head still run; under ZeRO-3 they gather its weights.
    """

    def cut(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, positions).unsqueeze(0), *inputs[1:])

    hook = head.register_forward_pre_hook(cut)
    if forward is not None:
        head.forward = forward
    try:
        yield
    finally:
        hook.remove()
        if forward is not None:
            del head.forward
