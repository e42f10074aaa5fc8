"""What per-sample weights cost at N = 1e4, 1e6 and 1e8 samples: time of a step's part of it, and bytes.

    python -m tests.benchmarks.state [--sizes 1e4 1e6 1e8] [--steps 200] [--out tests/benchmarks/results]

Every step draws a batch of 64 from the order of the epoch, reads its rows, asks for its coefficients as two passes do,
and steps x (lazy Adam, the normaliser). The sizes take turns step by step. Rows of Alpaca's mean length lie in a table
of one record batch of 1,000 that is there N / 1,000 times, so that they take neither disk nor memory. An evaluation
visits all weights. Writes state.csv and state.png, and prints the table that docs/costs.md shows.
"""

import argparse
import gc
import pickle
import platform
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from bilevel.data.samples import TOKEN_FEATURES, Samples
from bilevel.data.stream import BatchStream
from bilevel.data.tokenise import IGNORE
from bilevel.weights.csv_file import write_weights
from bilevel.weights.learned import SampleWeights
from bilevel.weights.statistics import QUANTILES, histogram, quantiles

BATCH, MEAN_TOKENS, ROWS = 64, 90, 1000  # rows of one record batch, as `datasets` writes them
PARTS = {
    "draw_ms": "draw",
    "rows_ms": "read rows",
    "coefficients_ms": "coefficients",
    "accumulate_ms": "add gaps",
    "x_step_ms": "step x",
}
CSV_SIZE = 10**6  # of the samples whose weights.csv is timed


class State:
    """What a per-sample run over n samples holds beside the model."""

    def __init__(self, n: int):
        before = resident()
        self.samples, self.stream = make_samples(n), BatchStream(n, BATCH, seed=0)
        self.x = SampleWeights(n, None, "sigmoid", 10.0, "adam")
        self.before, self.random = before, torch.Generator().manual_seed(0)

    def step(self) -> list[float]:
        """Milliseconds of each of PARTS."""
        gaps, times = torch.randn(BATCH, generator=self.random), [time.perf_counter()]

        def note() -> None:
            times.append(time.perf_counter())

        ids = next(self.stream)
        note()
        batch = self.samples.batch(ids, 4096)
        note()
        for micro in (*batch.micro_batches, *batch.micro_batches):  # of u and of w
            self.x.coefficients(micro.sample_ids)
        note()
        self.x.accumulate(ids, gaps)
        note()
        self.x.step(0.1)
        note()
        return (np.diff(times) * 1e3).tolist()

    def bytes(self) -> dict[str, float]:
        """Per sample: bytes of x, of its moments and count, and resident ones. In all: bytes of the stream's state."""
        n, adam = self.x.n, self.x.optimizer
        tensors = {"x_bytes": self.x.x, "m_bytes": adam.m, "v_bytes": adam.v, "count_bytes": adam.count}
        for tensor in tensors.values():
            tensor += 0  # so that every page is there
        found = {name: tensor.nbytes / n for name, tensor in tensors.items()}
        return found | {
            "state_bytes": sum(found.values()),
            "resident_bytes": (resident() - self.before) / n,
            "stream_bytes_in_all": len(pickle.dumps(self.stream)),
        }

    def evaluate(self) -> dict[str, float]:
        """Seconds of what an evaluation does with all weights, and MB of memory at its peak above what was there."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now
        before, start = resident(), time.perf_counter()
        self.x.refresh(), quantiles(self.x, QUANTILES), histogram(self.x, self.x.n, 64), self.x.effective_share()
        seconds = time.perf_counter() - start
        return {"evaluation_s": seconds, "evaluation_peak_mb": (resident("VmHWM") - before) / 1e6}

    def write(self) -> float:
        """Seconds for weights.csv."""
        with tempfile.TemporaryDirectory(dir=".") as folder:
            start = time.perf_counter()
            write_weights(Path(folder) / "weights.csv", self.x, self.samples)
            return time.perf_counter() - start


def make_samples(n: int) -> Samples:
    random = np.random.default_rng(0)
    ids = [random.integers(8000, size=size).tolist() for size in random.poisson(MEAN_TOKENS, ROWS)]
    labels = [[IGNORE] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    rows = {"index": range(ROWS), "is_noisy": [None] * ROWS, "input_ids": ids, "labels": labels}
    one = pa.table({key: list(value) for key, value in rows.items()}, schema=TOKEN_FEATURES.arrow_schema)
    table = datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables([one] * (n // ROWS))), fingerprint=f"{n}")
    return Samples([Path("train_mixed.json")], [table], [0])


def resident(line: str = "VmRSS") -> int:
    """Bytes of this process in memory, or at their peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) << 10


