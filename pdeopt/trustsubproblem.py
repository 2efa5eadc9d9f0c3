"""Trust-region subproblems: min g.d + d.B d / 2 within a radius."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pdeopt.smooth import SmoothFunction


@dataclass(frozen=True)
class TrustStep:
    """A step, what the model says that it gains, and what it took.

    Attributes:
        d: the step.
        decrease: -(g.d + d.B d / 2) >= 0.
        products: with B.
        on_boundary: whether the radius limits it.
    """

    d: Tensor
    decrease: float
    products: int
    on_boundary: bool


def steihaug(
    function: SmoothFunction,
    times: Callable[[Tensor], Tensor],
    g: Tensor,
    radius: float,
    rtol: float = 1e-1,
    max_it: int = 100,
) -> TrustStep:
    """Truncated conjugate gradients in a ball (T. Steihaug, SIAM J. Numer. Anal. 20, 1983).

    Args:
        function: gives inner products.
        times: d -> B d.
        rtol: stop at a residual of this part of |g|; a forcing term min(rtol, sqrt |g|) is the caller's to choose.
    """
    d, r, p = torch.zeros_like(g), -g, -g
    rr = function.dot(r, r)
    smallest, decrease, products = rtol**2 * rr, 0.0, 0
    while products < max_it and rr > smallest:
        Bp = times(p)
        products += 1
        dd, dp, pp, curvature = function.sum(torch.stack([d @ d, d @ p, p @ p, p @ Bp])).tolist()
        size = rr / curvature if curvature > 0 else math.inf
        if dd + 2 * size * dp + size**2 * pp >= radius**2:
            size = (-dp + math.sqrt(dp * dp + pp * max(radius**2 - dd, 0.0))) / pp
            decrease += size * rr - 0.5 * size**2 * curvature
            return TrustStep(d + size * p, decrease, products, True)
        d, r = d + size * p, r - size * Bp
        decrease += 0.5 * size * rr
        before, rr = rr, function.dot(r, r)
        p = r + (rr / before) * p
    return TrustStep(d, decrease, products, False)
