"""MLVR: variance reduction as a multilevel method, whose levels are nested samples with identities as transfers.

A. Braglia, A. Kopanicakova, R. Krause (arXiv 2006.15602). Level 0, the finest, has all samples. A coarse function is
consistent to first order with the finer one, h(x) = f_S(x) + (g - f_S'(x_0)).(x - x_0); what minimizing it gains is
the direction of a line search on the finer level. SVRG, SARAH and sub-sampled Newton are settings of two levels:

    method   coarse     steps            batch         redraw   reference   memory  sampling
    SVRG     gradient   inner length     1, or more    step     snapshot    0       uniform
    SARAH    gradient   inner length     1, or more    step     previous    0       uniform
    SSN      newton     1                the sample    cycle    snapshot    0       uniform
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.core.settings import Settings, setting
from pdeopt.functions.smooth import FirstOrderConsistent, SampledFunction, SmoothFunction
from pdeopt.functions.subsampling import SAMPLINGS, NestedSample, generator, uniform_numbers
from pdeopt.optimize.descent.astrom import around
from pdeopt.optimize.descent.minimizer import Minimizer, StopSettings, flattened, part_of
from pdeopt.optimize.descent.quasinewton import LBFGS, LBFGSSettings
from pdeopt.optimize.descent.trust import TrustRegionMinimizer, TrustSettings
from pdeopt.optimize.parts.inversehessian import LimitedMemory
from pdeopt.optimize.parts.linesearch import SEARCHES, Ray
from pdeopt.optimize.parts.trustsubproblem import steihaug

#: Newton steps are at most this many times as long as max(1, |x|).
LONGEST_NEWTON_STEP = 100.0
#: Nested iteration reduces gradients to this part of the first.
NESTED_RTOL = 1e-2


@dataclass(frozen=True)
class MLVRSettings(Settings, prefix="mlvr_"):
    """Multilevel variance reduction (MLVR)."""

    levels: int = setting(3, "nested samples, all of them included", at_least=2)
    coarsening: float = setting(0.17, "samples of a level as part of the next finer one's", above=0, at_most=1)
    batch: int = setting(0, "samples of the coarsest level; 0: by coarsening", at_least=0)
    sampling: str = setting(
        "curvature", "how samples are drawn: where the curvature is, or uniformly", choices=SAMPLINGS
    )
    redraw: str = setting(
        "never",
        "when new samples are drawn: never, in each cycle, in each step of the coarsest level",
        choices=("never", "cycle", "step"),
    )
    coarse: str = setting("newton", "steps on the coarsest level", choices=("gradient", "newton", "lbfgs"))
    steps: int = setting(1, "steps on the coarsest level, a cycle; 0: as many as samples", at_least=0)
    cycles: int = setting(3, "cycles of each level between, in a cycle of the next finer one", at_least=1)
    reference: str = setting(
        "snapshot",
        "where coarse gradients are consistent: where their steps begin, or the step before",
        choices=("snapshot", "previous"),
    )
    step_size: float = setting(0.0, "length of gradient steps; 0: 1/L, L the largest curvature met", at_least=0)
    nested: int = setting(
        3, "cycles of each coarser level before the first of all, nested iteration; 0 for none", at_least=0
    )
    memory: int = setting(40, "secant pairs of each level but the coarsest; 0 for none", at_least=0)
    cg_rtol: float = setting(0.3, "relative residual at which conjugate gradients end", at_least=0, at_most=1)
    cg_max_it: int = setting(500, "Hessian products a Newton step at most", at_least=1)
    seed: int = setting(0, "seed of the samples")


class MLVR(Minimizer):
    """x <- x + size d, d the correction of the coarser levels, preconditioner of L-BFGS where there is `memory`.

    A cycle that does not decrease f is replaced by a step of steepest descent, and later gradient steps are half as
    long.

    Raises:
        InputError: a function without samples, or fewer samples than levels need.
    """

    Settings = MLVRSettings
    function: SampledFunction
    is_monotone = True

    def adopt(self, function: Any) -> None:
        """Prepare for this function, a `SampledFunction`."""
        if not isinstance(function, SampledFunction):
            raise InputError("function of MLVR", type(function).__name__, "a SampledFunction")
        super().adopt(function)
        self.settings = settings = replace(self.settings, steps=self.settings.steps or function.samples)
        if settings.redraw == "step" and settings.coarse != "gradient":
            raise InputError("redraw", f"step, with coarse {settings.coarse}", "never | cycle, or coarse gradient")
        if settings.levels > 2 and function.samples * settings.coarsening ** (settings.levels - 2) < 1:
            raise InputError("levels of samples", settings.levels, f"fewer, for {function.samples} samples")
        self.sizes = [round(function.samples * settings.coarsening**level) for level in range(settings.levels)]
        self.sizes[-1] = settings.batch or max(self.sizes[-1], 1)
        if sorted(self.sizes, reverse=True) != self.sizes:
            raise InputError("samples of the levels", self.sizes, "not more than on the next finer level")

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        super().start(x, known)
        self._random, self._shorter, self._largest = generator(self.settings.seed), 1.0, 0.0
        self._draw()
        self._prepare()
        if self.settings.nested and math.isfinite(self.f):
            self._begin_coarse()

    def _begin_coarse(self) -> None:
        """Nested iteration: first minimize on the coarser levels, of which each begins where the last has ended."""
        parts = [self.function]
        for level in range(self.settings.levels - 1):
            parts.append(self._part(level, parts[-1], self.x))
        x, norm = self.x, self.function.norm(self.g)
        stop = StopSettings(max_it=10 * self.settings.nested, gtol=NESTED_RTOL * norm)
        x = TrustRegionMinimizer(parts[-1], TrustSettings(model="hvp"), stop).minimize(x, unit=1.0).design
        for level in reversed(range(1, self.settings.levels - 1)):
            f, g = parts[level].value_and_gradient(x)
            for _ in range(self.settings.nested):
                moved = self._cycle(level, parts[level], parts[level], x, f, g)
                if moved is None or self.function.norm(g) <= NESTED_RTOL * norm:
                    break
                ray, size = moved
                x, f, g = ray.point(size), ray(size), ray.gradient(size)
        f, g = self.function.value_and_gradient(x)
        if f < self.f:
            self.x, self.f, self.g = x, f, g

    def _prepare(self) -> None:
        memory = self.settings.memory
        self._pairs = [LimitedMemory(self.function, memory) for _ in range(self.settings.levels - 1)]

    def _draw(self) -> None:
        """Random numbers of the nested samples, a tensor for each level but the finest."""
        self._u = [uniform_numbers(size, self._random) for size in self.sizes[:-1]]

    def step(self) -> Reason:
        self.note = ""
        if self.settings.redraw == "cycle":
            self._draw()
        moved = self._cycle(0, self.function, self.function, self.x, self.f, self.g)
        if moved is None:
            self.note, self._shorter = "steepest descent", 0.5 * self._shorter
            self._pairs[0].reset()
            ray = Ray(self.function, self.x, self.f, self.g, -self.g, self.highest)
            size = SEARCHES["armijo"].along(ray, min(1.0, 1.0 / self.function.norm(self.g)))
            if size is None:
                return self.why_none(ray)
            moved = ray, size
        ray, self.radius = moved
        self.x, self.f, self.g = ray.point(self.radius), ray(self.radius), ray.gradient(self.radius)
        return Reason.ITERATING

    def _cycle(
        self, level: int, h: SmoothFunction, samples: SampledFunction, x: Tensor, f: float, g: Tensor
    ) -> tuple[Ray, float] | None:
        """A line search on h, corrected mean over `samples`, along the coarser levels' direction; None if it fails."""
        d = self._direction(level, samples, x, g)
        if d is None or not bool(torch.isfinite(d).all()):
            return None
        ray = Ray(h, x, f, g, d, math.inf if level else self.highest)
        size = SEARCHES["armijo"].along(ray) if ray.slope_at_start < 0 else None
        if size is None:
            return None
        s, y = d * size, ray.gradient(size) - g
        self._pairs[level].update(s, y)
        self._largest = max(self._largest, self.function.dot(y, y) / max(self.function.dot(s, y), 1e-300))
        return ray, size

    def _direction(self, level: int, samples: SampledFunction, x: Tensor, g: Tensor) -> Tensor | None:
        """-H g, H of L-BFGS around the correction of the next coarser level."""
        part = self._part(level, samples, x)
        found = around(self._pairs[level], g, lambda q: self._correction(level + 1, part, x, q))
        return None if found is None else -found

    def _part(self, level: int, samples: SampledFunction, x: Tensor) -> SampledFunction:
        """The function of the next coarser level; all of its samples where each step draws new ones."""
        if self.settings.redraw == "step" and level == self.settings.levels - 2:
            return samples
        return NestedSample(samples, self.settings.sampling, self._u[level]).of_size(self.sizes[level + 1], x)

    def _correction(self, level: int, samples: SampledFunction, x: Tensor, q: Tensor) -> Tensor:
        """x - x_+, x_+ after steps down the function of this level that has the gradient q at x: about f''^-1 q."""
        if level == self.settings.levels - 1:
            if self.settings.coarse == "gradient":
                return x - self._gradient(samples, x, q)
            return x - {"newton": _newton, "lbfgs": _lbfgs}[self.settings.coarse](self.settings, samples, x, q)
        at, g = x, q
        if self.settings.cycles > 1:
            f, model_gradient = samples.value_and_gradient(x)
            h = FirstOrderConsistent(samples, x, q, model_gradient)
            for _ in range(self.settings.cycles - 1):
                moved = self._cycle(level, h, samples, at, f, g)
                if moved is None:
                    break
                ray, size = moved
                at, f, g = ray.point(size), ray(size), ray.gradient(size)
        d = self._direction(level, samples, at, g)  # the finer level looks for the size of the last
        return x - at if d is None else x - at - d

    def _gradient(self, samples: SampledFunction, x: Tensor, g: Tensor) -> Tensor:
        """Steps along the negative gradient of the corrected function; the first gradient is g whatever the sample."""
        settings, reference, v = self.settings, x, g
        size = self._shorter * (settings.step_size or 1.0 / (self._largest or self._curvature(samples, x, g)))
        at = x - size * v
        part = samples
        for _ in range(settings.steps - 1):
            if settings.redraw == "step":
                part = samples.subset(torch.randint(samples.samples, (self.sizes[-1],), generator=self._random))
            _, w = FirstOrderConsistent(part, reference, g).value_and_gradient(at)
            if settings.reference == "previous":
                reference, g = at, w
            at = at - size * w
        return at

    def _curvature(self, samples: SampledFunction, x: Tensor, g: Tensor) -> float:
        """Of the function along g."""
        norm = self.function.norm(g)
        d = g / max(norm, 1e-300)
        self._largest = self.function.norm(samples.hvp(x, d)) or 1.0
        return self._largest

    def memory(self) -> dict[str, Any]:
        own = {"random": self._random.get_state(), "shorter": self._shorter, "largest": self._largest}
        own |= {f"u{level}": u.clone() for level, u in enumerate(self._u)}
        pairs = {f"pairs{level}": pairs.memory() for level, pairs in enumerate(self._pairs)}
        return super().memory() | own | flattened(pairs)

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self._random = generator(0, memory["random"])
        self._shorter, self._largest = float(memory["shorter"]), float(memory["largest"])
        self._u = [memory[f"u{level}"].clone() for level in range(self.settings.levels - 1)]
        self._prepare()
        for level, pairs in enumerate(self._pairs):
            pairs.recall(part_of(memory, f"pairs{level}"))


