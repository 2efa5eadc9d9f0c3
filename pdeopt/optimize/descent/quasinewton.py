"""Quasi-Newton methods with a line search: L-BFGS, and dense self-scaled BFGS and Broyden.

Of a `Hierarchy` whose levels have the same unknowns, such as `sample_hierarchy` makes, they take the coarsest function
first, and the next finer one where that is no longer like it. x and H go on: most of what they have to learn, the
samples share.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pdeopt.core.monitor import DescentRecord, History, Reason, Result
from pdeopt.core.settings import Settings, setting
from pdeopt.functions.hierarchy import as_hierarchy
from pdeopt.functions.smooth import Operator, SmoothFunction
from pdeopt.optimize.descent.minimizer import Minimizer, flattened, part_of
from pdeopt.optimize.parts.inversehessian import DenseInverse, InverseHessian, LimitedMemory
from pdeopt.optimize.parts.linesearch import SEARCHES, Ray, Search

#: Steps on a coarser level between two looks at the value of the next finer one.
STEPS_BETWEEN_LOOKS = 10
#: Iterations in a row along whose directions the gradient is not that of f, from which no others are tried.
MOST_WRONG = 3


class QuasiNewton(Minimizer):
    """x <- x - size H f'(x): a line search says how far, an approximate inverse Hessian H where.

    H is updated by the pair s, y of each step, the changes of x and f'(x). A subclass says which H it is. Where no step
    is found, H is started again.

    Attributes:
        search: how far.
        inverse: H.
        preconditioner: the first H, as far as the function knows it; None where it does not.
        levels: the functions, finest first; the other levels of a hierarchy that has other unknowns there are left out.
        level: the number of the one that is minimized now; f and g are its.
    """

    search: Search
    inverse: InverseHessian
    preconditioner: Operator | None
    levels: Sequence[SmoothFunction]

    def adopt(self, function: SmoothFunction) -> None:
        hierarchy = as_hierarchy(function)
        self.levels = hierarchy.functions if hierarchy.shares_unknowns else hierarchy.functions[:1]
        self.search = SEARCHES[self.settings.line_search]
        self.is_monotone = len(self.levels) == 1
        super().adopt(self.levels[0])

    @abstractmethod
    def new_inverse(self) -> InverseHessian:
        """H before the first pair."""

    def start(
        self, x: Tensor, known: tuple[float, Tensor] | None = None, inverse: InverseHessian | None = None
    ) -> None:
        self.level = len(self.levels) - 1
        self.function, self._taken = self.levels[self.level], 0
        value = self.levels[0].value(x) if self.level else math.inf
        self._first = (x, value if math.isfinite(value) else math.inf)
        super().start(x, known)
        if self.level:  # values of levels are not to be compared
            self.highest = math.inf
        self.preconditioner = self.function.preconditioner()
        self.inverse, self._pairs = inverse or self.new_inverse(), 0 if inverse is None else 1
        self._usual_size, self._wrong = 1.0, 0

    def step(self) -> Reason:
        return self.on_level(self.iteration)

    def on_level(self, iteration: Callable[[], Reason]) -> Reason:
        """An iteration on the present level, or on the next finer one where this has nothing left to say.

        Args:
            iteration: moves x, f and g of this object.
        """
        before = self.level
        if self.level and self._has_left():
            self._refine()
            if self.optimality() <= self.gtol:
                return Reason.ITERATING
        reason = iteration()
        self._taken += 1
        if self.level < before:
            self.note = f"level {self.level} {self.note}".strip()
        if reason < 0 and self.level:  # nothing more to gain here
            self._refine()
            return Reason.ITERATING
        return reason

    def _has_left(self) -> bool:
        """Whether this level has no more to say of the next finer one: its own error is most of what is left."""
        if self.optimality() <= self.gtol:
            return True
        if not self.settings.gap or self._taken % STEPS_BETWEEN_LOOKS != STEPS_BETWEEN_LOOKS - 1:
            return False
        return not self.levels[self.level - 1].value(self.x) - self.f <= self.settings.gap * abs(self.f)

    def _refine(self) -> None:
        self.level -= 1
        self.function = self.inverse.function = self.levels[self.level]
        self.f, self.g = self.function.value_and_gradient(self.x)

    def test(self, record: DescentRecord) -> Reason:
        reason = super().test(record)
        only_here = reason in (Reason.CONVERGED_OPTIMALITY, Reason.CONVERGED_TARGET) and self.level > 0
        return Reason.ITERATING if only_here else reason

    def result(self, reason: Reason, message: str, history: History) -> Result:
        """The last point, or the start where that is better on the finest level."""
        found, (x, value) = super().result(reason, message, history), self._first
        if len(self.levels) > 1:
            f = self.levels[0].value(self.x) if self.level else self.f
            found.value = f * self.unit
            if not f <= value:
                found.design, found.value = x, value * self.unit
        return found

    def direction(self) -> Tensor:
        """-H f', where to go."""
        return -self.inverse.times(self.g)

    def learn(self, s: Tensor, y: Tensor) -> None:
        """Take in the pair of a step that something else has made."""
        if self.inverse.update(s, y):
            self._pairs += 1

    def iteration(self, along: Tensor | None = None) -> Reason:
        """Move x, f and g on this level.

        Args:
            along: direction with a negative slope; -H f' by default.
        """
        direction, is_newton = (self.direction(), True) if along is None else (along, False)
        ray, size = self._search(direction)
        first = ray
        self.note = ""
        self._wrong = self._wrong + 1 if first.doubt.is_settled else 0
        if size is None and self._pairs and self._wrong < MOST_WRONG:  # H may be what is wrong
            self.inverse, self._pairs, self.note, is_newton = self.new_inverse(), 0, "restarted", True
            self._usual_size = 1.0
            ray, size = self._search(self.direction())
        if size is None:
            return self.why_none(first, ray)
        x, f, g = ray.point(size), ray(size), ray.gradient(size)
        curvature = -size * size * ray.slope_at_start if is_newton else None  # of s = -size H g: s.H^-1 s = -size g.s
        if self.inverse.update(x - self.x, g - self.g, curvature, g):
            self._pairs += 1
        else:
            self.note = "no curvature"
        self._usual_size = self._usual_size**0.8 * size**0.2
        self.x, self.f, self.g, self.radius = x, f, g, size
        return Reason.ITERATING

    def _search(self, direction: Tensor) -> tuple[Ray, float | None]:
        """A size along a direction; the first trial is 1, or less where it is known to be too long."""
        ray = Ray(self.function, self.x, self.f, self.g, direction, self.highest)
        if not ray.slope_at_start < 0:
            return ray, None
        if not self._pairs and self.preconditioner is None and self.settings.first_step == "normalized":
            trial = min(1.0, 1.0 / self.function.norm(self.g))
        else:  # where H is too large on the average, a little more than the geometric mean of the last sizes
            trial = 1.0 if self.inverse.unit_steps else min(1.0, 1.2 * self._usual_size)
        return ray, self.search.along(ray, trial)

    def memory(self) -> dict[str, Any]:
        inverse = flattened({"inverse": self.inverse.memory()})
        own = {"pairs": self._pairs, "usual_size": self._usual_size, "level": self.level, "taken": self._taken}
        own |= {"wrong": self._wrong}
        return super().memory() | own | {"first.x": self._first[0].clone(), "first.f": self._first[1]} | inverse

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self.level, self._taken = int(memory["level"]), int(memory["taken"])
        self.function = self.levels[self.level]
        self._first = (memory["first.x"].clone(), float(memory["first.f"]))
        self.preconditioner = self.levels[-1].preconditioner()  # that of the start
        self._pairs, self.inverse = int(memory["pairs"]), self.new_inverse()
        self._usual_size, self._wrong = float(memory["usual_size"]), int(memory["wrong"])
        self.inverse.recall(part_of(memory, "inverse"))


