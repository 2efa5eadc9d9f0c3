"""Bounds on the design variables, lower <= [z | p] <= upper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import flat
from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import SmoothFunction

#: A number, or values as a list, array, tensor or vector; None for no bound.
Bound = Any


@dataclass(frozen=True)
class Bounds:
    """lower <= x <= upper for flat variables of this rank.

    Attributes:
        lower, upper: of each variable, (n,); infinite where there is none.
    """

    lower: Tensor
    upper: Tensor

    @classmethod
    def of(cls, problem: ControlProblem, lower: Bound = None, upper: Bound = None) -> Bounds:
        """Bounds on the design [z | p] of a problem. Collective.

        Args:
            lower, upper: a number for all controls; or the values of this rank, of its controls, (control_size,) or
                (n_local, m), or of the controls and all parameters, (control_size + param_dim,). Where they do not name
                the parameters p, these are free. Without controls, of the parameters: a number, or (param_dim,).

        Raises:
            InputError: not real numbers, another size, NaN, or a lower bound above the upper one; on all ranks.
        """
        ends = {"lower bounds": (lower, -math.inf), "upper bounds": (upper, math.inf)}
        bounds = cls(*(_filled(problem, values, free, what) for what, (values, free) in ends.items()))
        largest = problem.grid.max
        crossed = ~(bounds.lower <= bounds.upper) | (bounds.lower == math.inf) | (bounds.upper == -math.inf)
        if largest(crossed.any().double()) > 0:
            raise InputError("bounds", "a lower bound above the upper one, or NaN", "lower <= upper")
        return bounds

    def nearest(self, x: Tensor) -> Tensor:
        """x moved into the bounds."""
        return x.clamp(self.lower, self.upper)

    def side(self, x: Tensor, mu: Tensor) -> Tensor:
        """1 where the upper bound is active, -1 where the lower one is, else 0; mu in the unit of x."""
        upper = (mu > self.upper - x) | ((self.lower == self.upper) & (mu == self.upper - x))
        return upper.to(torch.int8) - (~upper & (mu < self.lower - x)).to(torch.int8)

    def miss(self, x: Tensor, side: Tensor) -> Tensor:
        """What x misses of the bound where one is active, and of the interval elsewhere."""
        bound = torch.where(side > 0, self.upper, torch.where(side < 0, self.lower, self.nearest(x)))
        return x - bound

    def free(self, x: Tensor, g: Tensor) -> Tensor:
        """1 where x may move, 0 at a bound that f pushes against, (n,).

        Args:
            x: within the bounds.
            g: f'(x).
        """
        return (~((x <= self.lower) & (g > 0) | (x >= self.upper) & (g < 0))).to(x.dtype)

    def stationarity(self, x: Tensor, g: Tensor) -> Tensor:
        """x - P(x - g), P the projection, without the cancellation of x: zero at a minimum, g far from bounds."""
        return g.clamp(x - self.upper, x - self.lower)


class InBox(SmoothFunction):
    """x -> f at the nearest point of the box: what a method sees that keeps to bounds up to rounding only.

    Args:
        whole: f.
        bounds: of its unknowns.
    """

    def __init__(self, whole: SmoothFunction, bounds: Bounds) -> None:
        super().__init__(whole.size, whole.comm, whole.costs, whole.tally)
        self.whole, self.bounds = whole, bounds

    def _value(self, x: Tensor) -> float:
        return self.whole._value(self.bounds.nearest(x))

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        return self.whole._value_and_gradient(self.bounds.nearest(x))

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self.whole._hvp(self.bounds.nearest(x), d)


def _filled(problem: ControlProblem, values: Bound, free: float, what: str) -> Tensor:
    """Bounds of the design variables of this rank, (design_size,); infinite for those not named. Collective."""
    layout, P = problem.layout, problem.param_dim
    given = flat(free if values is None else values, what)
    rows = (problem.grid.n_local, problem.m)
    legal: set[tuple[int, ...]] = {(layout.control_size + P,)}
    if has_controls := float(problem.grid.max(torch.tensor(float(layout.control_size)))) > 0:
        legal |= {(layout.control_size,), *([rows] if problem.control_map is None else [])}
    shape = tuple(given.shape if isinstance(values, PETSc.Vec) else np.shape(given if values is None else values))
    wrong = len(given) != 1 and shape not in legal and shape != (layout.design_size,)
    if float(problem.grid.max(torch.tensor(float(wrong)))) > 0:
        words = " | ".join(map(str, sorted(legal)))
        raise InputError(what, f"shape {shape}", f"a number, or values of this rank, of shape {words}")
    size = layout.control_size if has_controls else layout.design_size
    if len(given) == 1 and size != 1:
        given = given.expand(size)
    given = given[: layout.design_size]
    if len(given) == layout.design_size:
        return given  # one number for all of them takes no memory
    return torch.cat([given, given.new_full((layout.design_size - len(given),), free)])
