"""What a checkpoint costs: how long the step in between waits, how long writing goes on, and bytes against the state's.

    python -m tests.benchmarks.checkpoint [--millions 30] [--repeats 5]

The wait is set against a bare copy of the same tensors to host memory, and the file's size against the tensors'.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import ALONE
from bilevel.run.checkpoint import Checkpoints
from bilevel.run.checkpoint_file import split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=30, help="parameters of the model, about")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    copies = {name: stepped_copy(options.millions) for name in "uw"}
    state = {"step": 1, "copies": {name: copy.state_dict() for name, copy in copies.items()}}
    tensors, _ = split(state)
    size = sum(tensor.nbytes for tensor in tensors.values())
    waits, copying, writing = [], [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoints = Checkpoints(Path(folder), ALONE, {}, {}, keep=1)
        for step in range(options.repeats + 1):
            start = time.perf_counter()
            kept = [tensor.detach().to("cpu", copy=True) for tensor in tensors.values()]
            copied = time.perf_counter()
            del kept
            begin = time.perf_counter()
            checkpoints.begin(step, state)
            begun = time.perf_counter()
            assert checkpoints.finish()
            end = time.perf_counter()
            if step:  # the first touches memory and disk for the first time
                waits.append(begun - begin), copying.append(copied - start), writing.append(end - begin)
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    ratios = [wait / copy for wait, copy in zip(waits, copying, strict=True)]
    print(f"state {size / 1e6:.0f} MB, files {written / size:.4f} of it")
    print(
        f"the step waits {statistics.median(waits):.3f} s, {statistics.median(ratios):.2f} of a bare copy to the host"
    )
    print(f"({min(ratios):.2f} to {max(ratios):.2f}); complete on the disk after {statistics.median(writing):.2f} s")


def stepped_copy(millions: int) -> TorchCopy:
    """A copy of a GPT-2 of about so many parameters, with moments."""
    shape = {
        "vocab_size": 8000,
        "n_embd": 512,
        "n_head": 8,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "n_layer": max(1, round((millions - 4) / 3.15)),
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    copy = TorchCopy(model)
    model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    copy.step(1e-5, 1.0)
    return copy


if __name__ == "__main__":
    main()
