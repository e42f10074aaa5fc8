"""Durations, amounts of memory and numbers, as a person reads them."""

import math


def duration(seconds: float) -> str:
    """A time to two figures or so: 42 ms, 0.42 s, 12 s, 3 min, 2 h 05 min."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds < 0.995 else f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def memory(size: int) -> str:
    """Bytes in MB or GB (powers of ten)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def apart(values: list[float]) -> list[str]:
    """Numbers of 0 or more with as many decimals, two at least, as it takes to tell them apart."""
    spread = max(values) - min(values)
    decimals = 2 if spread == 0 else min(9, max(2, 1 - math.floor(math.log10(spread))))
    return [f"{v:.1g}" if 0 < v < 10**-decimals else f"{v:.{decimals}f}" for v in values]


def many(number: int, what: str) -> str:
    """A count with its noun, which gets an s unless there is one."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
