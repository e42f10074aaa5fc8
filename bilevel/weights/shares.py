"""From a source's share p_s of the weight to the coefficient c_i of its records."""

from typing import TypeVar

Array = TypeVar("Array")  # a tensor or a numpy array


def record_weights(p: Array, sizes: Array) -> Array:
    """N p_s / n_s (S,): the coefficient of each record of a source, for the shares p (S,) and sizes n_s (S,).

    The mean over all N records is 1 when p sums to 1.
    """
    return sizes.sum() * p / sizes
