"""Who is compared on one step: transformers.Trainer fine-tuning plainly, and this project's bilevel step.

A peer is made for the batches of all rounds and takes one step after another.
"""

import copy
import dataclasses
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

import peft
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers.trainer_pt_utils import get_length_grouped_indices

from bilevel.data.samples import Samples
from bilevel.model.adapter_copy import AdapterCopy
from bilevel.model.lisa import Lisa
from bilevel.model.loading import load_model, model_shape, trained_shape
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import ALONE
from bilevel.settings.fields import Settings
from bilevel.step.f2sa import penalty_step
from bilevel.weights.learned import SampleWeights, SourceWeights

MICRO_BATCH_TOKENS = 2048
LISA_LAYERS = 2
ALPHA, LR_Y, LR_X = 10.0, 1e-5, 0.1
MICRO, RANK = 8, 16


@dataclasses.dataclass
class Round:
    """What every peer sees in one round: sample numbers (64,) of training and of validation."""

    train: torch.Tensor
    validation: torch.Tensor


@dataclasses.dataclass
class Work:
    """A model and data for all peers; attention: transformers' name, eager to count operations."""

    shape: dict
    train: Samples
    validation: Samples
    rounds: list[Round]
    attention: str = "sdpa"


class Ours:
    """A full step of u, w and x, from the draw's sample numbers on."""

    def __init__(self, work: Work, weights: str, lisa_layers: int | None = None):
        self.work, self.rounds = work, iter(work.rounds)
        settings = Settings(
            train_data=["-"],
            val_data=["-"],
            model_config=work.shape,
            lisa_layers=lisa_layers,
            attn_implementation=work.attention,
        )
        model = load_model(settings, model_shape(settings), plain_tokenizer())
        self.models = {"u": model, "w": copy.deepcopy(model)}
        self.lisa = Lisa(settings, self.models) if lisa_layers else None
        self.copies = {
            name: TorchCopy(model, active=self.lisa.active(name) if self.lisa else None)
            for name, model in self.models.items()
        }
        sources = len(work.train.sources)
        if weights == "source":
            self.x = SourceWeights(work.train.source_ids, torch.full((sources,), 1 / sources), ALPHA, "adam")
        else:
            self.x = SampleWeights(len(work.train), None, "sigmoid", ALPHA, "adam")

    def step(self) -> None:
        draw = next(self.rounds)
        train = self.work.train.batch(draw.train, MICRO_BATCH_TOKENS)
        validation = self.work.validation.batch(draw.validation, MICRO_BATCH_TOKENS)
        penalty_step(**self.copies, weights=self.x, train=train, validation=validation, nu=1 / ALPHA, lr_y=LR_Y, seed=0)
        self.x.step(LR_X)

    def run(self, after_step: Callable[[], None]) -> None:
        """All rounds."""
        for _ in self.work.rounds:
            self.step()
            after_step()


class Adapters(Ours):
    """The same step with adapters of rank 16: two on one model in one pass, or one on each of two models."""

    def __init__(self, work: Work, shared: bool):
        self.work, self.rounds = work, iter(work.rounds)
        settings = adapted(work)
        if shared:
            models = [load_model(settings, model_shape(settings), plain_tokenizer())] * 2
        else:
            one = dataclasses.replace(settings, method="fixed")
            models = [load_model(one, model_shape(one), plain_tokenizer()) for _ in "uw"]
        self.copies = {
            name: AdapterCopy(model, name if shared else "w", ALONE, one_pass=shared, token_budget=MICRO_BATCH_TOKENS)
            for name, model in zip("uw", models, strict=True)
        }
        self.models = {name: copy.model for name, copy in self.copies.items()}
        sources = len(work.train.sources)
        self.x = SourceWeights(work.train.source_ids, torch.full((sources,), 1 / sources), ALPHA, "adam")


def adapted(work: Work) -> Settings:
    return Settings(
        train_data=["-"],
        val_data=["-"],
        model_config=work.shape,
        lora_rank=RANK,
        attn_implementation=work.attention,
    )


class PlainTrainer:
    """transformers.Trainer with its defaults: micro-batches of 8 padded to their longest, as many as a step takes.

    grouped: the step's samples in the order of Trainer's length grouping, which sorts them. lora: adapters by
    peft.
    """

    def __init__(self, work: Work, grouped: bool = False, lora: bool = False):
        settings = Settings(train_data=["-"], val_data=["-"], model_config=work.shape)
        config = trained_shape(settings, model_shape(settings))  # without dropout, as for us
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=work.attention)
        if lora:
            model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear"))
        self.models = {"w": model}
        self.folder = tempfile.TemporaryDirectory()
        arguments = transformers.TrainingArguments(
            output_dir=self.folder.name,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=max(1, len(work.rounds[0].train) // MICRO),
            max_steps=len(work.rounds),
            train_sampling_strategy="sequential",  # a round's samples are drawn, and in order, already
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        tokenizer = plain_tokenizer()
        self.trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=_features(work, grouped),
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
        self.trainer.remove_callback(transformers.PrinterCallback)

    def run(self, after_step: Callable[[], None]) -> None:
        """All rounds."""
        self.trainer.add_callback(_AfterStep(after_step))
        self.trainer.train()


class _AfterStep(transformers.TrainerCallback):
    def __init__(self, call: Callable[[], None]):
        self.call = call

    def on_step_end(self, *_, **__) -> None:
        self.call()


class InTurn:
    """A peer in a process of its own, so that neither its threads nor its memory are in the others' way."""

    def __init__(self, name: str, work: Work):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_take_turns, args=(name, work, other), daemon=True)
        self.process.start()

    def step(self) -> float:
        """Seconds from the word to the step's end."""
        start = time.perf_counter()
        self.pipe.send(None)
        self.pipe.recv()
        return time.perf_counter() - start


def _take_turns(name: str, work: Work, pipe: Connection) -> None:
    transformers.logging.set_verbosity_error()

    def turn() -> None:
        pipe.send(None)
        pipe.recv()

    peer = (PEERS | ADAPTED)[name](work)
    with suppress(EOFError):  # nobody gives another turn after the last step
        pipe.recv()
        peer.run(turn)


def _features(work: Work, grouped: bool) -> list[dict]:
    """Trainer's data set: the samples of all rounds one after the other."""
    features = []
    for draw in work.rounds:
        rows = work.train.table.select_columns(["input_ids", "labels"])[draw.train.tolist()]
        rows = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        if grouped:
            lengths = [len(row["input_ids"]) for row in rows]
            order = get_length_grouped_indices(lengths, len(rows), mega_batch_mult=1)
            rows = [rows[i] for i in order]
        features += rows
    return features


def plain_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Knows how to pad."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"0": 0}, "0")), pad_token="0")


PEERS = {
    "Trainer": PlainTrainer,
    "Trainer, grouped": lambda work: PlainTrainer(work, grouped=True),
    "per source": lambda work: Ours(work, "source"),
    "per sample": lambda work: Ours(work, "sample"),
    "LISA 2, per source": lambda work: Ours(work, "source", LISA_LAYERS),
    "LISA 2, per sample": lambda work: Ours(work, "sample", LISA_LAYERS),
}
ADAPTED = {
    "two full copies": lambda work: Ours(work, "source"),
    "two copies with adapters": lambda work: Adapters(work, shared=False),
    "two adapters on one copy": lambda work: Adapters(work, shared=True),
    "Trainer with adapters, grouped": lambda work: PlainTrainer(work, grouped=True, lora=True),
}
