"""What the tasks of zero_worker.py share: a tiny model, samples, copies under ZeRO, the loop of training steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models

from bilevel.data.samples import TOKEN_FEATURES, Samples
from bilevel.data.stream import BatchStream
from bilevel.data.tokenise import IGNORE
from bilevel.model.base_copy import Active, ModelCopy
from bilevel.model.lisa import Lisa
from bilevel.model.loading import load_model
from bilevel.model.zero_copy import ZeroCopy
from bilevel.processes import World
from bilevel.settings.deepspeed import zero_config
from bilevel.settings.fields import Settings
from bilevel.step.f2sa import penalty_step
from bilevel.step.result import StepResult
from bilevel.weights.learned import SampleWeights, SourceWeights

VOCABULARY, UNUSED = 50, 49  # no sample holds the last token
BLOCKS = 2
SEED = 1  # of the model, and of LISA: w trains one block, the other, and the first again; u the same only when shared
SHARES = torch.tensor([0.2, 0.3, 0.5])  # of the sources, at the start
BUDGET = 96  # padded tokens of the micro-batches of all ranks: two of them per batch
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
    values = {"train_data": ["a"], "val_data": ["b"], "backend": "deepspeed", "seed": SEED}
    if "model_name_or_path" not in changes:
        values["model_config"] = {"model_type": "gpt2"} | SHAPE
    return Settings(**values | changes)


def make_model(
    family: str = "llama", tied: bool = True, checkpointing: bool = False, **changes: Any
) -> torch.nn.Module:
    """Equal on every rank, without dropout. Llama has no biases, such as GPT-2's of keys, whose true gradient is 0."""
    config = transformers.AutoConfig.for_model(family, tie_word_embeddings=tied, **SHAPE | changes)
    return load_model(settings(gradient_checkpointing=checkpointing), config, TOKENIZER)


def make_samples(sizes: tuple[int, ...], seed: int) -> Samples:
    """Rows of 6 or 12 tokens, the second half of each supervised."""
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for size in sizes:
        rows = []
        for index in range(size):
            length = 6 * int(torch.randint(1, 3, (), generator=generator))
            ids = torch.randint(UNUSED, (length,), generator=generator).tolist()
            labels = [IGNORE] * (length // 2) + ids[length // 2 :]
            rows.append({"index": index, "is_noisy": None, "input_ids": ids, "labels": labels})
        tables.append(datasets.Dataset.from_list(rows, features=TOKEN_FEATURES))
    return Samples([Path(f"source{i}.json") for i in range(len(sizes))], tables, [0] * len(sizes))


# Per sample, Adam turns the rounding of a centred gap near 0 into 1e-4 of x; in these samples none comes near.
TRAIN, VALIDATION = make_samples((7, 11, 6), 1), make_samples((13,), 1)


def budget(world: World) -> int:
    return BUDGET // world.size


def partition_small(config: dict[str, Any]) -> dict[str, Any]:
    """At stage 3 the matrices of a tiny model are partitioned and its vectors are not, as in a large one."""
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 500
    return config


def zero_copy(
    world: World,
    model: torch.nn.Module,
    dtype: str = "fp32",
    active: Active | None = None,
    residual: str = "device",
    **changes: Any,
) -> ZeroCopy:
    """A copy under ZeRO; changes: its settings."""
    config = partition_small(zero_config(settings(**changes), dtype))
    return ZeroCopy(model, world, config, active=active, residual=residual)


def whole_state(copy: ModelCopy) -> dict[str, torch.Tensor]:
    """Parameters by name on rank 0 under ZeRO, in the one process under plain torch."""
    state = copy.whole_state() if isinstance(copy, ZeroCopy) else copy.model.state_dict()
    return {name: value.detach().clone() for name, value in state.items()}


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values()]).double()


def distance(a: torch.Tensor, b: torch.Tensor, origin: torch.Tensor | float = 0.0) -> float:
    """||a - b|| relative to ||b - origin||."""
    return float((a - b).norm() / (b - origin).norm())


def equal_on_all_ranks(world: World, thing: Any) -> bool:
    first, *others = world.gather(thing)
    return all(other == first for other in others)


def penalty_steps(
    copies: dict[str, ModelCopy],
    x: SourceWeights | SampleWeights,
    world: World,
    steps: int,
    lr_y: float,
    nu: float,
    upper_every: int,
    lisa: Lisa | None = None,
    tokens: int = BUDGET,
    samples: tuple[Samples, Samples] = (TRAIN, VALIDATION),
    order: int = 1,
    packed: bool = False,
) -> Iterator[StepResult]:
    """Steps of u, w and x on training and validation samples, yielded one by one.

    tokens: budget of the micro-batches of all ranks together. packed: rows are, and the copies must take such.
    """
    # 10 is no multiple of 4 and 7 none of 2, so that rows which only fill up a share occur.
    streams = BatchStream(len(samples[0]), 10, 0), BatchStream(len(samples[1]), 7, 1)
    for step in range(steps):
        if lisa:
            lisa.switch(step, copies)
        train, validation = (
            part.batch(next(stream), tokens // world.size, world, packed=packed)
            for part, stream in zip(samples, streams, strict=True)
        )
        if x.per_sample:  # two validation samples, fewer than four processes, are compared with the others
            fresh = torch.tensor([step, step + 5]) % len(samples[1])
            validation.fresh = samples[1].batch(fresh, tokens // world.size, world, packed=packed)
        result = penalty_step(copies["u"], copies["w"], x, train, validation, nu, lr_y, 1000 * step, order)
        if (step + 1) % upper_every == 0:
            x.step(0.1)
        yield result
