"""What weighted draws save: floating-point operations until the test loss at which a run of uniform draws ends.

    python -m tests.benchmarks.sampling [--corruption words] [--seeds 3] [--out OUT] [--setting value ...]

Each seed trains a model of 0.2M parameters from scratch (configs/tiny.yaml but for SETTINGS) twice on the shipped
records, half of the responses corrupted, per source, with 8 validation samples a step: four passes with
sampling=uniform, 5.4 with sampling=weighted, which computes about half of the samples. Operations are those of all
forward and backward passes but evaluations (bilevel.model.flops); the test loss is w's per token, 20 times a run.
Writes OUT.csv and OUT.png.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import train_bilevel
from bilevel.model.heldout import heldout_loss
from bilevel.run.preflight import check_files
from bilevel.settings.command_line import load_settings

ROOT = Path(__file__).parents[2]
EVALUATIONS = 20
EPOCHS = {"uniform": 4.0, "weighted": 5.4}  # the same loss is sought, not the same number of steps
SETTINGS = {"lr_x": 0.1, "lr_y": 3e-3, "sampling_floor": 0.05, "val_batch_size": 8}
SETTINGS["model_config"] = (
    "{model_type: gpt2, vocab_size: 2048, n_positions: 256, n_embd: 64, n_layer: 2, n_head: 2, "
    "activation_function: gelu_pytorch_tanh}"
)


def train(arguments: list[str]) -> pd.DataFrame:
    """A run's gflop, test_loss and weight of the noisy source, at its evaluations."""
    settings, _ = load_settings(arguments)
    run, _ = train_bilevel.setup(settings, check_files(settings))
    rows = []
    every = max(1, run.steps // EVALUATIONS)
    for step in tqdm(range(1, run.steps + 1), desc=f"{settings.sampling} seed {settings.seed}", leave=False):
        train_bilevel.one_step(run)
        run.step = step
        if step % every == 0 or step == run.steps:
            loss = heldout_loss(run.copies["w"], run.test, settings.micro_batch_tokens)
            noisy = float(run.weights.p[run.train.sources.index("train_noisy")])
            rows.append({"step": step, "gflop": run.all_operations / 1e9, "test_loss": loss, "w_noisy": noisy})
    return pd.DataFrame(rows)


def operations_until(run: pd.DataFrame, loss: float) -> float:
    """GFLOP at which the test loss is reached, linear between evaluations; nan where it never is."""
    below = np.flatnonzero(run["test_loss"] <= loss)
    if not len(below):
        return float("nan")
    last = below[0]
    before, after = run.iloc[max(0, last - 1)], run.iloc[last]
    share = (before["test_loss"] - loss) / (before["test_loss"] - after["test_loss"]) if last else 1.0
    return before["gflop"] + share * (after["gflop"] - before["gflop"])


def draw(runs: pd.DataFrame, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    for (sampling, seed), run in runs.groupby(["sampling", "seed"]):
        color = {"uniform": "tab:gray", "weighted": "tab:blue"}[sampling]
        axes.plot(run["gflop"], run["test_loss"], color=color, label=sampling if seed == 0 else None)
    axes.set(xlabel="operations of training (GFLOP)", ylabel="test loss per token", title="Draws: uniform and weighted")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corruption", default="words")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("tests/benchmarks/results/sampling"))
    mine, settings = parser.parse_known_args()
    train_bilevel.quiet_libraries()
    runs, savings = [], []
    with tempfile.TemporaryDirectory() as folder:
        made = [
            sys.executable,
            ROOT / "data_alpaca_0.5" / "process.py",
            "--corruption",
            mine.corruption,
            "--out",
            folder,
        ]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        common = ["--config", str(ROOT / "configs" / "tiny.yaml")]
        common += [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))] + settings
        common += ["--train_data", f"{folder}/train_*.json", "--val_data", f"{folder}/val.json"]
        common += ["--test_data", f"{folder}/test.json", "--output_dir", f"{folder}/run"]
        for seed in range(mine.seeds):
            ends = {}
            for sampling in ("uniform", "weighted"):
                run = train([*common, "--seed", str(seed), "--sampling", sampling, "--epochs", str(EPOCHS[sampling])])
                runs.append(run.assign(sampling=sampling, seed=seed))
                ends[sampling] = run
                last = run.iloc[-1]
                print(
                    f"seed {seed} {sampling:8} {last['gflop']:8.0f} GFLOP, test loss {last['test_loss']:.4f}, "
                    f"w_noisy {last['w_noisy']:.4f}",
                    flush=True,
                )
            goal = ends["uniform"].iloc[-1]
            savings.append(operations_until(ends["weighted"], goal["test_loss"]) / goal["gflop"])
            print(f"seed {seed} the same test loss with {savings[-1]:.3f} of the operations", flush=True)
    table = pd.concat(runs)
    table.to_csv(mine.out.with_suffix(".csv"), index=False)
    draw(table, mine.out.with_suffix(".png"))
    print(f"weighted / uniform: {np.mean(savings):.3f} ({min(savings):.3f} to {max(savings):.3f})")


if __name__ == "__main__":
    main()
