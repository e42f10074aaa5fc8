"""Bilevel problems small enough to be solved exactly: ridge and multinomial logistic regression, in float64.

    g(x, y) = 1/N sum_i c_i(x) l_i(y),   f(y) = mean of l over validation,   l_i has DECAY/2 |y|^2 in it

Each is written twice: in plain torch on flat parameters y (D,), for Newton's method and the implicit hypergradient

    y*(x) = argmin_y g(x, y),   d/dx f(y*(x)) = -(d^2 g/dx dy) (d^2 g/dy^2)^-1 df/dy,

and as copies and batches of the project, whose penalty step must come to the same.
"""

import types
from abc import ABC, abstractmethod

import torch

from bilevel.data.batches import Batch, MicroBatch
from bilevel.data.tokenise import IGNORE
from bilevel.model.torch_copy import TorchCopy
from bilevel.weights.learned import SampleWeights, SourceWeights

SOURCE_IDS = torch.arange(3).repeat_interleave(torch.tensor([12, 8, 10]))  # (N,) of the training samples
TRAIN, VALIDATION = torch.arange(30), torch.arange(30, 46)  # numbers of samples
NOISE = torch.cat([torch.tensor([0.0, 0.5, 1.0])[SOURCE_IDS], torch.zeros(len(VALIDATION))])  # share of each sample's
DECAY = 0.5
FEATURES, CLASSES = 5, 7


def ones(sample_ids: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(sample_ids), dtype=torch.float64)


class Problem(ABC):
    """l_i of all samples, training first, in plain torch and as the project computes them."""

    size: int  # D, number of parameters

    @abstractmethod
    def losses(self, y: torch.Tensor) -> torch.Tensor:
        """l_i(y) of all samples, (N + V,)."""

    @abstractmethod
    def copy(self, y: torch.Tensor) -> TorchCopy:
        """A model copy whose parameters are y."""

    @abstractmethod
    def rows(self, sample_ids: torch.Tensor) -> MicroBatch:
        """The samples as rows of one micro-batch, places counted from 0."""

    def batch(self, sample_ids: torch.Tensor, size: int = 9) -> Batch:
        """A global batch in micro-batches of `size` rows."""
        micro_batches = []
        for places in torch.arange(len(sample_ids)).split(size):
            micro = self.rows(sample_ids[places])
            micro.places += places[0]
            micro_batches.append(micro)
        return Batch(sample_ids, micro_batches, ones(sample_ids), len(sample_ids))


class Ridge(Problem):
    """l_i = (a_i y - b_i)^2 / 2 + DECAY/2 |y|^2."""

    size = FEATURES

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        draw = {"generator": generator, "dtype": torch.float64}
        self.a = torch.randn(len(NOISE), FEATURES, **draw)
        truth = self.a @ torch.randn(FEATURES, **draw)
        self.b = (1 - NOISE) * truth + NOISE * torch.randn(len(NOISE), **draw)

    def losses(self, y: torch.Tensor) -> torch.Tensor:
        return (self.a @ y - self.b).square() / 2 + DECAY / 2 * y.square().sum()

    def copy(self, y: torch.Tensor) -> TorchCopy:
        model = torch.nn.Linear(FEATURES, 1, bias=False, dtype=torch.float64)
        model.weight.data.copy_(y[None])
        copy = TorchCopy(model)
        copy.losses = lambda micro, *_: self.losses(model.weight[0])[micro.sample_ids]  # this model has no tokens
        return copy

    def rows(self, sample_ids: torch.Tensor) -> MicroBatch:
        none = torch.zeros(len(sample_ids), 1, dtype=torch.int64)
        return MicroBatch(none, none, sample_ids, torch.arange(len(sample_ids)), ones(sample_ids))


class TableModel(torch.nn.Module):
    """A language model whose hidden states are a fixed table's, and whose head alone is trained."""

    def __init__(self, table: torch.Tensor, y: torch.Tensor):
        super().__init__()
        self.register_buffer("table", table)
        self.head = torch.nn.Linear(FEATURES, CLASSES, bias=False, dtype=torch.float64)
        self.head.weight.data.copy_(y.view(CLASSES, FEATURES))

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=self.head(self.table[input_ids]))


class DecayedCopy(TorchCopy):
    """The project's token losses, and in each sample's the L2 term."""

    def losses(self, *rows) -> torch.Tensor:
        return super().losses(*rows) + DECAY / 2 * self.model.head.weight.square().sum()


