"""What order 2 buys, where the exact hypergradient is known (tests/oracle.py): one CSV and three figures.

    python -m tests.benchmarks.oracle        CPU only; a few minutes

1. oracle_exact.png  error of the x-gradient at the exact w and u, in float64: it falls like nu to the order
2. oracle_fp32.png   error that stochastic steps leave at equal operations: order 2 makes fewer steps, as each has one
                     more pass of the same size
3. oracle_bf16.png   the same with forward and backward passes in bf16
"""

import argparse
import itertools
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from tqdm import tqdm

from bilevel.data.stream import BatchStream
from bilevel.model.torch_copy import TorchCopy
from bilevel.step.f2sa import penalty_step
from example.plot_demo import COLOURS, LOOK
from tests.oracle import (
    TRAIN,
    VALIDATION,
    Logistic,
    Problem,
    Ridge,
    hypergradient,
    make_weights,
    relative_error,
    solve,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

KINDS = ("source", "sigmoid", "softmax")
BATCH = 6
# Of a batch each: training by u, training by w, validation by w, and with order 2 by u. The x-gradient is the mean over
# whole epochs of both kinds of data: 160 and 120 steps.
PASSES = 960
EXACT_NUS = [10 ** (-4 + i / 2) for i in range(7)]
LOOP_NUS = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]


def exact(problem: Problem, kind: str, true: torch.Tensor, nu: float, order: int) -> float:
    """Relative error of the penalty's x-gradient at its exact w and u; true: the exact x-gradient."""
    x = make_weights(kind, nu, order)
    c = x.coefficients(TRAIN)
    u, w = (problem.copy(solve(problem, c, k)) for k in (0 if order == 1 else -nu, nu))
    penalty_step(u, w, x, problem.batch(TRAIN), problem.batch(VALIDATION), nu, lr_y=0, seed=0, order=order)
    return relative_error(x.gradient()[1], true)


def stepped(problem: Problem, dtype: str, nu: float, order: int, seed: int, passes: int) -> float:
    """The same of the mean x-gradient over the second half of SGD with falling steps; x, per source, rests."""
    x = make_weights("source", nu, order)
    true = hypergradient(problem, "source", x.x)
    copies = {}
    for name in "uw":
        copy: TorchCopy = problem.copy(torch.zeros(problem.size, dtype=torch.float64))
        copy.model.float()
        copy.optimizer = torch.optim.SGD(copy.model.parameters())
        copy.bf16 = dtype == "bf16"
        copies[name] = copy
    streams = BatchStream(len(TRAIN), BATCH, 2 * seed), BatchStream(len(VALIDATION), BATCH, 2 * seed + 1)
    steps = passes // (2 + order)
    for step in range(steps):
        if step == steps // 2:
            x.clear()
        train, trusted = (
            problem.batch(part[next(stream)]) for part, stream in zip((TRAIN, VALIDATION), streams, strict=True)
        )
        penalty_step(**copies, weights=x, train=train, validation=trusted, nu=nu, lr_y=3 / (step + 10), seed=0,
                     order=order)  # fmt: skip
    return relative_error(x.gradient()[1], true)


def measure(seeds: range, passes: int) -> pd.DataFrame:
    """A row per error: what, problem, weights, dtype, order, nu, seed of the data and of the batches, error."""
    rows = []
    for make, kind, seed in tqdm(list(itertools.product((Ridge, Logistic), KINDS, seeds)), unit="problem"):
        problem = make(seed)
        true = hypergradient(problem, kind, make_weights(kind, 1.0).x)
        for order, nu in itertools.product((1, 2), EXACT_NUS):
            error = exact(problem, kind, true, nu, order)
            rows.append(("exact", make.__name__.lower(), kind, "fp64", order, nu, seed, error))
    for dtype, seed, order, nu in tqdm(list(itertools.product(("fp32", "bf16"), seeds, (1, 2), LOOP_NUS)), unit="run"):
        error = stepped(Logistic(seed), dtype, nu, order, seed, passes)
        rows.append(("steps", "logistic", "source", dtype, order, nu, seed, error))
    return pd.DataFrame(rows, columns=["what", "problem", "weights", "dtype", "order", "nu", "seed", "error"])


def draw(table: pd.DataFrame, title: str, path: Path) -> None:
    """Median error against nu, a line per order, the band from the least to the largest."""
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for order, rows in table.groupby("order"):
            error, colour = rows.groupby("nu")["error"].agg(["median", "min", "max"]), COLOURS[order - 1]
            axes.plot(error.index, error["median"], color=colour, marker="os"[order - 1], label=f"order {order}")
            axes.fill_between(error.index, error["min"], error["max"], color=colour, alpha=0.15, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel=r"$\nu$ = 1/alpha", ylabel="relative error of the x-gradient")
        axes.set_title(title)
        axes.grid(color="0.88", linewidth=0.8)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=PASSES, help="of a run of steps, over batches")
    parser.add_argument("--out", type=Path, default=Path("tests/benchmarks/results"), help="folder of CSV and figures")
    given = parser.parse_args()
    out = given.out
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    table = measure(range(given.seeds), given.passes)
    table.to_csv(out / "oracle.csv", index=False)
    parts = dict(iter(table.groupby("dtype")))
    draw(parts["fp64"], "Exact copies: the error falls like nu to the order", out / "oracle_exact.png")
    draw(parts["fp32"], "Equal operations in fp32: a small nu costs nothing", out / "oracle_fp32.png")
    draw(parts["bf16"], "Equal operations in bf16: rounding asks for a large nu", out / "oracle_bf16.png")
    print(
        table.groupby(["what", "dtype", "order", "nu"])["error"].median().unstack("nu").to_string(float_format="%.1e")
    )


if __name__ == "__main__":
    main()
