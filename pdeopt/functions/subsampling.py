"""Nested random samples: uniform, or more likely where a sample has more of the Hessian."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import SampledFunction

#: How samples are drawn.
SAMPLINGS = ("curvature", "uniform")


class WeightedSamples(SampledFunction):
    """f(x) = sum_i w_i f_i(x) + r(x), w_i = 1/N for the whole: subsets may be drawn with unequal probabilities."""

    @abstractmethod
    def importance(self, x: Tensor) -> Tensor:
        """(N,) bounds of the samples' parts of f''(x), w_i |f_i''(x)|, up to a common factor."""

    @abstractmethod
    def subset(self, indices: Tensor, factors: Tensor | None = None) -> WeightedSamples:
        """As of any sampled function; `factors` of the weights, inverse probabilities, replace those of a mean."""


class NestedSample:
    """Samples of any size, each part of all larger ones: those of the smallest ranks u_i / q_i.

    Sequential Poisson sampling (E. Ohlsson, J. Official Statist. 14, 1998): q is the importance, u uniform random
    numbers drawn once. The sample has as many members as asked for, member i with a probability near
    p_i = min(1, c q_i), sum p = size; so the Hessian of the sum with the factors 1/p_i is that of all in the mean.

    Args:
        function: whose samples they are.
        sampling: "uniform", or "curvature" with q from `WeightedSamples.importance`.

    Raises:
        InputError: "curvature" of a function that does not tell.
    """

    def __init__(self, function: SampledFunction, sampling: str, u: Tensor) -> None:
        if sampling == "curvature" and not isinstance(function, WeightedSamples):
            raise InputError("sampling", f"curvature, for {type(function).__name__}", "uniform, or a WeightedSamples")
        self.function, self.sampling, self.u = function, sampling, u

    def of_size(self, size: int, x: Tensor) -> SampledFunction:
        """The function of a subset; the function itself where that is all."""
        function = self.function
        if size >= function.samples:
            return function
        if not isinstance(function, WeightedSamples) or self.sampling == "uniform":
            return function.subset(self.u.argsort()[:size].sort()[0])
        p = inclusion(function.importance(x), size)
        rank = torch.where(p < 1.0, self.u / p, -1.0)
        indices = rank.argsort()[:size].sort()[0]
        return function.subset(indices, 1.0 / p[indices])


def inclusion(q: Tensor, size: int) -> Tensor:
    """p = min(1, c q) with sum p = size: probabilities of samples in a sample of this size, (N,).

    Args:
        q: (N,) importance, >= 0. What has none is as likely as the least that has some.
        size: of the sample, below N.
    """
    q = q.clamp(min=max(float(q.max()), 1e-300) * 1e-12)
    largest, _ = q.sort(descending=True)
    tails = largest.flip(0).cumsum(0).flip(0)  # sums of all but the k largest
    c = (size - torch.arange(size)) / tails[:size]
    certain = int((c * largest[:size] < 1.0).long().argmax())  # the first k for which no other is certain
    return (c[certain] * q).clamp(max=1.0)


def uniform_numbers(samples: int, generator: torch.Generator) -> Tensor:
    """u of a `NestedSample`, uniform in [0, 1).

    Args:
        samples: how many numbers.
        generator: that draws them.
    """
    return torch.rand(samples, generator=generator, dtype=torch.float64)


def generator(seed: int, state: Any = None) -> torch.Generator:
    """A random generator.

    Args:
        seed: its first state.
        state: of `get_state` of an earlier one, which replaces it.
    """
    made = torch.Generator().manual_seed(seed)
    if state is not None:
        made.set_state(state)
    return made
