"""bilevel/data/noise.py: what a record says of itself by is_noisy, and by its silence."""

import pyarrow as pa
import pytest

from bilevel.data.noise import known_noise


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([[True, None], [None]], [[True, False], [False]]),
        ([[False, None], [True]], [[False, False], [True]]),
        ([[False], [False]], None),
        ([[None, None], []], None),
    ],
)
def test_silence_means_clean_where_any_record_is_marked(columns: list[list], expected: list[list] | None):
    found = known_noise([pa.chunked_array([column], pa.bool_()) for column in columns])
    assert (found and [part.tolist() for part in found]) == expected
