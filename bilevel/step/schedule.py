"""What a step's number decides: the factor of a step size, and where dropout masks start."""

import math


def schedule(step: int, steps: int, warmup_ratio: float, kind: str) -> float:
    """Factor of a step size at step 0..steps-1: linear from 0 over the warm-up, then constant or half a cosine to 0."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
