"""The rule x_optimizer=auto: moves the weights of sources by evidence, without a learning rate.

It lowers harmful sources, leaves equally good ones equal, and finds a mixture if validation needs one. It uses the
contrasts d_k of bilevel.weights.evidence, which are in standard deviations of single gaps. Evidence decides whether a
source moves; a controller with a proportional and an integral part decides how far:

    gate = clip((largest e so far - 1) / 2, 0, 1)
    f    = mean of d over about 8 steps, weighted by h, shrunk towards 0 by its noise (positive-part James-Stein)
    I   -= 0.03 gate (|f| / largest |f| since x may move)^2 f
    x    = x at the start + I - 0.7 gate f

The two model copies react to a changed x only after some fifty steps. The proportional part is about one Newton step (d
falls by 0.7 to 1.1 per logit): it goes most of the way to an inner optimum at once, and shrinks when the gap shrinks.
The integral part keeps its full rate only while the gap does not shrink, as for a bad source; otherwise it slows down
with the square of |f| / largest |f|.

The gap of a bad source shrinks, too, once its weight is nearly 0, because the model no longer learns it. A source 4.2
below the largest x (1.5 % of two) and still worse (f > 0) therefore falls at the full rate and does not rise again; one
that validation needs has f < 0 by then and does. No x falls further than 8 below the largest, so the integral does not
grow without limit.
"""

import torch

from bilevel.weights.base_optimizer import XOptimizer
from bilevel.weights.fixed import FixedSourceWeights

PROPORTIONAL = 0.7  # logits per standard deviation of gaps
INTEGRAL = 0.03  # the same, per step
KEEP = 7 / 8  # part of the running mean of d that is kept from one step to the next
GATE = (1.0, 3.0)  # e from which a source moves, and from which it moves in full
FAR = 4.2  # logits below the largest weight, from which a source that is still worse is not given back
LOWEST = 8.0  # logits below the largest weight: odds of 3,000 to 1


class Auto(XOptimizer):
    """The rule for n sources, 32 bytes each. It does not use lr_x, its schedule, alpha or upper_every."""

    STATE = ("sum_hd", "sum_h", "integral", "peak")

    def __init__(self, n: int):
        for name in self.STATE:
            setattr(self, name, torch.zeros(n, dtype=torch.float64))

    def observe(
        self, weights: FixedSourceWeights, entries: torch.Tensor, gaps: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Add the step's contrasts to their running means."""
        k, d, h = weights.evidence.latest
        self.sum_hd[k] = KEEP * self.sum_hd[k] + h * d
        self.sum_h[k] = KEEP * self.sum_h[k] + h

    def update(
        self, weights: FixedSourceWeights, index: torch.Tensor, gradient: torch.Tensor, lr: float
    ) -> torch.Tensor:
        """The change of x of the sources; the gradient and the learning rate are not used."""
        evidence = weights.evidence
        if not len(evidence.latest.sources):
            return torch.zeros_like(gradient)
        gate = ((evidence.peak[index].abs() - GATE[0]) / (GATE[1] - GATE[0])).clamp(0, 1)
        f = self.mean_contrast(evidence.phi())[index]
        self.peak[index] = torch.maximum(self.peak[index], torch.where(gate > 0, f.abs(), 0.0))
        before = weights.x.max() - weights.x[index]
        gone = (before > FAR) & (f > 0) & (gate > 0)
        answer = torch.where(gone, 1.0, f.abs() / self.peak[index].clamp_min(1e-12))
        self.integral[index] -= INTEGRAL * gate * answer**2 * f
        x = evidence.start[index] + self.integral[index] - PROPORTIONAL * gate * f
        top = float(weights.x.index_copy(0, index, x).max())
        held = torch.where(gone, torch.minimum(x, top - before), x)
        self.integral[index] += held - x
        # A source that has started lower than that may stay as low.
        depth = (evidence.start.max() - evidence.start[index]).clamp_min(LOWEST)
        under = (top - depth - held).clamp_min(0)
        self.integral[index] += under
        return held + under - weights.x[index]

    def mean_contrast(self, phi: torch.Tensor) -> torch.Tensor:
        """f (n,): the running mean of d, shrunk towards 0; it is 0 while it is within its noise."""
        mean = self.sum_hd / self.sum_h.clamp_min(1e-300)
        z_squared = mean**2 * self.sum_h * (1 + KEEP) / phi
        return mean * (1 - 1 / z_squared.clamp_min(1e-300)).clamp_min(0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self.STATE}
