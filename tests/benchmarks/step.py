"""What a bilevel step costs beside transformers.Trainer's plain fine-tuning step on the same samples.

    python -m tests.benchmarks.step [--models gpt2 llama] [--rounds 6] [--batch 64] [--data DIR] [--out DIR]

DIR: a folder that process.py wrote; without it samples of Alpaca's lengths and random tokens, from
tests.benchmarks.samples. Each round draws --batch (64) training samples for everybody and as many validation samples
for the bilevel steps, and every peer (tests.benchmarks.peers), each in a process of its own, takes one step, in turn;
the first round warms up and is not counted. Ratios are taken within a round. Then each peer, alone, takes a step with
eager attention whose operations are counted and set against the fewest (tests.benchmarks.operations), and two steps in
which the bytes of all tensors alive are counted (bilevel.memory.activations.LiveBytes): gradients, moments,
activations, at their most, above the weights. What kernels allocate inside themselves is not seen. Writes
step_MODEL.csv, a row per peer, and its figure.
"""

import argparse
import dataclasses
import os
import platform
import statistics
from pathlib import Path

import pandas as pd
import torch
import transformers
from matplotlib import pyplot as plt

from bilevel.memory.activations import LiveBytes
from tests.benchmarks.operations import counted, least_pass, sizes
from tests.benchmarks.peers import LISA_LAYERS, PEERS, InTurn, PlainTrainer, Round, Work
from tests.benchmarks.samples import train_and_validation
from train_bilevel import quiet_libraries

SHAPES = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 8192, "n_positions": 512, "n_embd": 192, "n_layer": 4, "n_head": 4},
    "llama": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 9,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    },
}
# All at once: each is a process of its own, and six of this size take more than 24 GiB.
FEWER = {"llama": [name for name in PEERS if "per sample" not in name]}


def make_work(shape: dict, data: Path | None, rounds: int, batch: int) -> Work:
    train, validation = train_and_validation(data, shape)
    generator = torch.Generator().manual_seed(0)
    draws = [
        Round(*(torch.randperm(len(part), generator=generator)[:batch] for part in (train, validation)))
        for _ in range(rounds)
    ]
    return Work(shape, train, validation, draws)


def seconds(work: Work, names: list[str]) -> dict[str, list[float]]:
    """Seconds of each peer's step in each round but the first."""
    peers = {name: InTurn(name, work) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(len(work.rounds)):
        for name, peer in peers.items():
            times[name].append(peer.step())
        last = ", ".join(f"{name} {found[-1]:.2f}" for name, found in times.items())
        print(f"  round {number}: {last} s", flush=True)
    for peer in peers.values():
        peer.pipe.close()
    return {name: found[1:] for name, found in times.items()}


def operations(work: Work, name: str) -> tuple[int, float, float]:
    """Of the first round's step: counted; the fewest for it; those on real tokens that the peer has to compute.

    Trainer is credited with logits at all its real tokens.
    """
    peer = PEERS[name](dataclasses.replace(work, rounds=work.rounds[:1], attention="eager"))
    model = next(iter(peer.models.values()))
    train, validation = (
        sizes(part, ids)
        for part, ids in zip((work.train, work.validation), dataclasses.astuple(work.rounds[0]), strict=True)
    )
    with counted() as counter:
        peer.run(lambda: None)
    if isinstance(peer, PlainTrainer):
        return counter.get_total_flops(), least_pass(model, train), least_pass(model, train, head_everywhere=True)
    trained = LISA_LAYERS if peer.lisa else None
    least = 2 * least_pass(model, train, trained) + least_pass(model, validation, trained)
    return counter.get_total_flops(), least, least


def peak_bytes(work: Work, name: str) -> int:
    """The most bytes of tensors alive above the weights in the first two steps; the second has moments throughout."""
    peer = PEERS[name](dataclasses.replace(work, rounds=work.rounds[:2]))
    with LiveBytes() as live:
        for model in peer.models.values():
            live.ignore(model)
        peer.run(lambda: None)
    return live.peak


def table(name: str, work: Work, names: list[str]) -> list[dict]:
    """A row per peer."""
    model = PEERS["Trainer"](work).models["w"]
    times = seconds(work, names)
    rows = []
    for peer in names:
        found, least, useful = operations(work, peer)
        ratios = [a / b for a, b in zip(times[peer], times["Trainer"], strict=True)]
        rows.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "peer": peer,
                "rounds": len(ratios),
                "seconds": statistics.median(times[peer]),
                "of_trainer": statistics.median(ratios),
                "of_trainer_least": min(ratios),
                "of_trainer_most": max(ratios),
                "gflop": found / 1e9,
                "of_fewest": found / least,
                "useful_gflop_per_second": useful / 1e9 / statistics.median(times[peer]),
                "peak_mb": peak_bytes(work, peer) / 1e6,
            }
        )
    for row in rows:
        row["peak_of_trainer"] = row["peak_mb"] / rows[0]["peak_mb"]
    return rows


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, {cpu}; {versions}"


def markdown(rows: pd.DataFrame) -> str:
    """The table of one model in docs/costs.md."""
    model = f"{rows.model[0]}, {rows.parameters[0] / 1e6:.1f}M"
    lines = [f"| {model} | time, Trainer's = 1 | GFLOP | of the fewest | useful GFLOP/s | peak memory, MB |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows.itertuples():
        spread = f" ({row.of_trainer_least:.2f} to {row.of_trainer_most:.2f})" if row.peer != "Trainer" else ""
        lines.append(
            f"| {row.peer} | {row.of_trainer:.2f}{spread} | {row.gflop:.0f} | {row.of_fewest:.2f} "
            f"| {row.useful_gflop_per_second:.0f} | {row.peak_mb:.0f} |"
        )
    return "\n".join(lines)


def draw(rows: pd.DataFrame, file: Path) -> None:
    """Time, operations and memory of every peer beside Trainer's."""
    kinds = {"of_trainer": "time", "gflop": "operations", "peak_of_trainer": "peak memory"}
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    shown = rows.set_index("peer")[list(kinds)].rename(columns=kinds)
    shown["operations"] /= shown["operations"].iloc[0]
    shown.plot.barh(ax=axis, width=0.75, legend=False, color=["#1b6ca8", "#e08e2b", "#7a9e5a"])
    low, high = rows.of_trainer - rows.of_trainer_least, rows.of_trainer_most - rows.of_trainer
    axis.errorbar(rows.of_trainer, rows.index - 0.25, xerr=[low, high], fmt="none", ecolor="black", capsize=2)
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(title=f"{rows.model[0]}, {rows.parameters[0] / 1e6:.1f}M", xlabel="a step, Trainer's = 1", ylabel="")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help="beside Trainer; all that fit into 24 GiB")
    parser.add_argument("--rounds", type=int, default=6, help="of which the first is not counted")
    parser.add_argument("--batch", type=int, default=64, help="training samples, and validation samples, of a step")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("tests/benchmarks/results"))
    options = parser.parse_args()
    quiet_libraries()
    transformers.logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    print(machine())
    for name in options.models:
        print(name, flush=True)
        peers = options.peers or FEWER.get(name, PEERS)
        names = ["Trainer", *(peer for peer in peers if peer != "Trainer")]
        found = pd.DataFrame(table(name, make_work(SHAPES[name], options.data, options.rounds, options.batch), names))
        file = options.out / f"step_{name}.csv"
        found.assign(machine=machine()).to_csv(file, index=False, float_format="%.4g")
        draw(found, file.with_suffix(".png"))
        print(found.to_string(index=False, float_format=lambda value: f"{value:.3f}"), flush=True)


if __name__ == "__main__":
    main()
