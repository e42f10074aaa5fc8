"""Errors of other libraries as messages for the user."""

import contextlib
from collections.abc import Iterator

from bilevel.errors import DataError, short


@contextlib.contextmanager
def refusals(place: str, meaning: str) -> Iterator[None]:
    """A context that turns whatever a library raises into DataError; meaning: what that says about the place."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # datasets and pyarrow raise errors of many types
        words = short(" ".join(str(error).split()), 300)
        raise DataError(f"{place}: {meaning} ({type(error).__name__}: {words})") from None
