"""Losses of a micro-batch, from logits at supervised positions only, in chunks, in fp32 (fp64 for fp64 models)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

from bilevel.data.batches import MicroBatch
from bilevel.data.tokenise import IGNORE
from bilevel.model.chunked_head import head_losses, is_linear, wide_linear

_returned_as_they_are: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def token_losses(
    model: torch.nn.Module, batch: MicroBatch, factors: torch.Tensor | None = None, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats of every supervised token, (M,), and the row it belongs to, (M,).

    The head runs on supervised positions only: its input (B, T, H) is cut to (1, M, H), so the logits are (1, M, V). If
    the model returns the head's output unchanged and the head is linear, the head computes the losses itself in chunks
    of M, and the full logits never exist. It must then know the gradients before the backward pass: factors (B,) are
    what the rows' mean losses will be multiplied by. in_place: see bilevel.model.chunked_head. Rows are padded on the
    right, so causal attention needs no mask.
    """
    supervised = batch.targets != IGNORE
    targets, rows = batch.targets[supervised], supervised.nonzero()[:, 0]
    head = model.get_output_embeddings()
    in_chunks = factors is not None or not torch.is_grad_enabled()
    if in_chunks and knows_head(model, batch):
        scales = None
        if factors is not None:
            scales = (factors / supervised.sum(1).clamp_min(1))[rows]
        with _head_on(head, supervised, lambda hidden: head_losses(head, hidden, targets, scales, in_place)):
            return model(input_ids=batch.input_ids, use_cache=False).logits[0, :, 0], rows
    with _head_on(head, supervised, (lambda hidden: wide_linear(head, hidden)) if is_linear(head) else None):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, targets, reduction="none"), rows


def sample_losses(
    model: torch.nn.Module, batch: MicroBatch, factors: torch.Tensor | None = None, in_place: bool = False
) -> torch.Tensor:
    """l_i, the mean cross-entropy in nats over the supervised tokens of each row, (B,); 0 for a row without any.

    factors, in_place: see token_losses.
    """
    losses, rows = token_losses(model, batch, factors, in_place)
    sums = losses.new_zeros(len(batch.input_ids)).index_add_(0, rows, losses)
    return sums / rows.bincount(minlength=len(batch.input_ids)).clamp_min(1)


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
        with _head_on(head, torch.ones(1, 1, dtype=torch.bool), lambda _: values):
            found = model(**token, use_cache=False).logits
        model.train(was_training)
        # The same tensor, or an equal one, because ZeRO-3 wraps the outputs of modules.
        _returned_as_they_are[head] = found is values or (not found.is_meta and torch.equal(found, values))
    return _returned_as_they_are[head]


@contextmanager
def _head_on(
    head: torch.nn.Module, positions: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor] | None
) -> Iterator[None]:
    """A context in which the head runs on these positions (B, T) only, with this forward function if one is given.

    Other hooks of the head still run; under ZeRO-3 they gather its weights.
    """

    def cut(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][positions].unsqueeze(0), *inputs[1:])

    hook = head.register_forward_pre_hook(cut)
    if forward is not None:
        head.forward = forward
    try:
        yield
    finally:
        hook.remove()
        if forward is not None:
            del head.forward
