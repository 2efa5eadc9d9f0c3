"""Quasi-Newton methods with a line search: L-BFGS, and dense self-scaled BFGS and Broyden."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pdeopt.inversehessian import DenseInverse, InverseHessian, LimitedMemory
from pdeopt.linesearch import SEARCHES, Ray
from pdeopt.monitor import Reason
from pdeopt.optimize.minimiser import Minimiser
from pdeopt.options import setting
from pdeopt.smooth import SmoothFunction


class QuasiNewton(Minimiser):
    """x <- x - size H f'(x), H updated by the pair of the step."""

    inverse: InverseHessian

    @abstractmethod
    def new_inverse(self) -> InverseHessian:
        """H before the first pair."""

    def start(self, x: Tensor) -> None:
        super().start(x)
        self.inverse, self._pairs = self.new_inverse(), 0

    def step(self) -> Reason:
        ray, size = self._search(-self.inverse.times(self.g))
        self.note = ""
        if size is None and self._pairs:  # H may be what is wrong
            self.inverse, self._pairs, self.note = self.new_inverse(), 0, "steepest descent"
            ray, size = self._search(-self.g)
        if size is None:
            return Reason.DIVERGED_LINE_SEARCH if math.isfinite(ray(1e-8)) else Reason.DIVERGED_NAN
        x, f, g = ray.point(size), ray(size), ray.gradient(size)
        # The step is -size H g: so s.H^-1 s = -size g.s
        if self.inverse.update(x - self.x, g - self.g, curvature=-(size**2) * ray.slope_at_start):
            self._pairs += 1
        else:
            self.note = "no curvature"
        self.x, self.f, self.g, self.radius = x, f, g, size
        return Reason.ITERATING

    def _search(self, direction: Tensor) -> tuple[Ray, float | None]:
        ray = Ray(self.function, self.x, self.f, self.g, direction)
        if not ray.slope_at_start < 0:
            return ray, None
        first = 1.0 if self._pairs else min(1.0, 1.0 / self.function.norm(self.g))
        return ray, SEARCHES[self.settings.line_search].along(ray, first)

    def memory(self) -> dict[str, Any]:
        inverse = {f"inverse.{name}": value for name, value in self.inverse.memory().items()}
        return super().memory() | {"pairs": self._pairs} | inverse

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self._pairs, self.inverse = int(memory["pairs"]), self.new_inverse()
        self.inverse.recall({k.removeprefix("inverse."): v for k, v in memory.items() if k.startswith("inverse.")})


@dataclass(frozen=True)
class LBFGSSettings:
    """Options `-lbfgs_*`."""

    memory: int = setting(10, "pairs that are kept; 0 for steepest descent", at_least=0)
    line_search: str = setting("wolfe", "strong Wolfe, or Armijo with quadratic or cubic backtracking",
                               choices=tuple(SEARCHES))  # fmt: skip


class LBFGS(QuasiNewton):
    """L-BFGS (D. C. Liu, J. Nocedal, Math. Program. 45, 1989) in compact form."""

    name, Settings = "lbfgs", LBFGSSettings

    def new_inverse(self) -> LimitedMemory:
        return LimitedMemory(self.function, self.settings.memory)


@dataclass(frozen=True)
class SSBroydenSettings:
    """Options `-ssbroyden_*`."""

    update: str = setting("ssbroyden", "self-scaled Broyden, self-scaled BFGS, or BFGS",
                          choices=("ssbroyden", "ssbfgs", "bfgs"))  # fmt: skip
    line_search: str = setting("wolfe", "strong Wolfe, or Armijo with quadratic or cubic backtracking",
                               choices=tuple(SEARCHES))  # fmt: skip


class SSBroyden(QuasiNewton):
    """Dense quasi-Newton methods of the self-scaled Broyden class; n^2 numbers, so for n up to some 10^4.

    Args:
        team: communicator whose ranks share the rows of H, where the unknowns are on every rank; see `DenseInverse`.
    """

    name, Settings = "ssbroyden", SSBroydenSettings
    inverse: DenseInverse

    def __init__(self, function: SmoothFunction | None = None, *args: Any, team: Any = None, **defaults: Any) -> None:
        self.team = team
        super().__init__(function, *args, **defaults)

    def new_inverse(self) -> DenseInverse:
        return DenseInverse(self.function, self.settings.update, self.team)
