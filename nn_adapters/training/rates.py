"""The learning rate: how it grows with the batch, and its course over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pdeopt.core.errors import InputError

#: Exponents of the batch in the rate.
SCALINGS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}
#: What the rate does after its warm-up, by the share of the steps after it that are done.
COURSES = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "polynomial": lambda share: (1.0 - share) ** 2,
}


def scaled_rate(rate: float, batch: int, base: int, scaling: str = "linear") -> float:
    """The rate for another size of batches.

    "linear": k steps of SGD on batches of n are about one of k times the rate on a batch of kn, as long as the gradient
    does not change on the way (P. Goyal et al., Accurate, large minibatch SGD, arXiv 1706.02677, 2017). "sqrt": the
    covariance of a step stays that of the small batch (A. Krizhevsky, arXiv 1404.5997, 2014); it is what is left for
    optimizers that divide by the gradient's size, as Adam and LAMB.

    Args:
        rate: for batches of `base` samples.
        batch, base: samples, at least 1.
        scaling: none | linear | sqrt.

    Raises:
        InputError: another word, or fewer than one sample.
    """
    if scaling not in SCALINGS:
        raise InputError("scaling", scaling, " | ".join(SCALINGS))
    if batch < 1 or base < 1:
        raise InputError("batch, base", f"{batch}, {base}", "at least 1")
    return rate * float(batch / base) ** SCALINGS[scaling]


@dataclass(frozen=True)
class Course:
    """The factor of the rate in each step: linear in the warm-up, then as `kind` says, to zero after the last step.

    A function of the step, from 0, as `torch.optim.lr_scheduler.LambdaLR` takes it.

    Attributes:
        steps: of the run.
        warmup: steps of the warm-up, the first at the rate / (warmup + 1).
        kind: constant | cosine | polynomial; the last is quadratic.

    Raises:
        InputError: another word, or a warm-up that is longer than the run.
    """

    steps: int
    warmup: int = 0
    kind: str = "cosine"

    def __post_init__(self) -> None:
        if self.kind not in COURSES:
            raise InputError("course of the rate", self.kind, " | ".join(COURSES))
        if not 0 <= self.warmup <= self.steps:
            raise InputError("steps of the warm-up", self.warmup, f"0 to {self.steps}, the steps of the run")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return COURSES[self.kind](min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0))
