"""Smooth functions that know the positive part of their Hessian, as Gauss-Newton methods ask for it.

f = l(y(x)) with a convex l has the Gauss-Newton matrix G = y'(x)' l'' y'(x): what is left of f'' without the second
derivatives of y. It is positive semidefinite, and it is f'' where l' is zero.

Such a function may have unknowns beside x, states that a linear model finds on the way: a step then says how they
move, and the next point begins there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import Operator, SmoothFunction


class Tangent(NamedTuple):
    """G d, (size,), and the derivative of the states along d; empty where there are none."""

    image: Tensor
    state: Tensor


class CurvatureFactors(ABC):
    """An approximation P of the Gauss-Newton matrix whose damped inverses cost little."""

    @abstractmethod
    def inverse(self, damping: float) -> Operator:
        """r -> (P + damping)^-1 r, symmetric and positive definite, (size,) each."""

    @abstractmethod
    def memory(self) -> dict[str, Any]:
        """Tensors of which `CurvedFunction.recalled` makes them again."""


class NoFactors(CurvatureFactors):
    """Nothing is known: the identity."""

    def inverse(self, damping: float) -> Operator:
        return lambda r: r

    def memory(self) -> dict[str, Any]:
        return {}


class Curvature(ABC):
    """The Gauss-Newton matrix of a function at a point, of all samples or of some of them."""

    @abstractmethod
    def product(self, d: Tensor) -> Tangent:
        """G d, d (size,). Collective, as all calls."""

    def factors(self) -> CurvatureFactors:
        """An approximation of G that is easily inverted; the identity by default."""
        return NoFactors()


class CurvedPoint(ABC):
    """A function at a point; what is asked for is evaluated once.

    Attributes:
        x: (size,).
        value: f(x); infinite or NaN where there is none. Where states are unknowns, that of the states that solve
            the equations linearized at this point.
        state: the unknowns beside x, this rank's; empty where there are none.
    """

    x: Tensor
    value: float
    state: Tensor

    @cached_property
    @abstractmethod
    def gradient(self) -> Tensor:
        """f'(x), (size,)."""

    @abstractmethod
    def curvature(self, rows: Tensor | None = None) -> Curvature:
        """The Gauss-Newton matrix here, of the samples `rows`, int64, or of all."""

    @abstractmethod
    def ahead(self, d: Tensor, state: Tensor) -> CurvedPoint:
        """The point x + d, where a step moves the states by `state`."""

    def refined(self) -> CurvedPoint:
        """The same x, evaluated more exactly where something is approximated: after a step that was refused."""
        return self


class CurvedFunction(SmoothFunction):
    """A `SmoothFunction` with Gauss-Newton products: values, gradients and products belong to points.

    A subclass writes `at`. Products count as `hessian_products` in its `tally`.

    Attributes:
        samples: of which there may be some in a `Curvature`; 0 where f is no mean over samples.
    """

    samples: int = 0

    @abstractmethod
    def at(self, x: Tensor, state: Tensor | None = None) -> CurvedPoint:
        """The function at x, (size,); counts what it evaluates.

        Args:
            state: the unknowns beside x, as `CurvedPoint.state` has them; default those that belong to x.
        """

    def recalled(self, memory: dict[str, Any]) -> CurvatureFactors:
        """The factors whose `memory` this was.

        Raises:
            InputError: a memory of other factors.
        """
        if memory:
            raise InputError("memory of curvature factors", ", ".join(sorted(memory)), "none: this function has none")
        return NoFactors()

    def near(self, x: Tensor) -> CurvedPoint:
        """The function at x, for methods that ask for values and gradients alone; it may begin at earlier states."""
        return self.at(x)

    def _value(self, x: Tensor) -> float:
        counted = self.tally.copy()
        try:
            return self.near(x).value
        finally:
            self.tally.set(counted)  # who calls has counted

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        counted = self.tally.copy()
        try:
            point = self.near(x)
            return point.value, point.gradient
        finally:
            self.tally.set(counted)


class CurvedTerm(ABC):
    """A term of an objective that is a convex function of something nonlinear, as a loss of a network's scores is."""

    @abstractmethod
    def gauss_newton(self, *point_and_direction: Any) -> Any:
        """As `Objective.hvp`, without second derivatives of what it is a convex function of."""

    @abstractmethod
    def curved(self, problem: Any, **settings: Any) -> CurvedFunction | None:
        """The whole objective of a problem by hand, see `curved_function`; None where it does not know it."""


#: No states.
EMPTY = torch.empty(0, dtype=torch.float64)
