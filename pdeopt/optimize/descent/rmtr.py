"""RMTR: the recursive multilevel trust-region method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pdeopt.core.monitor import Reason
from pdeopt.core.settings import setting
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.descent.minimizer import Minimizer, flattened, part_of
from pdeopt.optimize.descent.multilevel import Multilevel, MultilevelSettings
from pdeopt.optimize.descent.trustsettings import ModelSettings, RatioSettings
from pdeopt.optimize.parts.progress import Doubt
from pdeopt.optimize.parts.trustregion import has_vanished, reduction_ratio

#: A coarse level rests where less than this part of the way that it may go is left.
LEAST_ROOM = 1e-2


@dataclass(frozen=True)
class RMTRSettings(MultilevelSettings, RatioSettings, ModelSettings, prefix="rmtr_"):
    """Recursive multilevel trust-region method (RMTR)."""

    radius: float = setting(
        1.0, "first trust radius of the steps; corrections are first limited by their ratio", above=0, at_most=1e100
    )
    poor: float = setting(
        0.1, "ratio of actual to predicted decrease below which the radius shrinks", above=0, at_most=1
    )


class TrustSmoother(Minimizer):
    """Trust-region steps that stay within a ball; their model and radius are kept where the function changes by a
    linear term.

    Attributes:
        center, room: the ball, |x - center| <= room.
    """

    Settings = RMTRSettings

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        super().start(x, known)
        self.radius, self.doubt = self.settings.radius, Doubt()
        self._prepare()

    def _prepare(self) -> None:
        self.model = self.settings.trust_model(self.function)
        self.center, self.room = self.x, math.inf

    def place(self, center: Tensor, room: float) -> None:
        """Begin in another ball, for the function that is now attached."""
        self.center, self.room, self.model.function, self.doubt = center, room, self.function, Doubt()

    def left(self) -> float:
        """How far x may go."""
        return self.room - self.function.norm(self.x - self.center) if math.isfinite(self.room) else math.inf

    def step(self) -> Reason:
        radius = min(self.radius, self.left())
        if not radius > 0.0:  # at the edge
            return Reason.ITERATING
        step = self.model.step(self.x, self.g, radius)
        self.is_limited = step.on_boundary
        ratio = self.attempt(step.d, step.decrease)
        rule = self.settings.rule
        if radius == self.radius or not ratio >= rule.poor:
            self.radius = rule.after(ratio, radius, self.function.norm(step.d)) * self.doubt.shrink
        vanished = has_vanished(self.radius, self.function.norm(self.x)) or self.doubt.is_settled
        return Reason.DIVERGED_STAGNATION if vanished else Reason.ITERATING

    def attempt(self, d: Tensor, predicted: float) -> float:
        """The ratio of actual to predicted decrease of a step, taken if it serves; the model learns in any case."""
        x = self.x + d
        f, g = self.function.value_and_gradient(x)
        self.note = "rejected"
        self.doubt.judge(self.f, f, self.function.dot(self.g, d), lambda: self.function.dot(g, d))
        if not (math.isfinite(f) and math.isfinite(self.function.norm(g))):
            return -math.inf
        self.model.update(d, g - self.g)
        ratio = reduction_ratio(self.f, f, predicted)
        ratio = ratio if f <= self.highest else -math.inf
        if ratio >= self.settings.accept:
            self.x, self.f, self.g, self.note = x, f, g, ""
        return ratio

    def memory(self) -> dict[str, Any]:
        return super().memory() | flattened({"model": self.model.memory()}) | {"doubt": self.doubt.count}

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self.doubt = Doubt(int(memory["doubt"]))
        self._prepare()
        self.model.recall(part_of(memory, "model"))


class RMTR(Multilevel):
    """Trust-region steps on each level, and corrections judged as steps are, by the ratio of fine to coarse decrease.

    (S. Gratton, A. Sartenaer, Ph. L. Toint, SIAM J. Optim. 19, 2008; A. Kopanicakova, R. Krause, SIAM J. Sci. Comput.
    45, 2023). With one level it is a trust-region method.

    A coarse level stays within the radius of the correction that it makes. Corrections have a radius of their own: they
    only add to the decrease of the steps, whose model is another; so the method converges as these do (A. R. Conn,
    N. I. M. Gould, Ph. L. Toint, Trust-Region Methods, 2000, section 10.4).
    """

    Settings = RMTRSettings

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        super().start(x, known)
        self.radii = [math.inf] * len(self.hierarchy)  # of the corrections of each level

    def smoother(self, function: SmoothFunction) -> TrustSmoother:
        return TrustSmoother(function, self.settings, self.stop)

    def enter(self, level: int, reach: float) -> None:
        self.levels[level].place(self.levels[level].x, reach)

    def reach(self, level: int) -> float:
        return float(min(self.radii[level], self.levels[level].left()))

    def rests(self, level: int) -> bool:
        smoother = self.levels[level]
        return super().rests(level) or (math.isfinite(smoother.room) and smoother.left() <= LEAST_ROOM * smoother.room)

    def take(self, level: int, d: Tensor, decrease: float) -> bool:
        fine, length = self.levels[level], self.function.norm(d)
        ratio = fine.attempt(d, decrease)
        self.radii[level] = self.settings.rule.after(ratio, self.radii[level], length)
        return bool(ratio >= self.settings.accept)

    def memory(self) -> dict[str, Any]:
        return super().memory() | {"radii": list(self.radii)}  # some are infinite

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self.radii = [float(radius) for radius in memory["radii"]]
