"""Multilevel optimization: steps on each level, and corrections from the next coarser one.

On level l a smoother, any `Minimizer`, goes down the model h_l: f_0 on the finest level, and f_l with the additive
first-order correction on the others, so that h_{l+1}' = R h_l' where the coarse level begins. What its steps found,
P (y+ - y), is a correction of the fine iterate. How far it is trusted, a subclass says: `MGOPT` searches along it,
`RMTR` compares the decrease on both levels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.monitor import Reason
from pdeopt.core.settings import Section, Settings, setting
from pdeopt.functions.hierarchy import Hierarchy, as_hierarchy
from pdeopt.functions.smooth import FirstOrderConsistent, SmoothFunction
from pdeopt.optimize.descent.minimizer import Minimizer, StopSettings, flattened, part_of
from pdeopt.optimize.descent.quasinewton import LBFGS, QuasiNewton, SSBroyden
from pdeopt.optimize.parts.linesearch import Backtracking, Ray

#: Smoothers of MG/OPT by their names in options.
SMOOTHERS: dict[str, type[Minimizer]] = {"lbfgs": LBFGS, "ssbroyden": SSBroyden}
#: A correction that serves does so nearly as it is.
CORRECTION_SEARCH = Backtracking(cubic=True, scale=0.0, shortest=1e-3)


@dataclass(frozen=True)
class MultilevelSettings(Settings):
    """Cycles over levels."""

    cycle: str = setting(
        "V", "cycle: V visits the next coarser level once, F once more by a V-cycle", choices=("V", "F")
    )
    start: str = setting(
        "fine",
        "where a run begins: on the finest level, or by nested iteration on the coarsest",
        choices=("fine", "nested"),
    )
    pre: int = setting(1, "smoothing steps before a coarse correction", at_least=0)
    post: int = setting(1, "smoothing steps after a coarse correction", at_least=0)
    coarse: int = setting(20, "steps on the coarsest level", at_least=1)
    nested: int = setting(30, "steps on the coarsest level in nested iteration", at_least=1)
    kappa: float = setting(
        0.1, "part of the gradient that a coarser level must see to be visited: |R g| >= kappa |g|", at_least=0
    )


class Multilevel(Minimizer):
    """Cycles over the levels of a `Hierarchy`; of another function, smoothing steps alone.

    Pairs and radii of a smoother stay with its level from cycle to cycle: models of a level differ by a linear term.

    Attributes:
        levels: the smoothers, finest first.
        accepted, rejected: corrections, of all levels.
    """

    levels: list[Any]
    hierarchy: Hierarchy
    is_monotone = True

    @abstractmethod
    def smoother(self, function: SmoothFunction) -> Any:
        """What makes the steps on the level of a function."""

    @abstractmethod
    def take(self, level: int, d: Tensor, decrease: float) -> bool:
        """Move the iterate of a level by the correction d, (size,), or a part of it; False if it does not serve.

        Args:
            decrease: of the coarse model.
        """

    def enter(self, level: int, reach: float) -> None:
        """A coarser level begins at its smoother's x, and may go as far as `reach` from it."""

    def reach(self, level: int) -> float:
        """How far a correction of this level's iterate may go."""
        return math.inf

    def rests(self, level: int) -> bool:
        """Whether there is nothing to do on a level."""
        return bool(self.levels[level].optimality() <= self.gtol)

    def adopt(self, function: SmoothFunction) -> None:
        self.hierarchy = as_hierarchy(function)
        super().adopt(self.hierarchy)

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        super().start(x, known)
        self.levels = [self.smoother(f) for f in self.hierarchy.functions]
        known = self.f, self.g
        for smoother, transfer in zip(self.levels, [*self.hierarchy.transfers, None]):
            smoother.radius, smoother.note = math.nan, ""
            smoother.start(x, known)
            if transfer is not None:  # placed where they are visited, the coarser ones need no value now
                x = transfer.project(x)
                known = math.inf, torch.zeros_like(x)
        self.accepted = self.rejected = 0
        self._is_nested = self.settings.start == "nested" and len(self.hierarchy) > 1

    def step(self) -> Reason:
        fine, before, counts = self.levels[0], self.levels[0].x, (self.accepted, self.rejected)
        reason = self._nested_iteration() if self._is_nested else self._cycle(0, self.settings.cycle)
        self.x, self.f, self.g, self.radius = fine.x, fine.f, fine.g, fine.radius
        self.is_limited = fine.is_limited
        accepted, rejected = self.accepted - counts[0], self.rejected - counts[1]
        self.note = fine.note if len(self.hierarchy) == 1 else f"{accepted} corrections, {rejected} rejected"
        return reason if fine.x is before else Reason.ITERATING

    def _cycle(self, level: int, kind: str) -> Reason:
        """A cycle from this level down and back; why its last smoothing stopped."""
        settings = self.settings
        if level + 1 == len(self.hierarchy):
            return self._smooth(level, settings.coarse if level else settings.pre + settings.post)
        reason = self._smooth(level, settings.pre)
        self._correct(level, kind)
        return self._smooth(level, settings.post) if settings.post else reason

    def _smooth(self, level: int, steps: int) -> Reason:
        for _ in range(steps):
            if self.rests(level):
                break
            reason: Reason = self.levels[level].step()
            if reason != Reason.ITERATING:
                return reason
        return Reason.ITERATING

    def _correct(self, level: int, kind: str) -> None:
        """A cycle of the next coarser level, as a correction of this one."""
        transfer, function = self.hierarchy.transfers[level], self.hierarchy.functions[level + 1]
        fine, coarse = self.levels[level], self.levels[level + 1]
        g = transfer.restrict(fine.g)
        if not function.norm(g) > max(self.settings.kappa * fine.optimality(), self.gtol):
            return
        y = transfer.project(fine.x)
        f, own = function.value_and_gradient(y)
        if not (math.isfinite(f) and math.isfinite(function.norm(own))):
            self.rejected += 1
            return
        self._place(level + 1, FirstOrderConsistent(function, y, g, own), y, f, g, self.reach(level) / transfer.norm)
        self._cycle(level + 1, kind)
        if kind == "F" and level + 2 < len(self.hierarchy):
            self._cycle(level + 1, "V")
        if coarse.f < f and self.take(level, transfer.prolong(coarse.x - y), f - coarse.f):
            self.accepted += 1
        else:
            self.rejected += 1

    def _place(self, level: int, model: SmoothFunction, x: Tensor, f: float, g: Tensor, reach: float) -> None:
        """Let a level's smoother go on with another model, from x where this has the value f and the gradient g."""
        smoother = self.levels[level]
        smoother.attach(model)
        smoother.x, smoother.f, smoother.g, smoother.highest = x, f, g, math.inf
        self.enter(level, reach)

    def _nested_iteration(self) -> Reason:
        """Full multigrid: from the coarsest function itself to the finest, with a cycle on each level between."""
        self._is_nested = False
        functions, transfers, coarsest = self.hierarchy.functions, self.hierarchy.transfers, len(self.hierarchy) - 1
        start = [self.x]
        for transfer in transfers:
            start.append(transfer.project(start[-1]))
        x = start[-1]
        for level in range(coarsest, 0, -1):
            f, g = functions[level].value_and_gradient(x)
            if not math.isfinite(f):
                self.rejected += 1
                return Reason.ITERATING
            self._place(level, functions[level], x, f, g, math.inf)
            if level == coarsest:
                self._smooth(level, self.settings.nested)
            else:
                self._cycle(level, self.settings.cycle)
            x = start[level - 1] + transfers[level - 1].prolong(self.levels[level].x - start[level])
        f, g = self.function.value_and_gradient(x)
        if f < self.f and math.isfinite(self.function.norm(g)):  # false for NaN
            fine = self.levels[0]
            fine.x, fine.f, fine.g = x, f, g
            self.accepted += 1
        else:
            self.rejected += 1
        return Reason.ITERATING

    def memory(self) -> dict[str, Any]:
        own = {"accepted": self.accepted, "rejected": self.rejected, "is_nested": float(self._is_nested)}
        levels = flattened({str(level): smoother.memory() for level, smoother in enumerate(self.levels)})
        return super().memory() | own | levels

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self.accepted, self.rejected = int(memory["accepted"]), int(memory["rejected"])
        self._is_nested = bool(memory["is_nested"])
        self.levels = [self.smoother(f) for f in self.hierarchy.functions]
        for level, smoother in enumerate(self.levels):
            smoother.recall(part_of(memory, str(level)))


