"""The processes of test_zero.py: `torchrun zero_worker.py FOLDER TASK...`; rank 0 writes FOLDER/TASK.json.

Nothing is asserted here: a task measures, the test judges.
"""

import copy
import ctypes
import dataclasses
import functools
import gc
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import psutil
import torch
import transformers
from deepspeed.runtime.engine import DeepSpeedEngine
from tokenizers import Tokenizer, models
from torch import distributed

from bilevel.backend import Active, ModelCopy, TorchCopy
from bilevel.config import Settings
from bilevel.data import TOKEN_FEATURES, BatchStream, Samples
from bilevel.evaluate import heldout_loss
from bilevel.f2sa import NonFiniteLoss, penalty_step
from bilevel.lisa import Layers, Lisa
from bilevel.model import load_model, set_dropout
from bilevel.tokenise import IGNORE
from bilevel.weights import SampleWeights, SourceWeights
from bilevel.world import ALONE, World
from bilevel.zero import ZeroCopy, start_world
from bilevel.zero_config import zero_config

NU = 4.0  # large, so that the gaps stand far above the rounding of the losses they are differences of
VOCABULARY, UNUSED = 50, 49  # no sample holds the last token
BLOCKS = 2
BUDGET = 64  # padded tokens of the micro-batches of all ranks: two or three of them per batch
INTERVAL, STEPS = 4, 12
CLIP = 0.5  # below the norm of every gradient
SEED = 0  # LISA draws one block, the other, and the first again


WORDS = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
TOKENIZER = transformers.PreTrainedTokenizerFast(tokenizer_object=WORDS, eos_token="0")
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,  # much narrower, and the gaps are small beside the rounding of the losses
    "intermediate_size": 256,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def settings(**changes: Any) -> Settings:
    data = {"train_data": ["a"], "val_data": ["b"], "model_config": {"model_type": "gpt2"} | SHAPE}
    return Settings(**data | {"backend": "deepspeed", "seed": SEED, "lisa_interval": INTERVAL} | changes)


def make_model(
    family: str = "llama", tied: bool = True, checkpointing: bool = False, **changes: Any
) -> torch.nn.Module:
    """Equal on every rank, without dropout. Llama has no biases, such as GPT-2's of keys, whose true gradient is 0."""
    config = transformers.AutoConfig.for_model(family, tie_word_embeddings=tied, **SHAPE | changes)
    set_dropout(config, 0.0)
    return load_model(settings(gradient_checkpointing=checkpointing), config, TOKENIZER)


def make_samples(sizes: tuple[int, ...], seed: int) -> Samples:
    """Rows of 5 to 12 tokens, the second half of each supervised."""
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for size in sizes:
        rows = []
        for index in range(size):
            length = int(torch.randint(5, 13, (), generator=generator))
            ids = torch.randint(UNUSED, (length,), generator=generator).tolist()
            labels = [IGNORE] * (length // 2) + ids[length // 2 :]
            rows.append({"index": index, "is_noisy": None, "input_ids": ids, "labels": labels})
        tables.append(datasets.Dataset.from_list(rows, features=TOKEN_FEATURES))
    return Samples([Path(f"source{i}.json") for i in range(len(sizes))], tables, [0] * len(sizes))


# Per sample, Adam turns the rounding of a centred gap near 0 into 1e-4 of x; in these samples none comes near.
TRAIN, VALIDATION = make_samples((7, 11, 6), 1), make_samples((13,), 1)


def budget(world: World) -> int:
    return BUDGET // world.size


def zero_copy(
    world: World, stage: int, model: torch.nn.Module, active: Active | None = None, clip: float | None = None
) -> ZeroCopy:
    """A copy under ZeRO; at stage 3 its matrices are partitioned and its vectors are not, as in a large model."""
    config = zero_config(settings(zero_stage=stage, clip_grad_norm=clip), "fp32")
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 500
    return ZeroCopy(model, world, config, active=active)


def torch_copy(model: torch.nn.Module, active: Active | None = None, clip: float | None = None) -> TorchCopy:
    return TorchCopy(model, clip_grad_norm=clip, active=active)


def whole_state(copy: ModelCopy) -> dict[str, torch.Tensor]:
    """Parameters by name on rank 0 under ZeRO, in the one process under plain torch."""
    state = copy.state_dict() if isinstance(copy, ZeroCopy) else copy.model.state_dict()
    return {name: value.detach().clone() for name, value in state.items()}


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values()]).double()


