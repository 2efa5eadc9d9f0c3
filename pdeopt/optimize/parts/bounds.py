"""Bounds on the design variables, lower <= [z | p] <= upper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import flat
from pdeopt.core.errors import InputError

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
                (n_local, m), or of its design variables, (control_size + param_size,). Where they do not name the
                parameters p, these are free.

        Raises:
            InputError: not real numbers, another size, NaN, or a lower bound above the upper one; on all ranks.
        """
        lows, highs = (
            flat(infinite if end is None else end, "bounds on the control")
            for end, infinite in ((lower, -math.inf), (upper, math.inf))
        )
        controls, largest = problem.control_size, problem.grid.max
        size = controls + problem.layout.param_size
        if largest(torch.tensor(float(any(len(end) not in (1, controls, size) for end in (lows, highs))))) > 0:
            legal = f"one, or those of this rank, {controls}" + (f" or {size}" if problem.param_dim else "")
            raise InputError("bounds on the control", f"{len(lows)} and {len(highs)} numbers", legal)
        free = torch.full((size,), math.inf, dtype=torch.float64)
        bounds = cls(_filled(-free, lows, controls), _filled(free, highs, controls))
        crossed = ~(bounds.lower <= bounds.upper) | (bounds.lower == math.inf) | (bounds.upper == -math.inf)
        if largest(crossed.any().double()) > 0:
            raise InputError("bounds", "a lower bound above the upper one, or NaN", "lower <= upper")
        return bounds

    def first(self, size: int) -> Bounds:
        """Those of the first variables only."""
        return Bounds(self.lower[:size], self.upper[:size])

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


def _filled(free: Tensor, values: Tensor, controls: int) -> Tensor:
    """One number for all controls, or the values of the first variables; `free` for the others."""
    count = controls if len(values) == 1 else len(values)
    return torch.cat([values.expand(count), free[count:]])