@dataclass(frozen=True)
class MGOPTSettings(MultilevelSettings, prefix="mgopt_"):
    """Multilevel optimization with a line search (MG/OPT)."""

    smoother: str = setting(
        "lbfgs",
        "method of the steps on each level",
        choices=tuple(SMOOTHERS),
        reads={name: (Section(method.Settings, "mgopt_"),) for name, method in SMOOTHERS.items()},
    )
    descent: float = setting(
        1e-6, "smallest cosine between a correction and the steepest descent at which it serves", at_least=0
    )


class MGOPT(Multilevel):
    """MG/OPT, with a line search along corrections.

    (S. G. Nash, A multigrid approach to discretized optimization problems, Optim. Methods Softw. 14, 2000; safeguards
    of Z. Wen, D. Goldfarb, SIAM J. Optim. 20, 2009).

    With one level it is its smoother.

    Args:
        function, settings, stop, prefix, **defaults: as of `Minimizer`; smoothers read the options
            `-{prefix}mgopt_lbfgs_*` or `-{prefix}mgopt_ssbroyden_*`.
    """

    Settings = MGOPTSettings

    def __init__(
        self,
        function: SmoothFunction | None = None,
        settings: Any = None,
        stop: StopSettings | None = None,
        prefix: str = "",
        **defaults: Any,
    ) -> None:
        self._prefix = prefix + self.Settings.prefix
        super().__init__(function, settings, stop, prefix, **defaults)

    def smoother(self, function: SmoothFunction) -> Minimizer:
        return SMOOTHERS[self.settings.smoother](function, stop=self.stop, prefix=self._prefix)

    def take(self, level: int, d: Tensor, decrease: float) -> bool:
        fine = self.levels[level]
        ray = Ray(fine.function, fine.x, fine.f, fine.g, d, fine.highest)
        if not -ray.slope_at_start >= self.settings.descent * fine.optimality() * fine.function.norm(d):
            return False
        size = CORRECTION_SEARCH.along(ray)
        if size is None:
            return False
        x, f, g = ray.point(size), ray(size), ray.gradient(size)
        if isinstance(fine, QuasiNewton):
            fine.inverse.update(x - fine.x, g - fine.g)
        fine.x, fine.f, fine.g = x, f, g
        return True
