"""The table of the values of x_optimizer: the class of each rule that moves x, and what it needs.

The classes are in bilevel.weights.auto and auto_records (auto) and bilevel.weights.optimizers (adam, sgd, mirror). They
are named here and imported when a run starts, so that checking settings takes no time. The default is in
bilevel.settings.fields.
"""

import dataclasses
from collections.abc import Callable

from bilevel.settings.methods import imported


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One rule. place: module and name of its class, a bilevel.weights.base_optimizer.XOptimizer.

    sample_place: the same for the weights of single samples, if that is another class.
    """

    place: str
    sample_place: str | None = None
    rate: bool = True  # has a learning rate, lr_x, and moves x every upper_every steps; otherwise at every step

    def kind(self, per_sample: bool) -> Callable:
        """Its class, imported now. It is called with the number of entries of x."""
        return imported((per_sample and self.sample_place) or self.place)


OPTIMIZERS = {
    "auto": Optimizer("bilevel.weights.auto:Auto", "bilevel.weights.auto_records:AutoRecords", rate=False),
    "adam": Optimizer("bilevel.weights.optimizers:Adam"),
    "sgd": Optimizer("bilevel.weights.optimizers:SGD"),
    "mirror": Optimizer("bilevel.weights.optimizers:Mirror"),
}
