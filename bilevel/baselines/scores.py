"""Baselines: scores of single records, to compare learned weights with. No bilevel problem is solved.

A score function gives every training sample a number (N,); higher is better. The best fraction `keep` of all samples
then get equal weights and the others weight 0. With weights=source, a source's weight is its share of the kept samples.
The scores of `doremi` are the weights themselves (bilevel.baselines.doremi).
If a score needs a model, that model starts like the run's own and is trained for `score_epochs` epochs by the plain
step of method=fixed, with the lr_y, schedule and batch size of the settings. The baselines that use gradients are in
bilevel.baselines.influence and bilevel.step.align.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import numpy as np
import torch
import transformers

from bilevel.baselines.influence import LastBlock, cosines, random_projection
from bilevel.data.batches import Batch
from bilevel.data.samples import Samples
from bilevel.data.stream import BatchStream
from bilevel.data.tokenise import IGNORE
from bilevel.errors import TrainingStopped, UserError
from bilevel.model.base_copy import ModelCopy
from bilevel.model.copies import make_copies
from bilevel.model.flops import Passes
from bilevel.model.lisa import Lisa
from bilevel.model.loading import drops, model_shape
from bilevel.run.messages import MASKS
from bilevel.run.state import Run
from bilevel.seeding import Permutation, dropout_seed, generator
from bilevel.settings.fields import Settings
from bilevel.settings.methods import METHODS
from bilevel.settings.run_length import steps_per_run
from bilevel.step.gradient import Factors
from bilevel.step.plain import EQUAL, plain_step
from bilevel.step.result import NonFiniteLoss, StepResult, leave_out
from bilevel.step.schedule import Schedule
from bilevel.weights.fixed import FixedSampleWeights, FixedSourceWeights

log = logging.getLogger("bilevel")

CHECKPOINTS = 3  # of the warm-up run, at which `influence` computes gradients


@dataclasses.dataclass
class Scoring:
    """Everything a score function needs. tick is called after each micro-batch or step, and may raise."""

    settings: Settings
    train: Samples
    val: Samples
    new_copy: Callable[[], tuple[ModelCopy, Lisa | None]]  # a model as at the start of the run
    eos: int
    tick: Callable[[], object] = lambda: None
    passes: list[tuple[Passes, transformers.PretrainedConfig]] = dataclasses.field(default_factory=list)
    projecting: float = 0.0  # operations of random projections
    skipped: int = 0  # skipped steps of all models, because of a non-finite loss or gradient

    @property
    def operations(self) -> float:
        """Floating-point operations so far, on this process."""
        return sum(passed.operations(shape) for passed, shape in self.passes) + self.projecting

    def model(self) -> tuple[ModelCopy, Lisa | None]:
        """A new model. Its passes are counted in `operations`."""
        w, lisa = self.new_copy()
        self.passes.append((w.passed, w.shape))
        return w, lisa

    @property
    def steps(self) -> int:
        """Training steps of a model that a score needs."""
        s = self.settings
        return steps_per_run(len(self.train), s.global_batch_size, s.score_epochs, None)

    def lr_y(self, step: int) -> float:
        return Schedule(self.settings, self.steps).lr_y(step)

    def trained(
        self,
        samples: Samples,
        after: Callable[[ModelCopy, int, Batch, StepResult], None] | None = None,
        coefficients: Factors = EQUAL,
    ) -> ModelCopy:
        """A model trained on the samples, with equal weights unless there are coefficients, as for plain_step.

        after(model, steps done, batch, result of the step) is called after each step. Raises TrainingStopped.
        """
        s, (w, lisa) = self.settings, self.model()
        stream = BatchStream(len(samples), s.global_batch_size, s.seed)
        masks = f"; {MASKS}" if drops(w.shape) else ""
        log.info(f"training a model for {self.steps} steps on {len(samples)} samples{masks}")
        for step in range(self.steps):
            if lisa:
                lisa.switch(step, {"w": w})
            batch = samples.batch(next(stream), s.micro_batch_tokens, w.world, packed=w.packed)
            try:
                result = plain_step(w, batch, self.lr_y(step), dropout_seed(s.seed, step), coefficients)
            except NonFiniteLoss as error:
                result = error.result
                self.skip(error, samples, w, f"step {step + 1} of the model trained on {len(samples)} samples")
            else:
                if lisa:
                    lisa.verify(moved=self.lr_y(step) > 0 and result.grad_norm_w > 0)
            self.tick()
            if after:
                after(w, step + 1, batch, result)
        return w

    def skip(self, error: NonFiniteLoss, samples: Samples, w: ModelCopy, where: str) -> None:
        """Skip a step, as often as skip_nonfinite allows. Raises TrainingStopped if it was too often."""
        try:
            words = leave_out(error, samples.places(error.suspects["train"]), [w], self.skipped,
                              self.settings.skip_nonfinite)  # fmt: skip
        except TrainingStopped as stopped:
            raise TrainingStopped(f"{where}: {stopped}") from error
        self.skipped += 1
        log.warning(f"{where}: {words}")

    @torch.no_grad()
    def losses(self, w: ModelCopy, samples: Samples) -> torch.Tensor:
        """Losses l_i of all samples without dropout, (N,) float64 on the CPU, equal on all ranks."""
        w.model.eval()
        log.info(f"losses of {len(samples)} samples")
        found = torch.zeros(len(samples), dtype=torch.float64)
        for micro in samples.in_order(self.settings.micro_batch_tokens, w.world):
            real = micro.places >= 0
            found[micro.sample_ids[real]] = w.losses(micro, seed=0).double().cpu()[real]
            self.tick()
        w.model.train()
        return w.world.sum(found)


def loss_score(s: Scoring) -> torch.Tensor:
    """-l_i under a model trained on the mix: samples that are still hard for it are taken for noise.

    The small-loss trick against label noise (Han et al., "Co-teaching: Robust Training of Deep Neural Networks with
    Extremely Noisy Labels", 2018). Simplified: one model scores once, and it does not choose its own batches.
    """
    return -s.losses(s.trained(s.train), s.train)


def perplexity_score(s: Scoring) -> torch.Tensor:
    """-perplexity of the whole text, prompt included, under the model before fine-tuning.

    Marion et al., "When Less is More: Investigating Data Pruning for Pretraining LLMs at Scale" (2023); they find that
    medium perplexities are as good as low ones, or better. Two differences from `loss`: all tokens are scored, not only
    the supervised ones, and the model has not seen the mix. A new model (model_config) knows nothing yet, so it is
    first trained on the whole texts of the mix.
    """
    whole = s.train.changed(_all_supervised)
    w = s.trained(whole) if s.settings.model_config is not None else s.model()[0]
    return -s.losses(w, whole).exp()


def rho_score(s: Scoring) -> torch.Tensor:
    """Reducible holdout loss: l_i of a model trained on the mix minus l_i of a model trained on the validation data.

    Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt" (2022).
    Simplified: they select from each batch during training; here both models score once, after training. Both make the
    same number of steps, so the one on the validation data makes more epochs.
    """
    mixed = s.losses(s.trained(s.train), s.train)
    return mixed - s.losses(s.trained(s.val), s.train)


def influence_score(s: Scoring) -> torch.Tensor:
    """Similarity of a sample's Adam step to the gradient of the validation loss (bilevel.baselines.influence).

    Simplified from LESS: the warm-up run uses the whole mix, like all scores here; gradients are those of the matrices
    in the last decoder block instead of LoRA's everywhere; a validation file takes the place of a subtask.
    """
    ends = {math.ceil(s.steps * (k + 1) / CHECKPOINTS) for k in range(CHECKPOINTS)}
    found, rates = torch.zeros(len(s.train), len(s.val.sources), dtype=torch.float64), []
    projection = functools.cache(lambda size: random_projection(size, s.settings.seed))

    def look(w: ModelCopy, done: int, *_: object) -> None:
        rates.append(s.lr_y(done - 1))
        if done not in ends:
            return
        log.info(f"gradients of all samples after step {done}")
        block = LastBlock(w)
        project, each = projection(block.size)
        w.model.eval()
        similar = cosines(block, s.train, s.val, project, s.settings.micro_batch_tokens, s.tick)
        found.add_(similar * float(np.mean(rates)))
        w.model.train()
        rates.clear()
        s.projecting += each * (len(s.train) + len(s.val.sources))

    s.trained(s.train, look)
    return found.max(1).values


def ifd_score(s: Scoring) -> torch.Tensor:
    """Instruction-following difficulty: loss of the response given its prompt / loss of the response alone.

    Li et al., "From Quantity to Quality: Boosting LLM Performance with Self-Guided Data Selection for Instruction
    Tuning" (2023). High ratios are kept, but from 1 on the prompt does not help: such a record counts as misaligned and
    is ranked last, the higher the ratio the lower. Simplified: the model was trained on the whole mix instead of a
    thousand records chosen by clustering. The response alone follows EOS, so that its first token is predicted as well.
    """
    w = s.trained(s.train)
    alone = s.train.changed(functools.partial(_without_prompts, start=s.eos))
    ratio = s.losses(w, s.train) / s.losses(w, alone).clamp_min(1e-12)
    return torch.where(ratio < 1, ratio, -ratio)


def uniform_score(s: Scoring) -> torch.Tensor:
    """1 for every sample; all samples are kept. This is plain fine-tuning on the mix."""
    return torch.ones(len(s.train), dtype=torch.float64)


def random_score(s: Scoring) -> torch.Tensor:
    """Numbers drawn by the seed, so that a random subset of the same size is kept: the plainest control."""
    return torch.rand(len(s.train), generator=generator(s.settings.seed, "random scores"), dtype=torch.float64)


def oracle_score(s: Scoring) -> torch.Tensor:
    """1 for clean samples, 0 for those marked is_noisy: an upper bound that uses the truth, not a method."""
    return 1.0 - torch.from_numpy(s.train.is_noisy).double()


def check_scorable(settings: Settings, train: Samples) -> None:
    """Raise UserError if the training samples lack what the method needs."""
    if settings.method == "oracle" and (train.is_noisy is None or train.is_noisy.all()):
        raise UserError("method=oracle needs the field is_noisy in the training records, and some clean records")
    if settings.method == "doremi" and len(train.sources) < 2:
        raise UserError("method=doremi weighs sources against each other; the training data are one source")
    if settings.method == "ifd" and all(IGNORE not in labels[1:] for labels in train.tokens[:1000]["labels"]):
        raise UserError(
            "method=ifd compares responses with and without their prompts, but the training data have no prompts"
        )


def kept(scores: torch.Tensor, keep: float, seed: int) -> torch.Tensor:
    """Which samples are in the best fraction `keep`, (N,) bool. Ties are broken by the seed, not by order."""
    n = len(scores)
    order = np.lexsort((Permutation(n, f"ties of seed {seed}")(np.arange(n)), -scores.numpy()))
    found = torch.zeros(n, dtype=torch.bool)
    found[order[: max(1, round(keep * n))]] = True
    return found


def weights_of(scores: torch.Tensor, settings: Settings, train: Samples) -> FixedSourceWeights | FixedSampleWeights:
    """The weights that follow from the method's scores (N,)."""
    s = settings
    if METHODS[s.method].weighs:
        if s.weights == "sample":
            return FixedSampleWeights(len(train), scores)
        shares = torch.bincount(train.source_ids.long(), scores, minlength=len(train.sources))
        return FixedSourceWeights(train.source_ids, shares / shares.sum())
    chosen = scores > 0 if s.method in ("uniform", "oracle") else kept(scores, s.keep, s.seed)
    if s.weights == "sample":
        return FixedSampleWeights(len(train), chosen.double() * (len(train) / int(chosen.sum())))
    counts = torch.bincount(train.source_ids[chosen].long(), minlength=len(train.sources))
    return FixedSourceWeights(train.source_ids, counts.double() / counts.sum())


def score(run: Run, tick: Callable[[], object]) -> None:
    """Score the run's training samples; set its scores, weights and operations (summed over processes).

    Scores that a checkpoint had are taken.
    """
    s = run.settings

    def new_copy() -> tuple[ModelCopy, Lisa | None]:
        copies, lisa = make_copies(dataclasses.replace(s, method="fixed"), run.world, model_shape(s), run.tokenizer)
        return copies["w"], lisa

    if run.scores is None:
        scoring = Scoring(s, run.train, run.val, new_copy, run.tokenizer.eos_token_id, tick)
        run.scores = METHODS[s.method].function()(scoring)
        run.operations = run.world.size * scoring.operations
    run.weights = weights_of(run.scores, s, run.train)


def _all_supervised(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    return {"input_ids": rows["input_ids"], "labels": rows["input_ids"]}


def _without_prompts(rows: dict[str, list[list[int]]], start: int) -> dict[str, list[list[int]]]:
    """Only the supervised tokens of each row, after a start token from which the first one can be predicted."""
    responses = [[label for label in labels if label != IGNORE] for labels in rows["labels"]]
    return {
        "input_ids": [[start, *response] for response in responses],
        "labels": [[IGNORE, *response] for response in responses],
    }