# ----------------------------------------------------------------------------------------------------------------------
# twelve steps, under ZeRO and under plain torch


@dataclasses.dataclass
class Result:
    """What twelve steps leave."""

    copies: dict[str, ModelCopy]
    x: torch.Tensor
    losses: list[list[float]]  # per step of u, of w, on validation, and two gradient norms
    heldout: float
    intervals: list[dict[str, Any]]  # of LISA
    seconds: float


def train(make_copy: Callable[..., ModelCopy], world: World, case: dict[str, Any]) -> Result:
    """Twelve steps that cross three intervals of LISA."""
    start = time.perf_counter()
    built = {name: make_model(checkpointing=case["checkpointing"]) for name in "uw"}
    lisa = Lisa(settings(lisa_layers=1), built) if case["lisa"] else None
    watch = Watch(lisa, built["w"]) if lisa else None
    active = {name: lisa.active(name) if lisa else None for name in built}
    copies = {name: make_copy(model, active=active[name], clip=case["clip"]) for name, model in built.items()}
    if case["weights"] == "sample":
        x = SampleWeights(len(TRAIN), None, "sigmoid", 1 / NU, "adam")
    else:
        x = SourceWeights(TRAIN.source_ids, torch.tensor([0.2, 0.3, 0.5]), 1 / NU, "adam")
    # 10 is no multiple of 4 and 7 none of 2, so that rows which only fill up a share occur.
    training, validation = BatchStream(len(TRAIN), 10, 0), BatchStream(len(VALIDATION), 7, 1)
    losses = []
    for step in range(STEPS):
        if lisa:
            lisa.switch(step, copies)
            watch.before(step, copies["w"])
        train_batch = TRAIN.batch(next(training), budget(world), world)
        val_batch = VALIDATION.batch(next(validation), budget(world), world)
        result = penalty_step(copies["u"], copies["w"], x, train_batch, val_batch, NU, 1e-4, 1000 * step)
        losses.append([result.loss_u, result.loss_w, result.val_loss, result.grad_norm_u, result.grad_norm_w])
        if (step + 1) % 3 == 0:
            x.step(0.1)
        if lisa:
            watch.after(step, copies["w"])
    heldout = heldout_loss(copies["w"], VALIDATION, budget(world))
    intervals = watch.intervals if lisa else []
    return Result(copies, x.x.double(), losses, heldout, intervals, time.perf_counter() - start)


class Watch:
    """What LISA does to a copy: which parameters moved in each interval, and how many numbers have a moment."""

    def __init__(self, lisa: Lisa, model: torch.nn.Module):
        self.lisa, self.intervals = lisa, []
        self.names = {id(p): name for name, p in model.named_parameters()}  # without those of tied heads
        self.sizes = {name: p.numel() for name, p in model.named_parameters()}

    def before(self, step: int, copy: ModelCopy) -> None:
        if step % INTERVAL == 0:
            self.start, self.carried = whole_state(copy), moments(copy)

    def after(self, step: int, copy: ModelCopy) -> None:
        if (step + 1) % INTERVAL:
            return
        always, drawn = self.lisa.active("w")
        always, drawn = ([self.names[id(p)] for p in part] for part in (always, itertools.chain(*drawn)))
        end = whole_state(copy)
        self.intervals.append(
            {
                "moved": [name for name in self.sizes if end and not torch.equal(end[name], self.start[name])],
                "active": [name for name in self.sizes if name in (*always, *drawn)],
                "moments": moments(copy),
                "active_size": sum(self.sizes[name] for name in (*always, *drawn)),
                "carried": self.carried,
                "always_size": sum(self.sizes[name] for name in always),
            }
        )


