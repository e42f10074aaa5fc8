"""Every random number of a run: a function of the seed, a purpose and a step, so that there is no state to keep.

Permutation is a random order of n things that is computed place by place and never stored. It is "swap or not":
Hoang, Morris and Rogaway, "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012. A round pairs x with
(K - x) mod n, for a random K, and exchanges the two or not, by a random bit of the pair. A round is its own inverse,
whatever n is, so any number of rounds is a permutation of exactly 0..n-1.
"""

import hashlib

import numpy as np
import torch

from bilevel.processes import World

# The random walk's second eigenvalue is 1/2 + 1/2n, or 0.625 at n = 4: after 64 rounds nothing of the start is left
# (total variation over all n! orders 6e-14 at n = 4, 2e-15 at n = 6, computed exactly).
ROUNDS = 64
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads a number's bits upwards


class Permutation:
    """A permutation of 0..n-1 drawn by a key: the same on every machine, in memory that does not grow with n."""

    def __init__(self, n: int, key: str):
        numbers = np.frombuffer(hashlib.shake_256(key.encode()).digest(24 * ROUNDS), dtype="<u8").reshape(ROUNDS, 3)
        self.n = np.uint64(n)
        # Per round: K + n, so that no difference is negative, and a random linear map whose top bits decide.
        self.rounds = list(
            zip(numbers[:, 0] % self.n + self.n, numbers[:, 1] | np.uint64(1), numbers[:, 2], strict=True)
        )

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The entries of the order at these places (B,): (B,) int64."""
        x = places.astype(np.uint64)
        for shift, factor, offset in self.rounds:
            partner = (shift - x) % self.n
            mixed = np.maximum(x, partner) * factor + offset
            mixed ^= mixed >> np.uint64(32)
            mixed *= _ODD
            x = np.where(mixed.view(np.int64) < 0, partner, x)
        return x.astype(np.int64)


def key_number(key: str) -> int:
    """A number below 2^64 that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def generator(seed: int, purpose: str, *step: int | str) -> torch.Generator:
    """A generator of the CPU that depends on its arguments alone: the same on every rank and after a resume.

    purpose: what is drawn; step: which of the draws of that purpose, such as the step's number.
    """
    key = " ".join(map(str, (purpose, seed, *step)))
    return torch.Generator().manual_seed(key_number(key) >> 1)


def dropout_seed(seed: int, step: int) -> int:
    """First dropout seed of a step, far from those of other steps, because its micro-batches count up from it."""
    return (seed * 1_000_003 + step) * 100_003


def process_seed(seed: int, rank: int, processes: int) -> int:
    """The seed, below 2^64, that this rank gives to torch, so that its random numbers differ from the other ranks'."""
    return (seed * processes + rank) % 2**64


def seed_masks(seed: int, world: World) -> None:
    """Seed torch's global generator, from which the next forward pass of this rank draws its dropout masks."""
    torch.manual_seed(process_seed(seed, world.rank, world.size))
