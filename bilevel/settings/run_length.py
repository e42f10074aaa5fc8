"""The number of steps of a run, and how often its models are evaluated."""

import math

from bilevel.errors import UserError

MOST_STEPS = 10_000_000  # of a run


def steps_per_run(n: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Number of steps: max_steps, or as many as pass `epochs` times over n samples. Raises UserError if too many."""
    steps = max_steps or epochs * n / batch_size
    if steps > MOST_STEPS:
        raise UserError(
            f"{steps:.3g} steps are more than {MOST_STEPS:,}, the most that a run can have; "
            + ("make max_steps smaller" if max_steps else "make epochs smaller, or give max_steps")
        )
    return max(1, math.ceil(steps))


def evaluation_interval(steps: int, eval_every: int | None) -> int:
    """Steps between two evaluations in a run of so many steps; eval_every=None is a tenth of it."""
    return max(1, steps // 10) if eval_every is None else eval_every


def evaluations(steps: int, every: int, done: int = 0) -> int:
    """Number of evaluations after step `done`: at each multiple of `every`, and at the last step."""
    return -(-steps // every) - done // every
