"""How often the host waits for the GPU in one step, and which kernels compute attention. Needs a GPU."""

import collections
import traceback
import warnings

import torch
from gpu import work
from gpu.rows import Rows

from bilevel.processes import World
from bilevel.step.f2sa import penalty_step
from bilevel.weights.learned import SourceWeights


def check(device: str, rows: Rows) -> None:
    u, w = work.copies(work.model("llama"), device, bf16=True)
    data, world = work.Data(128, u.shape.vocab_size), World()
    weights = SourceWeights(data.source_ids, torch.tensor([0.5, 0.5]), 10.0, "adam")

    def step(number: int) -> int:
        train, validation = (data.batch(torch.arange(start, start + 32), 2048, world) for start in (0, 32))
        penalty_step(u, w, weights, train, validation, 0.1, 1e-4, number)
        return 2 * len(train.micro_batches) + len(validation.micro_batches)

    for number in range(3):
        step(number)
    places, passes = waits(lambda: step(3))
    rows.add("waits of one step", sum(places.values()), "at most 3 are wanted")
    rows.add("passes of one step", passes)
    for place, count in places.most_common(12):
        rows.add(f"waits at {place}", count)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(4)
    names = {event.key for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA}
    attention = sorted(
        name[:100] for name in names if any(part in name.lower() for part in ("flash", "fmha", "attention"))
    )
    rows.add("kernels of attention", "; ".join(attention) or "none by that name")


def waits(action) -> tuple[collections.Counter, int]:
    """The places in this project (or below it) at which the host waited, and what the action returned."""
    places: collections.Counter = collections.Counter()

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        frames = [f for f in traceback.extract_stack() if "/bilevel/" in f.filename]
        where = frames[-1] if frames else traceback.extract_stack()[-2]
        places[f"{'/'.join(where.filename.split('/')[-2:])}:{where.lineno}"] += 1

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            found = action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return places, found