def measure(sizes: list[int], steps: int) -> pd.DataFrame:
    """A row per size."""
    states = []
    for n in sizes:
        gc.collect()
        states.append(State(n))
    times = np.array([[state.step() for state in states] for _ in range(steps + 5)])[5:]  # (steps, sizes, parts)
    table = pd.DataFrame(np.median(times, 0), columns=list(PARTS))
    whole = times.sum(2)
    table.insert(0, "n", sizes)
    table["step_ms"] = np.median(whole, 0)
    table["step_quartiles_ms"] = ["{:.2f} to {:.2f}".format(*np.quantile(one, (0.25, 0.75))) for one in whole.T]
    table["more_than_first_ms"] = np.median(whole - whole[:, :1], 0)
    rows = [state.bytes() | state.evaluate() for state in states]
    table = table.join(pd.DataFrame(rows))
    table["weights_csv_s"] = [
        float(np.median([state.write() for _ in range(5)])) if n == CSV_SIZE else None
        for n, state in zip(sizes, states, strict=True)
    ]
    return table


def machine() -> str:
    """What the numbers are of."""
    cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].strip("\t: ")
    libraries = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, np, datasets, pa, pd))
    threads = f"{torch.get_num_threads()} threads"
    return f"{cpu}, {threads}; Python {platform.python_version()}, {libraries}; {time.strftime('%Y-%m-%d')}"


def draw(table: pd.DataFrame, path: Path) -> None:
    """Time by part of the step, and bytes, for each size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places, bottom = np.arange(len(table)), np.zeros(len(table))
    for name, label in PARTS.items():
        left.bar(places, table[name], 0.6, bottom, label=label)
        bottom += table[name]
    left.set(ylabel="ms of a step, median", title=f"Per-sample work of a step, batch {BATCH}")
    left.set_ylim(0, 1.4 * bottom.max())
    bottom = np.zeros(len(table))
    for name in ("x", "m", "v", "count"):
        right.bar(places, table[f"{name}_bytes"], 0.6, bottom, label=name)
        bottom += table[f"{name}_bytes"]
    right.set(ylabel="bytes per sample", title="Memory of x and its optimizer", ylim=(0, 1.4 * 16))
    right.set_yticks(range(0, 21, 4))
    for axis in (left, right):
        axis.legend(loc="upper center", ncols=3)
    for axis in (left, right):
        axis.set_xticks(places, [f"N = {n:.0e}".replace("e+0", "e") for n in table["n"]])
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)


def markdown(table: pd.DataFrame) -> str:
    """The table of docs/costs.md."""
    lines = ["| N | a step | more than at the first N | bytes per sample | evaluation | weights.csv |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in table.itertuples():
        csv = f"{row.weights_csv_s:.1f} s" if row.weights_csv_s > 0 else ""
        n = f"{row.n:.0e}".replace("e+0", "e")
        lines.append(
            f"| {n} | {row.step_ms:.2f} ms ({row.step_quartiles_ms}) | {row.more_than_first_ms:.2f} ms | "
            f"{row.state_bytes:.0f} | {row.evaluation_s:.3g} s, {row.evaluation_peak_mb:.0f} MB | {csv} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e4, 1e6, 1e8], help="multiples of 1,000")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("tests/benchmarks/results"))
    options = parser.parse_args()
    table = measure([int(n) for n in options.sizes], options.steps).assign(machine=machine())
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "state.csv", index=False)
    draw(table, options.out / "state.png")
    print(table.drop(columns="machine").T.to_string(float_format="{:.4g}".format))
    print(markdown(table) + "\n\n" + table["machine"][0])


if __name__ == "__main__":
    main()
