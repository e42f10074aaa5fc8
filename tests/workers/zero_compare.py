"""Twelve steps that cross three intervals of LISA, under ZeRO and under plain torch."""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from zero_common import (
    SHARES,
    TRAIN,
    VALIDATION,
    budget,
    distance,
    equal_on_all_ranks,
    flat,
    make_model,
    penalty_steps,
    settings,
    whole_state,
    zero_copy,
)

from bilevel.model.base_copy import ModelCopy
from bilevel.model.heldout import heldout_loss
from bilevel.model.lisa import Lisa
from bilevel.model.packing import check_rows_stay_apart, use_packed_rows
from bilevel.model.torch_copy import TorchCopy
from bilevel.model.zero_copy import ZeroCopy
from bilevel.processes import ALONE, World
from bilevel.settings.deepspeed import CONFIGS
from bilevel.weights.learned import SampleWeights, SourceWeights

NU = 4.0  # large, so that the gaps stand far above the rounding of the losses they are differences of
INTERVAL, STEPS = 4, 12
CLIP = 0.5  # below the norm of every gradient


@dataclasses.dataclass
class Result:
    """What twelve steps leave."""

    copies: dict[str, ModelCopy]
    x: torch.Tensor
    trusted: torch.Tensor  # gaps of validation samples that others are compared with; empty per source
    losses: list[list[float]]  # per step of u, of w, on validation, and two gradient norms
    heldout: float
    intervals: list[dict[str, Any]]  # of LISA
    seconds: float


def train(make_copy: Callable[..., ModelCopy], world: World, case: dict[str, Any]) -> Result:
    start = time.perf_counter()
    models = {name: make_model(checkpointing=case["checkpointing"]) for name in "uw"}
    lisa = WatchedLisa(models, case["lisa"] == "shared") if case["lisa"] else None
    copies = {
        name: make_copy(model, active=lisa.active(name) if lisa else None, clip_grad_norm=case["clip"])
        for name, model in models.items()
    }
    if case["packed"]:
        for each in copies.values():
            use_packed_rows(each, settings())
        check_rows_stay_apart(copies["w"])
    if case["weights"] == "sample":
        x = SampleWeights(len(TRAIN), None, "sigmoid", 1 / NU, "adam")
    else:
        x = SourceWeights(TRAIN.source_ids, SHARES, 1 / NU, "adam")
    losses = [
        [result.loss_u, result.loss_w, result.val_loss, result.grad_norm_u, result.grad_norm_w]
        for result in penalty_steps(
            *(copies, x, world, STEPS),
            lr_y=1e-4,
            nu=NU,
            upper_every=3,
            lisa=lisa,
            order=case["order"],
            packed=case["packed"],
        )
    ]
    if lisa:
        lisa.end(copies["w"])
    heldout = heldout_loss(copies["w"], VALIDATION, budget(world))
    intervals = lisa.intervals if lisa else []
    trusted = x.records.trusted.double() if x.per_sample else torch.zeros(0)
    return Result(copies, x.x.double(), trusted, losses, heldout, intervals, time.perf_counter() - start)


class WatchedLisa(Lisa):
    """LISA that notes what each interval does to w: which parameters move, how many numbers have a moment."""

    def __init__(self, models: dict[str, torch.nn.Module], shared: bool):
        super().__init__(settings(lisa_layers=1, lisa_interval=INTERVAL, lisa_shared_draw=shared), models)
        self.intervals = []
        self.names = {id(p): name for name, p in models["w"].named_parameters()}  # without those of tied heads
        self.sizes = {name: p.numel() for name, p in models["w"].named_parameters()}

    def switch(self, step: int, copies: dict[str, ModelCopy]) -> None:
        if step % INTERVAL:
            return
        if step:
            self.end(copies["w"])
        self.start = whole_state(copies["w"])
        super().switch(step, copies)
        self.carried = moments(copies["w"])

    def end(self, copy: ModelCopy) -> None:
        """The interval is over."""
        always, (drawn,) = self.active("w")
        always = [self.names[id(p)] for p in always]
        active = always + [self.names[id(p)] for p in drawn]
        end = whole_state(copy)
        self.intervals.append(
            {
                "drawn": dict(self.drawn),
                "moved": [name for name in self.sizes if end and not torch.equal(end[name], self.start[name])],
                "active": [name for name in self.sizes if name in active],
                "moments": moments(copy),
                "active_size": sum(self.sizes[name] for name in active),
                "carried": self.carried,
                "always_size": sum(self.sizes[name] for name in always),
            }
        )