def search_setting() -> Any:
    """The setting `line_search`: how far a step goes."""
    return setting(
        "wolfe", "line search: strong Wolfe, or Armijo with quadratic or cubic backtracking", choices=tuple(SEARCHES)
    )


def gap_setting() -> Any:
    """The setting `gap`: when a level of a hierarchy with common unknowns is left."""
    return setting(
        2.0,
        "excess of the next finer level's value, relative to the present one, that ends a level; 0: none does",
        at_least=0,
    )


def first_step_setting() -> Any:
    """The setting `first_step`: the first trial of a run, before there is a pair."""
    return setting(
        "normalized",
        "first trial step of a run: the gradient, shortened to length 1 (normalized) or not (unit)",
        choices=("normalized", "unit"),
    )


@dataclass(frozen=True)
class LBFGSSettings(Settings, prefix="lbfgs_"):
    """Limited-memory BFGS."""

    memory: int = setting(10, "secant pairs that are kept; 0 for steepest descent", at_least=0)
    line_search: str = search_setting()
    first_step: str = first_step_setting()
    gap: float = gap_setting()


class LBFGS(QuasiNewton):
    """L-BFGS (D. C. Liu, J. Nocedal, Math. Program. 45, 1989) in compact form."""

    Settings = LBFGSSettings

    def new_inverse(self) -> LimitedMemory:
        return LimitedMemory(self.function, self.settings.memory, self.preconditioner)


@dataclass(frozen=True)
class SSBroydenSettings(Settings, prefix="ssbroyden_"):
    """Dense quasi-Newton methods of the self-scaled Broyden class."""

    update: str = setting(
        "ssbroyden",
        "update of the inverse Hessian: self-scaled Broyden, self-scaled BFGS, or BFGS",
        choices=("ssbroyden", "ssbfgs", "bfgs"),
    )
    line_search: str = search_setting()
    first_step: str = first_step_setting()
    gap: float = gap_setting()


class SSBroyden(QuasiNewton):
    """Dense quasi-Newton methods of the self-scaled Broyden class; n^2 numbers, so for n up to some 10^4.

    Args:
        team: communicator whose ranks share the rows of H, where the unknowns are on every rank; see `DenseInverse`.
    """

    Settings = SSBroydenSettings
    inverse: DenseInverse

    def __init__(self, function: SmoothFunction | None = None, *args: Any, team: Any = None, **defaults: Any) -> None:
        self.team = team
        super().__init__(function, *args, **defaults)

    def new_inverse(self) -> DenseInverse:
        return DenseInverse(self.function, self.settings.update, self.team, self.preconditioner)