def moments(copy: ModelCopy) -> int:
    """Numbers in the first moments that the optimizer holds, summed over ranks."""
    optimizer = copy._inner() if isinstance(copy, ZeroCopy) else copy.optimizer
    mine = sum(state["exp_avg"].numel() for state in optimizer.state.values() if "exp_avg" in state)
    return int(copy.world.sum(torch.tensor(mine)))


def equal_on_all_ranks(world: World, numbers: Any) -> bool:
    gathered = [None] * world.size
    distributed.all_gather_object(gathered, numbers)
    return all(other == numbers for other in gathered)


def compare(world: World, folder: Path, half: bool) -> list[dict[str, Any]]:
    """Under every stage against one process of plain torch; half: with only one kind of weights for each case."""
    start = flat(whole_state(torch_copy(make_model())))
    report = []
    for lisa, sample in itertools.product((False, True), (False, True)):
        # Per sample with clipping; under each stage, with LISA and without, one of the two recomputes activations.
        case = {"lisa": lisa, "weights": "sample" if sample else "source", "clip": CLIP if sample else None}
        stages = [stage for stage in range(4) if not half or (stage // 2 + lisa) % 2 == sample]
        plain = train(torch_copy, ALONE, case | {"checkpointing": False}) if world.main else None
        for stage in stages:
            case |= {"stage": stage, "checkpointing": (stage + sample) % 2 == 1}
            mine = train(functools.partial(zero_copy, world, stage), world, case)
            agree = equal_on_all_ranks(world, (mine.x.tolist(), mine.losses, mine.heldout))
            states = {name: whole_state(copy) for name, copy in mine.copies.items()}
            if world.main:
                report.append(case | {"ranks_agree": agree} | differences(mine, states, plain, start))
    return report


def differences(mine: Result, states: dict[str, Any], plain: Result, start: torch.Tensor) -> dict[str, Any]:
    found = {}
    for name, state in states.items():
        a, b = flat(state), flat(whole_state(plain.copies[name]))
        found |= {f"relative_{name}": float((a - b).norm() / b.norm())}
        found |= {f"of_displacement_{name}": float((a - b).norm() / (b - start).norm())}
    a, b = torch.tensor(mine.losses).double(), torch.tensor(plain.losses).double()
    return found | {
        "losses": float(((a - b).abs() / b.abs())[:, :3].max()),
        "norms": float(((a - b).abs() / b.abs())[:, 3:].max()),
        "x": float((mine.x - plain.x).norm() / plain.x.norm()),
        "x_moved": float((plain.x - plain.x.mean()).norm()),
        "heldout": abs(mine.heldout / plain.heldout - 1),
        "least_norm": float(b[:, 3:].min()),
        "intervals": mine.intervals,
        "seconds": mine.seconds,
        "plain_seconds": plain.seconds,
    }


# ----------------------------------------------------------------------------------------------------------------------
# what must hold besides


def stop(world: World, folder: Path) -> list[dict[str, Any]]:
    """One rank alone sees a loss, or the gradient of a loss, that is not finite."""
    report = []
    for stage, what in itertools.product(range(4), ("loss", "gradient")):
        model = make_model(tied=False)
        model.get_input_embeddings().weight.data[UNUSED] = math.inf
        u, w = (zero_copy(world, stage, copy.deepcopy(model)) for _ in "uw")
        before = whole_state(u), whole_state(w)
        x = SourceWeights(TRAIN.source_ids, torch.tensor([0.2, 0.3, 0.5]), 1 / NU, "adam")
        train, validation = (samples.batch(torch.arange(10), budget(world), world) for samples in (TRAIN, VALIDATION))
        if world.rank == world.size - 1:
            if what == "loss":
                validation.micro_batches[0].input_ids[0, 0] = UNUSED
            else:
                w.losses = functools.partial(lambda losses, *a: InfiniteGradient.apply(losses(*a)), w.losses)
        error = None
        try:
            penalty_step(u, w, x, train, validation, NU, 1e-4, 0)
        except NonFiniteLoss as stopped:
            error = str(stopped)
        after = whole_state(u), whole_state(w)
        moved = [name for old, new in zip(before, after, strict=True) for name in old if differ(old[name], new[name])]
        stopped_ranks = int(world.sum(torch.tensor(int(error is not None))))
        seen = int(world.sum(x.seen.sum()))
        report.append({"stage": stage, "what": what, "stopped_ranks": stopped_ranks, "moved": moved, "seen": seen})
    return report


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses: torch.Tensor) -> torch.Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.equal(a.view(torch.int32), b.view(torch.int32))  # bit by bit


def save(world: World, folder: Path) -> list[dict[str, Any]]:
    """Step, save, and say what logits the saved model must have."""
    ids = torch.arange(8).reshape(1, 8)
    report = []
    for family, stage, lisa in (("gpt2", 3, True), ("llama", 3, False), ("gpt2", 2, False)):
        model = make_model(family)
        layers = Layers(model)
        trained = zero_copy(world, stage, model, layers.active((1,), True) if lisa else None)
        for micro in TRAIN.batch(torch.arange(10), budget(world), world).micro_batches:
            trained.backward(trained.losses(micro, 0).sum(), last=True)
            trained.step(1e-2, trained.gradient_norm())
        target = folder / f"saved_{family}_{stage}"
        trained.save(target, TOKENIZER)
        trained.model.eval()
        with torch.no_grad():
            logits = trained.model(input_ids=ids).logits
            start = make_model(family).eval()(input_ids=ids).logits
        report.append({"folder": str(target), "ids": ids.tolist(), "logits": logits.tolist(), "start": start.tolist()})
    return report


def leak(world: World, folder: Path, switches: int) -> list[dict[str, Any]]:
    """Memory, engines and hooks over many switches, with a step after each."""
    report = []
    for stage in (2, 3):
        model = make_model(vocab_size=8_000)  # an embedding of 4 MB, and as much for its master and for each moment
        layers = Layers(model)
        trained = zero_copy(world, stage, model, layers.active((0,), True))
        micro = TRAIN.batch(torch.arange(4), budget(world), world).micro_batches[0]
        rows, start = [], time.perf_counter()
        for switch in range(1, switches + 1):
            trained.activate(*layers.active((switch % BLOCKS,), True))
            trained.backward(trained.losses(micro, 0).sum(), last=True)
            trained.step(1e-4, trained.gradient_norm())
            if switch % 10 == 0:
                mine = usage(model)
                everyone = [None] * world.size
                distributed.all_gather_object(everyone, mine)
                rows.append({"switch": switch, "ranks": everyone})
        trained._stop(set())
        left = usage(model)
        report.append({"stage": stage, "rows": rows, "left": left, "seconds": time.perf_counter() - start})
    return report


def usage(model: torch.nn.Module) -> dict[str, int]:
    """What this process holds: resident bytes, live engines, hooks, and the bytes behind the parameters' shares."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory back to the system, so that what is resident is what is held
    shares = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    storages = {share.untyped_storage().data_ptr(): share.untyped_storage().nbytes() for share in shares}
    dictionaries = [vars(module) for module in model.modules()]
    on_parameters = [hooks for p in model.parameters() for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    return {
        "rss": psutil.Process().memory_info().rss,
        "engines": sum(isinstance(thing, DeepSpeedEngine) for thing in gc.get_objects()),
        "hooks": sum(len(value) for names in dictionaries for name, value in names.items() if "hook" in name and value),
        "parameter_hooks": sum(len(hooks) for hooks in on_parameters if hooks),
        "storage": sum(storages.values()),
        "own": sum(share.nbytes for share in shares),
    }


TASKS = {
    "compare": functools.partial(compare, half=False),
    "compare_half": functools.partial(compare, half=True),
    "stop": stop,
    "save": save,
    "leak": functools.partial(leak, switches=20),
    "leak_long": functools.partial(leak, switches=100),
}


def main(folder: Path, tasks: list[str]) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    world = start_world()
    zero_copy(world, 3, make_model())  # loads what is loaded late
    gc.collect()
    gc.freeze()  # every new draw collects, which takes a fraction of a second with all that is loaded
    for task in tasks:
        start = time.perf_counter()
        report = TASKS[task](world, folder)
        if world.main:
            (folder / f"{task}.json").write_text(json.dumps(report))
            print(f"{task}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
