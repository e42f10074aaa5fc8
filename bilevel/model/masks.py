"""What transformers is told about the rows of a micro-batch, from which it makes the masks of attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import masking_utils

from bilevel.data.batches import MicroBatch


@contextmanager
def unsearched_positions() -> Iterator[None]:
    """A context in which transformers does not look for rows in the position ids.

    It would do so whether or not rows are packed, and on a GPU the host waits for the answer in each forward pass.
    Padded rows need no search, and packed ones come with their bounds.
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def pass_arguments(batch: MicroBatch) -> dict[str, Any]:
    """Arguments of a model's forward function for a micro-batch, on the device of its input_ids.

    Padded rows need no mask: the padding is on the right, and attention is causal. The bounds of packed rows have the
    names by which transformers passes them down to attention.
    """
    if batch.bounds is None:
        return {"input_ids": batch.input_ids}
    ends, longest = batch.bounds.cu_seq_lens.to(torch.int32), batch.bounds.longest
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.bounds.position_ids,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