def _newton(settings: MLVRSettings, samples: SampledFunction, x: Tensor, g: Tensor) -> Tensor:
    """Newton steps by conjugate gradients, with line searches but for the last, which the finer level has."""
    h: FirstOrderConsistent | None = None
    at, f = x, math.nan
    for remaining in reversed(range(settings.steps)):
        radius, times = LONGEST_NEWTON_STEP * max(1.0, samples.norm(at)), partial(samples.hvp, at)
        d = steihaug(samples, times, g, radius, settings.cg_rtol, settings.cg_max_it).d
        if remaining == 0:
            return at + d
        if h is None:
            f, model_gradient = samples.value_and_gradient(x)
            h = FirstOrderConsistent(samples, x, g, model_gradient)
        ray = Ray(h, at, f, g, d)
        size = SEARCHES["armijo"].along(ray) if ray.slope_at_start < 0 else None
        if size is None:
            return at
        at, f, g = ray.point(size), ray(size), ray.gradient(size)
    return at


def _lbfgs(settings: MLVRSettings, samples: SampledFunction, x: Tensor, g: Tensor) -> Tensor:
    """L-BFGS on the corrected function."""
    f, model_gradient = samples.value_and_gradient(x)
    h = FirstOrderConsistent(samples, x, g, model_gradient)
    stop = StopSettings(max_it=settings.steps, gtol=settings.cg_rtol * samples.norm(g))
    solver = LBFGS(h, LBFGSSettings(), stop)
    found: Tensor = solver.minimize(x, known=(f, g), unit=1.0).design
    return found
