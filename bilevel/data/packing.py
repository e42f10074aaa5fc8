"""Rows dealt to packed micro-batches, so that all micro-batches of all ranks hold about as many tokens."""

import heapq

import numpy as np


def deal(lengths: np.ndarray, token_budget: int, ranks: int) -> list[list[list[int]]]:
    """The places of rows with these lengths (n,), for each micro-batch and each rank: [micro-batch][rank][row].

    There are as few micro-batches as fit: each holds at most token_budget tokens, or one row. Where rows are fewer than
    micro-batches, some hold none.
    """
    count = max(1, -(-int(lengths.sum()) // (token_budget * ranks)))
    while True:
        bins = fill(lengths, count * ranks)
        if all(len(rows) < 2 or lengths[rows].sum() <= token_budget for rows in bins):
            break
        count += 1
    bins.sort(key=lambda rows: -lengths[rows].sum())
    found = []
    for number in range(count):
        shares = bins[number * ranks : (number + 1) * ranks]  # of similar size, as ranks wait for each other
        found.append(shares if number % 2 == 0 else shares[::-1])
    return found


def fill(lengths: np.ndarray, bins: int) -> list[list[int]]:
    """The places of rows with these lengths (n,) in so many bins of nearly equal sums, the longest row of each first.

    The longest row left goes to the emptiest bin: Graham 1969, "Bounds on Multiprocessing Timing Anomalies".
    """
    found: list[list[int]] = [[] for _ in range(bins)]
    emptiest = [(0, number) for number in range(bins)]
    for place in np.argsort(-lengths, kind="stable").tolist():
        total, number = emptiest[0]
        found[number].append(place)
        heapq.heapreplace(emptiest, (total + int(lengths[place]), number))
    return found
