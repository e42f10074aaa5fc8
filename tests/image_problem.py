"""Data hyper-cleaning with softmax regression: the problem, its exact hypergradient, and the project's copies of it.

    g(x, y) = 1/N sum_i c_i(x) l_i(y) + DECAY/2 |y|^2,   f(y) = mean of l over the trusted images
    c_i(x)  = sigmoid(x_i) / mean_j sigmoid(x_j),        l = cross-entropy

y (classes, D) are the parameters of the linear model. Where tests/oracle.py solves problems of 35 parameters with whole
Hessians, this one multiplies with them. tests.benchmarks.hyper_cleaning measures on Fashion-MNIST.
"""

import dataclasses
import functools
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bilevel.data.batches import Batch, MicroBatch
from bilevel.model.torch_copy import TorchCopy

FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
DECAY = 2e-3
CONFIDENCE = 0.05  # about p (1 - p) of a class, to precondition

# ----------------------------------------------------------------------------------------------------------------------
# the problem


@dataclasses.dataclass
class Problem:
    """Images as rows of features, the last of which is 1, and their labels: N for training, then the trusted ones.

    features (N + V, D), labels (N + V,), is_noisy (N,): whether a label of training is wrong.
    """

    features: torch.Tensor
    labels: torch.Tensor
    is_noisy: np.ndarray

    @property
    def n(self) -> int:
        return len(self.is_noisy)

    def losses(self, y: torch.Tensor, part: slice | torch.Tensor) -> torch.Tensor:
        """Cross-entropy of these images, (B,); y (classes, D)."""
        logits = self.features[part] @ y.T
        return logits.logsumexp(1) - logits.gather(1, self.labels[part, None])[:, 0]

    def lower(self, y: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """g at coefficients c (N,)."""
        return (c * self.losses(y, slice(self.n))).mean() + decay(y)

    def upper(self, y: torch.Tensor) -> torch.Tensor:
        """f, the mean loss on the trusted images."""
        return self.losses(y, slice(self.n, None)).mean()

    def trusted(self) -> "Problem":
        """The trusted images in the place of those for training."""
        rows = slice(self.n, None)
        return Problem(self.features[rows], self.labels[rows], np.zeros(len(self.labels) - self.n, dtype=bool))

    def start(self) -> torch.Tensor:
        return self.features.new_zeros(int(self.labels.max()) + 1, self.features.shape[1])

    @functools.cached_property
    def rough(self) -> torch.Tensor:
        """The Cholesky factor (D, D) of what the Hessian of g is about, for each class."""
        x = self.features[: self.n]
        return torch.linalg.cholesky(x.T @ x * (CONFIDENCE / self.n) + DECAY * torch.eye(x.shape[1], dtype=x.dtype))


def decay(y: torch.Tensor) -> torch.Tensor:
    return DECAY / 2 * y.square().sum()


def make_problem(features: torch.Tensor, labels: torch.Tensor, n: int, noise: float, seed: int) -> Problem:
    """n images, a part of which get a random label, and n / 10 trusted others, all drawn from those given."""
    random = np.random.default_rng(seed)
    chosen = torch.from_numpy(random.permutation(len(labels))[: n + n // 10])
    given = labels[chosen].numpy().copy()
    changed = random.permutation(n)[: round(noise * n)]
    given[changed] = random.integers(int(labels.max()) + 1, size=len(changed))
    return Problem(features[chosen], torch.from_numpy(given), given[:n] != labels[chosen[:n]].numpy())


# ----------------------------------------------------------------------------------------------------------------------
# exact solutions


def curvature(value: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, Callable]:
    """The gradient of a value at y, and the function that multiplies its Hessian with a tensor like y."""
    (gradient,) = torch.autograd.grad(value, y, create_graph=True)
    return gradient.detach(), lambda v: torch.autograd.grad(gradient, y, v, retain_graph=True)[0]


def conjugate_gradients(
    multiply: Callable, rough: torch.Tensor, b: torch.Tensor, x: torch.Tensor, tolerance: float
) -> torch.Tensor:
    """x (classes, D) with |multiply(x) - b| <= tolerance |b|, from a start x; rough: Problem.rough, to precondition."""
    r = b - multiply(x) if x.any() else b.clone()
    p, last = torch.zeros_like(b), 1.0
    for _ in range(1000):
        if r.norm() <= tolerance * b.norm():
            break
        z = torch.cholesky_solve(r.T, rough).T
        square = (r * z).sum()
        p, last = z + square / last * p, square
        along = multiply(p)
        step = square / (p * along).sum()
        x, r = x + step * p, r - step * along
    return x


def solve(problem: Problem, c: torch.Tensor, y: torch.Tensor, tolerance: float = 1e-4, nu: float = 0.0) -> torch.Tensor:
    """argmin over y of g + nu f at coefficients c, from a start y, until the gradient's norm is at most tolerance.

    Newton's method: each step is solved for by conjugate gradients and halved until the value falls, up to rounding.
    """

    def value_at(y: torch.Tensor) -> torch.Tensor:
        return problem.lower(y, c) + (nu * problem.upper(y) if nu else 0)

    for _ in range(100):
        y = y.detach().requires_grad_()
        value = value_at(y)
        gradient, multiply = curvature(value, y)
        norm = float(gradient.norm())
        if norm <= tolerance:
            break
        down = conjugate_gradients(multiply, problem.rough, -gradient, torch.zeros_like(y), min(0.1, norm))
        slope, size = float((gradient * down).sum()), 1.0
        with torch.no_grad():
            most = value * (1 + 4 * torch.finfo(y.dtype).eps)
            while value_at(y + size * down) > most + 1e-4 * size * slope and size > 1e-3:
                size /= 2
        y = y + size * down
    return y.detach()


def coefficients(x: torch.Tensor) -> torch.Tensor:
    """c (N,) at x, as bilevel.weights.learned defines them; to be differentiated."""
    return torch.sigmoid(x) / torch.sigmoid(x).mean()


def hypergradient(
    problem: Problem, x: torch.Tensor, y: torch.Tensor, q: torch.Tensor, tolerance: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d/dx f(y*(x)) (N,) by the implicit function theorem, y*(x), and q = (d^2 g/dy^2)^-1 df/dy; y, q: where to start.

    d/dx f(y*(x)) = -(d^2 g/dx dy) q = -1/N sum_i (dc_i/dx) (dl_i/dy q)
    """
    x = x.detach().requires_grad_()
    c = coefficients(x)
    y = solve(problem, c.detach(), y, tolerance).requires_grad_()
    _, multiply = curvature(problem.lower(y, c.detach()), y)
    (pull,) = torch.autograd.grad(problem.upper(y), y)
    q = conjugate_gradients(multiply, problem.rough, pull, q, 10 * tolerance)
    _, along = torch.func.jvp(lambda y: problem.losses(y, slice(problem.n)), (y.detach(),), (q,))
    return torch.autograd.grad(-(c * along).mean(), x)[0], y.detach(), q


# ----------------------------------------------------------------------------------------------------------------------
# the project's penalty step


class LinearCopy(TorchCopy):
    """A copy of the linear model, from 0. Each training loss has the L2 term in it, which is the same for all.

    So have, without gradients, the losses of trusted images, which are then compared with training ones.
    """

    def __init__(self, problem: Problem, y: torch.Tensor):
        model = torch.nn.Linear(*y.T.shape, bias=False, dtype=y.dtype)
        model.weight.data.copy_(y)
        super().__init__(model)
        self.problem = problem

    def losses(self, batch: MicroBatch, seed: int, factors: torch.Tensor | None = None) -> torch.Tensor:
        y, ids = self.model.weight, batch.sample_ids
        compared = not torch.is_grad_enabled()
        return self.problem.losses(y, ids) + ((ids < self.problem.n) | compared) * decay(y)


def batch(sample_ids: torch.Tensor) -> Batch:
    """A global batch in one micro-batch. The copies look up the images by their numbers."""
    none, ones = torch.zeros(len(sample_ids), 1, dtype=torch.int64), torch.ones(len(sample_ids), dtype=torch.float64)
    micro = MicroBatch(none, none, sample_ids, torch.arange(len(sample_ids)), ones)
    return Batch(sample_ids, [micro], ones, len(sample_ids))


# ----------------------------------------------------------------------------------------------------------------------
# files


def read_idx(path: Path) -> np.ndarray:
    """The bytes of a compressed IDX file in their shape: the fourth byte has the number of dimensions."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def read_images(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features (n, D) in [0, 1], the last of which is 1, and labels (n,), of the training and of the test images."""
    found = []
    for images, labels in (FILES[:2], FILES[2:]):
        pixels = torch.from_numpy(read_idx(folder / images).copy()).flatten(1).float() / 255
        ones = torch.ones(len(pixels), 1)
        found.append((torch.cat([pixels, ones], 1), torch.from_numpy(read_idx(folder / labels).astype(np.int64))))
    return found


def write_blobs(folder: Path, train: int = 300, test: int = 60, classes: int = 3) -> Path:
    """Small files in the place of Fashion-MNIST's: each class is a pattern of 28 x 28 pixels with noise on it."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    patterns = random.integers(60, 196, (classes, 28, 28))
    for names, n in ((FILES[:2], train), (FILES[2:], test)):
        labels = random.integers(classes, size=n)
        pixels = (patterns[labels] + random.normal(0, 40, (n, 28, 28))).clip(0, 255)
        for name, values in zip(names, (pixels, labels), strict=True):
            start = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (folder / name).write_bytes(gzip.compress(start + values.astype(np.uint8).tobytes()))
    return folder