def moments(copy: ModelCopy) -> int:
    """Numbers in the first moments that the optimizer holds, summed over ranks."""
    optimizer = copy._inner() if isinstance(copy, ZeroCopy) else copy.optimizer
    mine = sum(state["exp_avg"].numel() for state in optimizer.state.values() if "exp_avg" in state)
    return int(copy.world.sum(torch.tensor(mine)))


def cases(folder: Path, processes: int) -> Iterator[dict[str, Any]]:
    """Every stage, full and LISA; one process offloads too, two draw u and w apart too.

    Two processes take both kinds of weights with each; one and four take one kind, so that every two of stage, LISA,
    kind and recomputing meet. Two processes follow order 2 as well, in which the last gradient of u is another. Several
    have packed rows, too.
    """
    for lisa, weights, stage in itertools.product((None, "shared"), ("source", "sample"), range(4)):
        # Under each stage, full and LISA, one of the two kinds of weights recomputes activations.
        recompute = (stage + (weights == "sample")) % 2 == 1
        if processes != 2:
            if (weights == "sample") != (bool(lisa) != (stage >= 2)):
                continue
            recompute = bool(lisa) != (stage % 2 == 1)
        yield {"lisa": lisa, "weights": weights, "stage": stage, "file": None, "checkpointing": recompute}
    if processes == 1:
        zero2 = folder / "zero2_offload.json"
        zero2.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
        files = ((2, zero2), (3, CONFIGS / "zero3_offload.json"))
        for lisa, (stage, file) in itertools.product((None, "shared"), files):
            yield {"lisa": lisa, "weights": "source", "stage": stage, "file": str(file), "checkpointing": False}
    if processes == 2:
        yield {"lisa": "independent", "weights": "source", "stage": 2, "file": None, "checkpointing": False}
        for stage, lisa in ((2, None), (3, "shared")):
            yield {"lisa": lisa, "weights": "source", "stage": stage, "file": None, "checkpointing": False, "order": 2}
    if processes > 1:
        for stage, lisa in ((2, None), (3, None), (3, "shared")):
            case = {"lisa": lisa, "weights": "source", "stage": stage, "file": None, "checkpointing": stage == 3}
            yield case | {"packed": True}


def compare(world: World, folder: Path) -> list[dict[str, Any]]:
    """All cases against one process of plain torch, whose runs come first: ZeRO-3 replaces torch's linear function."""
    todo = [
        {"order": 1, "packed": False, "clip": CLIP if case["weights"] == "sample" else None} | case
        for case in cases(folder, world.size)
    ]
    plain = {}
    for case in todo:
        kind = case["lisa"], case["weights"], case["order"]
        if world.main and kind not in plain:
            run = train(TorchCopy, ALONE, case | {"checkpointing": False, "packed": False})
            plain[kind] = run, {name: flat(whole_state(c)) for name, c in run.copies.items()}
    start = flat(whole_state(TorchCopy(make_model())))
    report = []
    for case in todo:
        layout = {"deepspeed": case["file"]} if case["file"] else {"zero_stage": case["stage"]}
        mine = train(functools.partial(zero_copy, world, **layout), world, case)
        agree = equal_on_all_ranks(world, (mine.x.tolist(), mine.trusted.tolist(), mine.losses, mine.heldout))
        states = {name: whole_state(copy) for name, copy in mine.copies.items()}
        if world.main:
            run, ends = plain[case["lisa"], case["weights"], case["order"]]
            found = {"ranks_agree": agree} | differences(mine, run)
            for name, state in states.items():
                found[f"relative_{name}"] = distance(flat(state), ends[name])
                found[f"of_displacement_{name}"] = distance(flat(state), ends[name], start)
            report.append(case | found)
    return report


def differences(mine: Result, plain: Result) -> dict[str, Any]:
    """Relative, the worst of all steps."""
    a, b = torch.tensor(mine.losses).double(), torch.tensor(plain.losses).double()
    return {
        "losses": float(((a - b).abs() / b.abs())[:, :3].max()),
        "norms": float(((a - b).abs() / b.abs())[:, 3:].max()),
        "x": distance(mine.x, plain.x),
        "trusted": distance(mine.trusted, plain.trusted) if len(plain.trusted) else None,
        "x_moved": float((plain.x - plain.x.mean()).norm()),
        "heldout": abs(mine.heldout / plain.heldout - 1),
        "least_norm": float(b[:, 3:].min()),
        "intervals": mine.intervals,
        "seconds": mine.seconds,
        "plain_seconds": plain.seconds,
    }
