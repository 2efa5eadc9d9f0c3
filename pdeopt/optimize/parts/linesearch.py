"""Line searches: how far along a direction that is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.parts.progress import Doubt

#: Part of the slope that a step may leave whose decrease is lost in rounding errors.
SHORTER_SLOPE = 0.9
#: Differences of values below this part of them are equal to `Backtracking`.
ROUNDING = 1e-14
#: Steps are at most this many times as long as the first trial.
LONGEST = 2.0**64


class Ray:
    """phi(size) = f(x + size d), with the gradients of the trials.

    A trial takes value and gradient at once: most are accepted, and the gradient is then needed.

    Args:
        function, x: f and where the ray begins.
        f, g: value and gradient there.
        d: direction.
        highest: what no step may exceed, not by rounding errors either.

    Attributes:
        doubt: of the derivatives.
        met_finite: whether some trial had a value.
        promised: the largest decrease that a trial's length and the first slope promised, of trials with a value.
    """

    def __init__(
        self, function: SmoothFunction, x: Tensor, f: float, g: Tensor, d: Tensor, highest: float = math.inf
    ) -> None:
        self.function, self.x, self.start, self.d, self.highest = function, x, f, d, highest
        self.slope_at_start = function.dot(g, d)
        self.doubt, self.met_finite, self.promised = Doubt(), False, 0.0
        self._size, self._value, self._gradient = 0.0, f, g
        self._slope: float | None = self.slope_at_start

    def __call__(self, size: float) -> float:
        """phi(size)."""
        if size != self._size:
            self._value, self._gradient = self.function.value_and_gradient(self.point(size))
            self._size, self._slope = size, None
            if math.isfinite(self._value):
                self.met_finite, self.promised = True, max(self.promised, -size * self.slope_at_start)
            self.doubt.judge(self.start, self._value, size * self.slope_at_start, lambda: size * self.slope(size))
        return self._value

    def serves(self, size: float) -> bool:
        """Whether f falls there, or keeps its value but for rounding errors while its slope gets shorter.

        (The approximate Wolfe condition of W. W. Hager, H. Zhang, SIAM J. Optim. 16, 2005.)
        """
        value = self(size)
        if value < self.start:
            return True
        return value <= self.highest and abs(self.slope(size)) <= SHORTER_SLOPE * abs(self.slope_at_start)

    def slope(self, size: float) -> float:
        """phi'(size)."""
        self(size)
        if self._slope is None:
            self._slope = self.function.dot(self._gradient, self.d)
        return self._slope

    def point(self, size: float) -> Tensor:
        """x + size d."""
        return self.x.add(self.d, alpha=size)

    def gradient(self, size: float) -> Tensor:
        """f' there."""
        self(size)
        return self._gradient


class Search(Protocol):
    """How far to go."""

    def along(self, ray: Ray, size: float = 1.0) -> float | None:
        """A step size for this ray; None if there is none."""


@dataclass(frozen=True)
class Backtracking:
    """Armijo backtracking with quadratic or cubic interpolation (Nocedal, Wright 2006, section 3.5).

    Attributes:
        armijo: fraction of the linear decrease that must be reached.
        shortest: step sizes below this end the search.
        cubic: interpolate the last two trials, too.
        scale: values below it are as exact as this one.
    """

    armijo: float = 1e-4
    shortest: float = 1e-10
    cubic: bool = False
    scale: float = 1.0

    def limit(self, start: float, slope: float, size: float) -> float:
        """The largest phi(size) that is a sufficient decrease; differences at rounding level count as equal."""
        return start + self.armijo * size * slope + ROUNDING * max(self.scale, abs(start))

    def sufficient(self, start: float, value: float, slope: float, size: float) -> bool:
        """Whether phi(size) = value decreases enough, see `limit`."""
        return value <= self.limit(start, slope, size)

    def along(self, ray: Ray, size: float = 1.0) -> float | None:
        """A step size with sufficient decrease along the ray; None if there is none."""
        slope = ray.slope_at_start
        return self.search(ray, ray.start, slope, size, ray) if slope < 0 else None

    def search(
        self, phi: Callable[[float], float], start: float, slope: float, size: float = 1.0, ray: Ray | None = None
    ) -> float | None:
        """A step size with sufficient decrease of `phi` from phi(0) = start; None if there is none.

        `slope` < 0 is phi'(0). A value that is not finite halves the step. Where phi is a `ray`, it says whether a
        decrease at rounding level serves, and when its derivatives are wrong.
        """
        before: tuple[float, float] | None = None
        smallest = self.shortest * size if ray is not None else self.shortest
        while size >= smallest:
            value = phi(size)
            is_sufficient = math.isfinite(value) and self.sufficient(start, value, slope, size)
            if is_sufficient and (ray is None or ray.serves(size)):
                return size
            if ray is not None and ray.doubt.is_settled:
                return None
            minimizer = _cubic_minimizer(start, slope, size, value, before) if self.cubic else None
            if minimizer is None:
                model = 2.0 * (value - start - slope * size)
                minimizer = -slope * size**2 / model if math.isfinite(model) and model > 0 else 0.5 * size
            before = (size, value)
            size = (1.0 if ray is None else ray.doubt.shrink) * min(max(minimizer, 0.1 * size), 0.5 * size)
        return None


