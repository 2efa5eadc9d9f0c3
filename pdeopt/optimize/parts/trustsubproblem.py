"""Trust-region subproblems: min g.d + d.B d / 2 within a radius."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pdeopt.functions.smooth import SmoothFunction


@dataclass(frozen=True)
class TrustStep:
    """A step, what the model says that it gains, and what it took.

    Attributes:
        d: the step.
        decrease: -(g.d + d.B d / 2) >= 0.
        products: with B.
        on_boundary: whether the radius limits it.
        length: of the step, in the norm of the ball.
    """

    d: Tensor
    decrease: float
    products: int
    on_boundary: bool
    length: float = math.nan


class Sums(Protocol):
    """What adds up over ranks: a `SmoothFunction`, or a `TimeGrid`."""

    def sum(self, values: Tensor, /) -> Tensor:
        """The sum of every entry over the ranks."""


def steihaug(
    sums: Sums,
    times: Callable[[Tensor], Tensor],
    g: Tensor,
    radius: float | None,
    rtol: float = 1e-1,
    max_it: int = 100,
    inverse: Callable[[Tensor], Tensor] | None = None,
) -> TrustStep:
    """Truncated conjugate gradients in a ball (T. Steihaug, SIAM J. Numer. Anal. 20, 1983).

    Args:
        sums: of inner products.
        times: d -> B d.
        g: (size,).
        radius: of the ball d.P d <= radius^2; None for the length of the first step, or 1 where B curves down along it.
        rtol: stop at a residual of this part of |g|; a forcing term min(rtol, sqrt |g|) is the caller's to choose.
        max_it: products with B at most.
        inverse: r -> P^-1 r, the preconditioner, whose inverse gives the norm of gradients; default the identity.
    """
    d, Pd, r = torch.zeros_like(g), torch.zeros_like(g), -g
    w = r if inverse is None else inverse(r)
    p, Pp = w, r
    rr = float(sums.sum(r @ w))
    smallest, decrease, products = rtol**2 * rr, 0.0, 0
    while products < max_it and rr > smallest:
        Bp = times(p)
        products += 1
        dd, dp, pp, curvature = sums.sum(torch.stack([d @ Pd, d @ Pp, p @ Pp, p @ Bp])).tolist()
        size = rr / curvature if curvature > 0 else math.inf
        if radius is None:
            radius = size * math.sqrt(pp) if curvature > 0 else 1.0
        if curvature <= 0 or dd + 2 * size * dp + size**2 * pp >= radius**2:
            size = (-dp + math.sqrt(dp * dp + pp * max(radius**2 - dd, 0.0))) / pp
            decrease += size * rr - 0.5 * size**2 * curvature
            return TrustStep(d + size * p, decrease, products, True, radius)
        d, Pd, r = d + size * p, Pd + size * Pp, r - size * Bp
        decrease += 0.5 * size * rr
        w = r if inverse is None else inverse(r)
        before, rr = rr, float(sums.sum(r @ w))
        p, Pp = w + (rr / before) * p, r + (rr / before) * Pp
    return TrustStep(d, decrease, products, False, math.sqrt(max(float(sums.sum(d @ Pd)), 0.0)))


def first_order(function: SmoothFunction, g: Tensor, radius: float, norm: str = "2") -> TrustStep:
    """The minimizer of g.d within the radius: normalized steepest descent, or -radius sign(g) in the inf-norm.

    Args:
        function: gives inner products.
        g: (size,).
        radius: > 0.
        norm: "2" or "inf".
    """
    if norm == "inf":
        return TrustStep(-radius * g.sign(), radius * float(function.sum(g.abs().sum())), 0, True)
    length = function.norm(g)
    return TrustStep(g * (-radius / max(length, 1e-300)), radius * length, 0, True)


def length(function: SmoothFunction, d: Tensor, norm: str = "2") -> float:
    """|d| over all ranks.

    Args:
        function: whose unknowns they are.
        d: (size,).
        norm: "2" or "inf".
    """
    if norm == "2":
        return function.norm(d)
    own = float(d.abs().max()) if len(d) else 0.0
    return own if function.comm.size == 1 else max(function.comm.allgather(own))


def spectral(eigenvalues: Tensor, g: Tensor, radius: float) -> tuple[Tensor, float]:
    """min g.d + d.Lambda d / 2 in a ball, exactly, from any eigenvalues (J. J. Moré, D. C. Sorensen, 1983).

    |d(shift)| = radius is solved by Newton's method on 1/|d| - 1/radius, which is concave: from the left of the root it
    converges monotonically. In the hard case, where no shift is large enough, an eigenvector of the smallest
    eigenvalue fills the radius.

    Args:
        eigenvalues, g: (m,), and the components of g along the eigenvectors.

    Returns:
        the components of d, and the shift: (Lambda + shift) d = -g, shift >= 0 and Lambda + shift >= 0.
    """
    lowest = float(eigenvalues.min())
    above = eigenvalues - lowest  # exact zeros at the smallest eigenvalue: no cancellation near the hard case
    least = max(lowest, 0.0)  # of t = shift + lowest, with d = -g / (above + t)
    singular = above + least <= 1e-14 * float(eigenvalues.abs().max())
    loose = bool((g[singular].abs() <= 1e-14 * g.norm()).all())  # g does not push along them

    def at(t: float) -> Tensor:
        return torch.where(singular, torch.zeros_like(g), -g / (above + t)) if loose else -g / (above + t)

    if least > 0 or loose:
        d = at(least)
        missing = radius**2 - float(d @ d)
        if missing >= 0:
            if lowest < 0:  # the hard case
                d[int(eigenvalues.argmin())] += math.sqrt(missing)
            return d, max(-lowest, 0.0)
    t = max(least, float((g.abs() / radius - above).max()))
    for _ in range(100):
        d = at(t)
        size = float(d.norm())
        change = (size - radius) / radius * size**2 / float((d**2 / (above + t)).nansum())
        if not change > 1e-15 * t:
            break
        t += change
    return at(t), t - lowest


def boxed(
    function: SmoothFunction,
    times: Callable[[Tensor], Tensor],
    g: Tensor,
    radius: float,
    rtol: float = 1e-1,
    max_it: int = 100,
) -> TrustStep:
    """Truncated projected conjugate gradients in the box |d_i| <= radius (Lin, Moré, SIAM J. Optim. 9, 1999).

    A projected Cauchy step; then conjugate gradients in the variables that are not at their bounds, whose step is
    searched along its projection to the box; again with the variables that are then free. The model never increases.

    Args:
        function: gives inner products.
        times: d -> B d.
        g: (size,).
        radius: half the width of the box.
        rtol: stop at a residual of this part of |g|, in the free variables.
        max_it: products with B at most, about.
    """
    box = _Box(function, times, g, radius)
    box.cauchy()
    smallest = rtol * function.norm(g)
    while box.products < max_it:
        free = box.free()
        r = torch.where(free, -(g + box.Bd), torch.zeros_like(g))
        if function.norm(r) <= smallest or not box.descend(r, free, smallest, max_it):
            break
    return TrustStep(box.d, box.decrease, box.products, length(function, box.d, "inf") >= radius)


class _Box:
    """The present d of `boxed`, B d and the decrease."""

    def __init__(self, function: SmoothFunction, times: Callable[[Tensor], Tensor], g: Tensor, radius: float) -> None:
        self.function, self.g, self.radius, self.products = function, g, radius, 0
        self._times = times
        self.d = self.Bd = torch.zeros_like(g)
        self.decrease = 0.0

    def times(self, d: Tensor) -> Tensor:
        self.products += 1
        return self._times(d)

    def free(self) -> Tensor:
        """Variables away from their bounds, or pushed inside."""
        slope = self.g + self.Bd
        return (self.d.abs() < self.radius) | (self.d * slope > 0)

    def cauchy(self) -> None:
        """Search along the projection of -t g: from the minimizer, or the corner, to what stays inside."""
        function, g = self.function, self.g
        curvature = function.dot(g, self.times(g))
        inside = self.radius / max(length(function, g, "inf"), 1e-300)
        t = function.dot(g, g) / curvature if curvature > 0 else math.inf
        for _ in range(20):
            d = (-t * g if math.isfinite(t) else -g.sign() * math.inf).nan_to_num(0.0).clamp(-self.radius, self.radius)
            if self._take(d):
                return
            t = max(0.25 * t, inside) if math.isfinite(t) and t > inside else min(inside, 0.5 * t)

    def descend(self, r: Tensor, free: Tensor, smallest: float, max_it: int) -> bool:
        """Conjugate gradients in the free variables until they leave the box; whether the model became smaller."""
        function, p, step = self.function, r, torch.zeros_like(r)
        rr = function.dot(r, r)
        while self.products < max_it and rr > smallest**2:
            Bp = torch.where(free, self.times(p), torch.zeros_like(p))
            curvature = function.dot(p, Bp)
            size = rr / curvature if curvature > 0 else math.inf
            outside = length(function, self.d + step + min(size, 1e300) * p, "inf") > self.radius
            if outside:
                reach = 2.0 * self.radius / max(length(function, p, "inf"), 1e-300)
                step = step + min(size, reach) * p
                break
            step, r = step + size * p, r - size * Bp
            before, rr = rr, function.dot(r, r)
            p = r + (rr / before) * p
        for _ in range(8):
            if self.products >= max_it + 8 or self._take((self.d + step).clamp(-self.radius, self.radius)):
                return self.products < max_it
            step = 0.25 * step
        return False

    def _take(self, d: Tensor) -> bool:
        """Move there if the model decreases sufficiently."""
        Bd = self.times(d)
        slope, curved, linear = self.function.sum(
            torch.stack([(self.g + self.Bd) @ (d - self.d), d @ Bd, self.g @ d])
        ).tolist()
        decrease = -linear - 0.5 * curved
        if not decrease - self.decrease >= -1e-2 * slope > 0:
            return False
        self.d, self.Bd, self.decrease = d, Bd, decrease
        return True
