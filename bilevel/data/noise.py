"""The field is_noisy, which marks records as corrupted; only evaluations look at it."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute


def known_noise(columns: Sequence[pa.ChunkedArray]) -> list[np.ndarray] | None:
    """is_noisy of the records in each column, bool; None if no record at all is marked as noisy.

    A record without the field is clean.
    """
    if not any(pa.compute.any(column).as_py() for column in columns):
        return None
    return [column.fill_null(False).to_numpy() for column in columns]
