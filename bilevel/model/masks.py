"""The masks that transformers makes for attention."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import masking_utils


@contextmanager
def unpacked_rows() -> Iterator[None]:
    """A context in which each row of a micro-batch is one sequence.

    Otherwise transformers looks at the position ids that it has just made, in case rows are packed, and on a GPU the
    host waits for the answer in each forward pass.
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find