@dataclass(frozen=True)
class StrongWolfe:
    """A step with sufficient decrease and a small slope (Nocedal, Wright 2006, algorithms 3.5 and 3.6).

    A first step that is too short grows by the factors 2, 4, 16, ...: its unit may be any.

    Attributes:
        armijo: fraction of the linear decrease that must be reached.
        curvature: fraction of the slope that may be left.
        trials: evaluations at most; then the best step with sufficient decrease is taken.
    """

    armijo: float = 1e-4
    curvature: float = 0.9
    trials: int = 25

    def along(self, ray: Ray, size: float = 1.0) -> float | None:
        """A step size that fulfills both; a decrease alone if none is found; None without one."""
        start, slope = ray.start, ray.slope_at_start
        if not slope < 0:
            return None
        low, high = (0.0, start, slope), None  # brackets: sizes with value and slope
        best: float | None = None
        growth, longest = 2.0, LONGEST * size
        for _ in range(self.trials):
            value = ray(size)
            if ray.doubt.is_settled:
                break
            too_high = value > min(start + self.armijo * size * slope + 1e-15 * abs(start), ray.highest)
            is_higher = value >= low[1] and low[0] > 0
            if is_higher and value - low[1] <= 1e-15 * abs(start):  # what a step gains may be lost in rounding errors
                is_higher = not ray.slope(size) < self.curvature * slope
            if not math.isfinite(value) or too_high or is_higher:
                high = (size, value, math.nan)
            else:
                here = ray.slope(size)
                if abs(here) <= -self.curvature * slope:
                    return size
                if value < start:  # not by rounding errors alone
                    best = size
                if here * ((math.inf if high is None else high[0]) - low[0]) >= 0:
                    high = low
                low = (size, value, here)
            if high is None:
                size *= growth if low[2] < 0 else 0.5
                growth = min(growth**2, LONGEST)
                if size > longest:  # there may be no minimum
                    break
            else:
                size = _between(low, high)
                if ray.doubt.shrink < 1.0:
                    size = low[0] + ray.doubt.shrink * (size - low[0])
                if abs(high[0] - low[0]) <= 1e-12 * max(low[0], high[0]):
                    break
        if best is not None:
            ray(best)
        return best


def _between(low: tuple[float, float, float], high: tuple[float, float, float]) -> float:
    """The minimizer of the parabola or cubic through two ends, kept away from both."""
    (a, fa, da), (b, fb, db) = low, high
    width = b - a
    guess = math.nan
    if math.isfinite(fb):
        if math.isfinite(db):  # cubic (Nocedal, Wright 2006, equation 3.59)
            d1 = da + db - 3.0 * (fa - fb) / (a - b)
            root = d1 * d1 - da * db
            if root >= 0:
                d2 = math.copysign(math.sqrt(root), width)
                below = db - da + 2.0 * d2
                guess = b - width * (db + d2 - d1) / below if below else math.nan
        elif (curvature := fb - fa - da * width) > 0:
            guess = a - 0.5 * da * width * width / curvature
    inside = sorted((a + 0.1 * width, b - 0.1 * width))
    return min(max(guess, inside[0]), inside[1]) if math.isfinite(guess) else a + 0.5 * width


def _cubic_minimizer(
    start: float, slope: float, size: float, value: float, before: tuple[float, float] | None
) -> float | None:
    """Of the cubic through start, slope and the last two trials (Nocedal, Wright 2006, equation 3.58)."""
    if before is None or not (math.isfinite(value) and math.isfinite(before[1])):
        return None
    size0, value0 = before
    rest, rest0 = value - start - slope * size, value0 - start - slope * size0
    scale = size0**2 * size**2 * (size - size0)
    a = (size0**2 * rest - size**2 * rest0) / scale
    b = (-(size0**3) * rest + size**3 * rest0) / scale
    root = b * b - 3.0 * a * slope
    if root < 0:
        return None
    if abs(a) < 1e-300:
        return -slope / (2.0 * b) if b > 0 else None
    return (-b + math.sqrt(root)) / (3.0 * a)


#: Line searches by their names in options.
SEARCHES: dict[str, Search] = {
    "armijo": Backtracking(scale=0.0),
    "cubic": Backtracking(cubic=True, scale=0.0),
    "wolfe": StrongWolfe(),
}
