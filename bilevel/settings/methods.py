"""The table of methods: the step or score function of each, and what it needs.

A method that trains a model, with learned or constant weights, has a step: a module of bilevel.step with a function
`step`. A baseline has a score: a function that gives every training sample a number (bilevel.baselines.scores). They
are named here and imported when a run starts, so that checking settings takes no time.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any


def imported(place: str) -> Any:
    """The object `name` of `module:name`; the module is imported now."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclasses.dataclass(frozen=True)
class Method:
    """One method. place: module and name of its step or score function."""

    place: str
    copies: tuple[str, ...] = ()  # names of the model copies that train; a score makes models as it needs them
    learned: bool = False  # x is learned while the copies train
    validation: bool = True  # reads validation data
    weighs: bool = False  # its scores are the weights; otherwise the samples with the best scores are kept
    one_process: bool = False  # needs backend=torch: it reads gradients of single samples, or moves all parameters
    whole_gradients: bool = False  # not with lisa_layers or gradient_checkpointing

    @property
    def trains(self) -> bool:
        """Whether it has a step; otherwise it has a score."""
        return bool(self.copies)

    @property
    def weights_stay(self) -> bool:
        """Whether it trains on batches that are drawn in proportion to constant weights (bilevel.weights.fixed)."""
        return self.trains and not self.learned

    def function(self) -> Callable:
        """Its step or score function, imported now."""
        return imported(self.place)


METHODS = {
    "f2sa": Method("bilevel.step.f2sa:step", copies=("u", "w"), learned=True),
    "fixed": Method("bilevel.step.plain:step", copies=("w",), validation=False),
    "uniform": Method("bilevel.baselines.scores:uniform_score"),
    "random": Method("bilevel.baselines.scores:random_score"),
    "loss": Method("bilevel.baselines.scores:loss_score"),
    "perplexity": Method("bilevel.baselines.scores:perplexity_score"),
    "rho": Method("bilevel.baselines.scores:rho_score"),
    "influence": Method("bilevel.baselines.scores:influence_score", one_process=True, whole_gradients=True),
    "doremi": Method("bilevel.baselines.doremi:doremi_score", validation=False, weighs=True),
    "ifd": Method("bilevel.baselines.scores:ifd_score"),
    "align": Method("bilevel.step.align:step", copies=("w",), learned=True, one_process=True),
    "oracle": Method("bilevel.baselines.scores:oracle_score"),
}