class Logistic(Problem):
    """l_i = mean cross-entropy of softmax(Y h) over the supervised tokens of sample i, + DECAY/2 |Y|^2, y = Y flat.

    Rows of 3 to 8 tokens, of which the last 2 to 4 are supervised; h is the features of the token before.
    """

    size = CLASSES * FEATURES

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        draw = {"generator": generator, "dtype": torch.float64}
        self.table = torch.randn(CLASSES, FEATURES, **draw)
        truth = torch.softmax(3 * torch.randn(CLASSES, FEATURES, **draw) @ self.table.T, dim=0).T  # of the next token
        length = torch.randint(3, 9, (len(NOISE),), generator=generator)
        self.tokens = torch.zeros(len(NOISE), 9, dtype=torch.int64)
        self.tokens[:, 0] = torch.randint(CLASSES, (len(NOISE),), generator=generator)
        for place in range(8):
            chances = truth[self.tokens[:, place]] * (1 - NOISE[:, None]) + NOISE[:, None] / CLASSES
            self.tokens[:, place + 1] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        place = torch.arange(8)
        self.supervised = (place >= (length[:, None] - 1) // 2) & (place < length[:, None])

    def losses(self, y: torch.Tensor) -> torch.Tensor:
        logits = self.table[self.tokens[:, :-1]] @ y.view(CLASSES, FEATURES).T
        token_losses = logits.logsumexp(2) - logits.gather(2, self.tokens[:, 1:, None])[..., 0]
        sums = (token_losses * self.supervised).sum(1)
        return sums / self.supervised.sum(1) + DECAY / 2 * y.square().sum()

    def copy(self, y: torch.Tensor) -> TorchCopy:
        return DecayedCopy(TableModel(self.table, y))

    def rows(self, sample_ids: torch.Tensor) -> MicroBatch:
        targets = self.tokens[sample_ids, 1:].where(self.supervised[sample_ids], IGNORE)
        width = int(self.supervised[sample_ids].any(0).nonzero().max()) + 1
        places = torch.arange(len(sample_ids))
        return MicroBatch(self.tokens[sample_ids, :width], targets[:, :width], sample_ids, places, ones(sample_ids))


# ----------------------------------------------------------------------------------------------------------------------
# weights


def make_weights(kind: str, nu: float, order: int = 1) -> SourceWeights | SampleWeights:
    """The project's weights of a kind (source, sigmoid, softmax) at a point where they differ."""
    factor = 1 / nu / order
    if kind == "source":
        return SourceWeights(SOURCE_IDS, torch.tensor([0.2, 0.3, 0.5]), factor, "sgd")
    weights = SampleWeights(len(TRAIN), None, kind, factor, "sgd")
    weights.x += torch.randn(len(TRAIN), generator=torch.Generator().manual_seed(1))
    weights.refresh()
    return weights


def coefficients(kind: str, x: torch.Tensor) -> torch.Tensor:
    """c (N,) at x, as the design defines them; to be differentiated."""
    if kind == "source":
        return (len(TRAIN) * torch.softmax(x, 0) / SOURCE_IDS.bincount())[SOURCE_IDS]
    return torch.sigmoid(x) / torch.sigmoid(x).mean() if kind == "sigmoid" else len(TRAIN) * torch.softmax(x, 0)


# ----------------------------------------------------------------------------------------------------------------------
# exact solutions


def solve(problem: Problem, c: torch.Tensor, nu: float = 0.0) -> torch.Tensor:
    """argmin over y of g + nu f at coefficients c, by Newton's method, to rounding."""

    def objective(y: torch.Tensor) -> torch.Tensor:
        losses = problem.losses(y)
        return (c * losses[TRAIN]).mean() + nu * losses[VALIDATION].mean()

    y = torch.zeros(problem.size, dtype=torch.float64)
    for _ in range(50):
        gradient = torch.func.grad(objective)(y)
        if gradient.norm() < 1e-14:
            break
        y = y - torch.linalg.solve(torch.func.hessian(objective)(y), gradient)
    assert gradient.norm() < 1e-13, gradient.norm()
    return y


def upper(problem: Problem, kind: str, x: torch.Tensor) -> torch.Tensor:
    """f(y*(x)), a scalar."""
    return problem.losses(solve(problem, coefficients(kind, x)))[VALIDATION].mean()


def hypergradient(problem: Problem, kind: str, x: torch.Tensor) -> torch.Tensor:
    """d/dx f(y*(x)), by the implicit function theorem, with an exact solve with the Hessian."""
    x = x.double().clone().requires_grad_()
    c = coefficients(kind, x)
    y = solve(problem, c.detach())
    hessian = torch.func.hessian(lambda y: (c.detach() * problem.losses(y)[TRAIN]).mean())(y)
    down = torch.linalg.solve(hessian, torch.func.grad(lambda y: problem.losses(y)[VALIDATION].mean())(y))
    _, along = torch.func.jvp(problem.losses, (y,), (down,))  # dl_i/dy H^-1 df/dy
    return torch.autograd.grad(-(c * along[TRAIN]).mean(), x)[0]


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm())
