"""ASTROM: a trust-region method of two levels, all samples and a part of them that grows where it has to.

The fine level has values and gradients of all samples, the coarse level Hessian products of a few. What makes few do:
they are drawn where the curvature is (`pdeopt.functions.subsampling`), and secant pairs of the fine level correct their
Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.core.settings import Settings, setting
from pdeopt.functions.smooth import SampledFunction
from pdeopt.functions.subsampling import SAMPLINGS, NestedSample, generator, uniform_numbers
from pdeopt.optimize.descent.minimizer import Minimizer, flattened, part_of
from pdeopt.optimize.parts.inversehessian import LimitedMemory
from pdeopt.optimize.parts.progress import Doubt
from pdeopt.optimize.parts.trustmodel import HessianProducts
from pdeopt.optimize.parts.trustregion import RatioRule, has_vanished, reduction_ratio
from pdeopt.optimize.parts.trustsubproblem import TrustStep, steihaug


@dataclass(frozen=True)
class ASTROMSettings(Settings, prefix="astrom_"):
    """Adaptive sampling trust-region method (ASTROM)."""

    share: float = setting(
        0.01, "part of the samples in the first coarse level; 1 is batch trust region", above=0, at_most=1
    )
    sampling: str = setting(
        "curvature", "how samples are drawn: where the curvature is, or uniformly", choices=SAMPLINGS
    )
    growth: float = setting(4.0, "factor by which the sample grows in a step at most", at_least=1)
    error: float = setting(0.3, "|1 - fine / coarse decrease| above which the sample grows", above=0)
    memory: int = setting(5, "secant pairs of the fine level that correct the coarse Hessian", at_least=0)
    radius: float = setting(1.0, "first trust radius", above=0, at_most=1e100)
    cg_rtol: float = setting(0.08, "relative residual at which conjugate gradients end", above=0, at_most=1)
    cg_max_it: int = setting(500, "Hessian products a step at most", at_least=1)
    accept: float = setting(1e-4, "ratio of fine to coarse decrease from which a step is taken", above=0)
    seed: int = setting(0, "seed of the samples")


class ASTROM(Minimizer):
    """x <- x + d, d the minimizer in a ball of a quadratic model with the gradient of all samples.

    The model's Hessian is that of a sample, corrected by the last secant pairs: L-BFGS whose first inverse Hessian is
    a solve by conjugate gradients with the sample's Hessian. Near the boundary of the ball the sample's Hessian serves
    alone (Steihaug). The ratio of the fine to the coarse, predicted decrease sets the radius, and the sample: its error
    falls with the root of its size, so the next is ((1 - ratio) / error)^2 times as large, within `growth`. Samples
    are nested. Once they are all, this is the batch trust-region method with Hessian products.

    Attributes:
        samples: in the coarse level.

    Raises:
        InputError: a function without samples.
    """

    Settings = ASTROMSettings
    function: SampledFunction
    is_monotone = True
    rule = RatioRule(grow=3.0)

    def adopt(self, function: Any) -> None:
        """Prepare for this function, a `SampledFunction`."""
        if not isinstance(function, SampledFunction):
            raise InputError("function of ASTROM", type(function).__name__, "a SampledFunction")
        super().adopt(function)

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        super().start(x, known)
        self.samples = max(1, round(self.settings.share * self.function.samples))
        self.radius, self.doubt = self.settings.radius, Doubt()
        self._prepare(uniform_numbers(self.function.samples, generator(self.settings.seed)))

    def _prepare(self, u: Tensor) -> None:
        self._nested = NestedSample(self.function, self.settings.sampling, u)
        self._pairs = LimitedMemory(self.function, self.settings.memory)
        self._coarse: SampledFunction | None = None

    def step(self) -> Reason:
        function, settings = self.function, self.settings
        coarse = self._sample()
        step = self._model_step(coarse)
        self.is_limited = step.on_boundary
        f, g = function.value_and_gradient(self.x + step.d)
        usable = math.isfinite(f) and math.isfinite(function.norm(g)) and f <= self.highest
        ratio = reduction_ratio(self.f, f, step.decrease) if usable else -math.inf
        if usable:
            self._pairs.update(step.d, g - self.g)
        self.doubt.judge(self.f, f, function.dot(self.g, step.d), lambda: function.dot(g, step.d))
        self.radius = self.rule.after(ratio, self.radius, function.norm(step.d)) * self.doubt.shrink
        self.note = f"{self.samples} samples"
        if ratio >= settings.accept:
            self.x, self.f, self.g = self.x + step.d, f, g
            self._coarse = None
        else:
            self.note += ", rejected"
        self._grow(ratio)
        vanished = has_vanished(self.radius, function.norm(self.x)) or self.doubt.is_settled
        return Reason.DIVERGED_STAGNATION if vanished else Reason.ITERATING

    def _sample(self) -> SampledFunction:
        """The coarse level: the sample of the present size at the present point."""
        if self._coarse is None:
            self._coarse = self._nested.of_size(self.samples, self.x)
        return self._coarse

    def _grow(self, ratio: float) -> None:
        factor = (abs(1.0 - ratio) / self.settings.error) ** 2 if math.isfinite(ratio) else math.inf
        if factor > 1.0 and self.samples < self.function.samples:
            size = math.ceil(self.samples * min(factor, self.settings.growth))
            self.samples, self._coarse = min(size, self.function.samples), None

    def _model_step(self, coarse: SampledFunction) -> TrustStep:
        """The step of the corrected model, or that of the sample's own Hessian where the first leaves the ball."""
        settings, x, g = self.settings, self.x, self.g
        if coarse is self.function:
            return HessianProducts(coarse, "2", settings.cg_rtol, settings.cg_max_it).step(x, g, self.radius)

        def solve(q: Tensor) -> TrustStep:
            return steihaug(coarse, lambda d: coarse.hvp(x, d), q, self.radius, settings.cg_rtol, settings.cg_max_it)

        def inner(q: Tensor) -> Tensor | None:
            step = solve(q)
            return None if step.on_boundary else -step.d

        if len(self._pairs.S):
            h = around(self._pairs, g, inner)
            if h is not None and (slope := self.function.dot(g, h)) > 0:
                t = min(1.0, self.radius / self.function.norm(h))
                return TrustStep(h * -t, (t - 0.5 * t * t) * slope, 0, t < 1.0)
        return solve(g)

    def memory(self) -> dict[str, Any]:
        pairs = flattened({"pairs": self._pairs.memory()})
        return (
            super().memory() | {"samples": self.samples, "u": self._nested.u.clone(), "doubt": self.doubt.count} | pairs
        )

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self.samples, self.doubt = int(memory["samples"]), Doubt(int(memory["doubt"]))
        self._prepare(memory["u"].clone())
        self._pairs.recall(part_of(memory, "pairs"))


def around(pairs: LimitedMemory, g: Tensor, inner: Callable[[Tensor], Tensor | None]) -> Tensor | None:
    """H g of L-BFGS by the recursion of two loops, `inner` the product with the first H; None where that is none.

    (J. Nocedal, S. J. Wright, Numerical Optimization, 2006, algorithm 7.4.)

    Args:
        pairs: whose S, Y and S'Y are taken.
        g: (size,).
        inner: q -> H_0 q, or None, which ends the recursion.
    """
    function, curvatures = pairs.function, pairs.SY.diagonal().tolist()
    q, sizes = g, []
    for s, y, ys in zip(pairs.S.flip(0), pairs.Y.flip(0), reversed(curvatures)):
        sizes.append(function.dot(s, q) / ys)
        q = q - sizes[-1] * y
    h = inner(q)
    if h is None:
        return None
    for s, y, ys, size in zip(pairs.S, pairs.Y, curvatures, reversed(sizes)):
        h = h + (size - function.dot(y, h) / ys) * s
    return h
