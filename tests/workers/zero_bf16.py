"""bf16 under ZeRO: fp32 masters that go where fp32 goes, and gaps that tell what fp32's tell."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run_helpers import make_data
from tokenizer_kinds import tokenizer_of
from zero_common import (
    SHARES,
    TRAIN,
    budget,
    distance,
    equal_on_all_ranks,
    make_model,
    penalty_steps,
    settings,
    zero_copy,
)

from bilevel.data.batches import Batch
from bilevel.data.samples import Samples, load_samples
from bilevel.data.sources import file_source
from bilevel.data.tokenise import Tokeniser
from bilevel.model.base_copy import ModelCopy
from bilevel.model.lisa import Lisa
from bilevel.model.torch_copy import TorchCopy
from bilevel.model.zero_copy import ZeroCopy
from bilevel.monitor.rounding_guard import gap_signal, rounding_noise
from bilevel.processes import ALONE, World
from bilevel.weights.learned import SourceWeights

RUNS = ((0, "device"), (1, "device"), (2, "device"), (2, "host"), (2, "off"), (3, "device"))
NU = 1.0  # at 0.1 the first steps of x, when w and u are five steps apart, feel rounding
REGIONS = ((1e-5, 10, 100), (1e-4, 10, 30), (1e-7, 100, 20))  # lr_y, alpha, steps: two safe, one hopeless
WHOLE = 4096  # tokens: one micro-batch for a batch


def start_model() -> torch.nn.Module:
    """fp32 weights that bf16 can hold, so that all copies start alike."""
    return make_model().bfloat16().float()


def masters(trained: ModelCopy) -> torch.Tensor:
    """The fp32 weights that the optimizer steps, all in the order of the model's parameters; in one process."""
    if isinstance(trained, TorchCopy):
        return torch.cat([p.detach().flatten() for p in trained.model.parameters()])
    sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in trained.module.parameters()}
    found = {}
    for ids, partition in trained._partitions():
        pieces = partition.detach()[: sum(sizes[i] for i in ids)] if partition.dim() == 1 else partition.detach()
        found |= zip(ids, pieces.flatten().split([sizes[i] for i in ids]), strict=True)
    return torch.cat([found[i] for i in sizes])


def train(make_copy: Callable[..., ModelCopy]) -> dict[str, torch.Tensor]:
    """60 steps that cross three intervals of LISA: w's masters at the end, x after 50 steps."""
    models = {name: start_model() for name in "uw"}
    lisa = Lisa(settings(lisa_layers=1, lisa_interval=20), models)
    copies = {name: make_copy(model, active=lisa.active(name)) for name, model in models.items()}
    x = SourceWeights(TRAIN.source_ids, SHARES, 1 / NU, "adam")
    halfway = None
    steps = penalty_steps(copies, x, ALONE, 60, lr_y=1e-5, nu=NU, upper_every=5, lisa=lisa, tokens=WHOLE)
    for step, _ in enumerate(steps):
        if step == 49:
            halfway = x.x.clone()
    layers = lisa.layers["w"]
    copies["w"].activate(layers.rest, layers.blocks)  # the resting block's masters as well
    return {"w": masters(copies["w"]).double(), "x": halfway}


def bf16(world: World, folder: Path) -> list[dict[str, Any]]:
    """LISA in bf16 under every stage against fp32 under plain torch, from the same start; in one process."""
    start = masters(TorchCopy(start_model())).double()
    plain = train(TorchCopy)
    way = plain["w"] - start
    report, ends = [], {}
    for stage, residual in RUNS:
        began = time.perf_counter()
        found = train(functools.partial(zero_copy, world, dtype="bf16", residual=residual, zero_stage=stage))
        mine, ends[stage, residual] = found["w"] - start, found["w"]
        report.append(
            {
                "stage": stage,
                "residual": residual,
                "ratio": float(mine.norm() / way.norm()),
                "cosine": float(torch.nn.functional.cosine_similarity(mine, way, dim=0)),
                "x": distance(found["x"], plain["x"], SHARES.double().log()),
                "as_device": torch.equal(ends[stage, residual], ends[stage, "device"]),
                "seconds": time.perf_counter() - began,
            }
        )
    return report


def signal(world: World, folder: Path) -> list[dict[str, Any]]:
    """What is left of the gaps in bf16 under ZeRO-2, against fp32 models of the same masters; in one process."""
    samples = shipped_samples(folder)
    batch = samples[0].batch(samples[0].all_ids, WHOLE, ALONE)
    report = []
    for lr_y, alpha, steps in REGIONS:
        copies = {name: zero_copy(world, narrow_model(), dtype="bf16", zero_stage=2) for name in "uw"}
        x = SourceWeights(samples[0].source_ids, torch.tensor([0.5, 0.5]), alpha, "adam")
        for _ in penalty_steps(
            copies, x, world, steps, lr_y, 1 / alpha, upper_every=steps + 1, tokens=WHOLE, samples=samples
        ):
            pass
        found, exact = gaps(copies, batch), gaps({name: exact_copy(copy) for name, copy in copies.items()}, batch)
        report.append(
            {
                "lr_y": lr_y,
                "correlation": float(torch.corrcoef(torch.stack([found, exact]))[0, 1]),
                "signal": gap_signal(found, rounding_noise(copies["u"], batch, 0)),
            }
        )
    return report


def shipped_samples(folder: Path) -> tuple[Samples, Samples]:
    """Training and validation samples of a slice of the shipped data."""
    data, tokeniser = make_data(folder / "data"), Tokeniser(tokenizer_of("gpt2"), 100, "response")
    files = sorted(data.glob("train_*.json")), [data / "val.json"]
    return tuple(load_samples(list(map(file_source, paths)), tokeniser) for paths in files)


def narrow_model() -> torch.nn.Module:
    return make_model("gpt2", vocab_size=512, hidden_size=64, max_position_embeddings=128)


def exact_copy(trained: ZeroCopy) -> TorchCopy:
    """An fp32 model of the masters."""
    model = narrow_model()
    torch.nn.utils.vector_to_parameters(masters(trained), model.parameters())
    return TorchCopy(model)


@torch.no_grad()
def gaps(copies: dict[str, ModelCopy], batch: Batch) -> torch.Tensor:
    """l_i(w) - l_i(u) of the batch, (|B|,) float64."""
    losses = {
        name: batch.collect([copy.losses(micro, 0) for micro in batch.micro_batches], copy.world)
        for name, copy in copies.items()
    }
    return (losses["w"] - losses["u"]).double()


def noise(world: World, folder: Path) -> list[dict[str, Any]]:
    """Samples of rounding's noise in several processes."""
    report = []
    for stage in (2, 3):
        measured = zero_copy(world, start_model(), dtype="bf16", zero_stage=stage)
        found = rounding_noise(measured, TRAIN.batch(TRAIN.all_ids, budget(world), world), 0).tolist()
        report.append({"stage": stage, "ranks_agree": equal_on_all_ranks(world, found), "noise": found})
    return report
