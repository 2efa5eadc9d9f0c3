"""Proximal maps of activations and losses: what training by splitting minimizes in closed form, entry by entry.

In a split network (G. Taylor, R. Burmeister, Z. Xu, B. Singh, A. Patel, T. Goldstein, ICML 2016) the input z of an
activation h is a variable of its own, drawn to m = W a by one penalty and, through h, to a by another:

    argmin_z  beta (z - m)^2 + gamma (a - h(z))^2                    `Activation.proximal`
    argmin_z  loss(z, y) + beta |z - m|^2                            `LOSSES`

The first is not convex. Where h is piecewise linear, all pieces are solved and compared; else the minimum is bracketed,
and Newton's method goes on from the best of a few points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pdeopt.core.errors import InputError

#: Points of the bracket from whose best Newton's method starts, and its steps.
POINTS, NEWTON_STEPS = 17, 12


@dataclass(frozen=True)
class PiecewiseLinear:
    """h(z) = slope z + offset on intervals that cover the line; h is continuous.

    Args:
        pieces: slope, offset, lower and upper end of each, from the left to the right.
    """

    pieces: tuple[tuple[float, float, float, float], ...]

    def __call__(self, z: Tensor) -> Tensor:
        """h(z)."""
        (slope, offset, _, _), *others = self.pieces
        value = slope * z + offset
        for slope, offset, lower, _ in others:
            value = torch.where(z > lower, slope * z + offset, value)
        return value

    def proximal(self, m: Tensor, a: Tensor, beta: float, gamma: float) -> Tensor:
        """argmin_z beta (z - m)^2 + gamma (a - h(z))^2 for each entry; of two minima that of the earlier piece."""
        best, least = m, torch.full_like(m, math.inf)
        for slope, offset, lower, upper in self.pieces:
            z = ((beta * m + gamma * slope * (a - offset)) / (beta + gamma * slope**2)).clamp(lower, upper)
            value = beta * (z - m).square() + gamma * (a - (slope * z + offset)).square()
            best, least = torch.where(value < least, z, best), torch.minimum(value, least)
        return best


@dataclass(frozen=True)
class Smooth:
    """A smooth, increasing h.

    Args:
        function: z to h(z), h'(z) and h''(z).
        inverse: a to z with h(z) = a, for a inside the range; beyond it, an end that is far enough out.
    """

    function: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    inverse: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        """h(z)."""
        return self.function(z)[0]

    def proximal(self, m: Tensor, a: Tensor, beta: float, gamma: float) -> Tensor:
        """argmin_z beta (z - m)^2 + gamma (a - h(z))^2 for each entry.

        Both terms grow outside of the interval between m and h^-1(a): the minimum is inside. Newton's steps that leave
        the two neighbors of the best point, or do not go down, are replaced by halves of these.
        """
        target = self.inverse(a)
        # where a is beyond the range of h, the second term falls for ever, but no further than it pays the first
        reach = (gamma / beta) ** 0.5 * (a - self(m)).abs()
        target = torch.maximum(torch.minimum(target, m + reach), m - reach)
        shares = torch.linspace(0.0, 1.0, POINTS, dtype=m.dtype, device=m.device).reshape(-1, *[1] * m.dim())
        points = m + shares * (target - m)
        values = beta * (points - m).square() + gamma * (a - self(points)).square()
        best = values.argmin(0, keepdim=True)
        z = points.gather(0, best)[0]
        ends = [points.gather(0, (best + step).clamp(0, POINTS - 1))[0] for step in (-1, 1)]
        lower, upper = torch.minimum(*ends), torch.maximum(*ends)
        for _ in range(NEWTON_STEPS):
            h, slope, curvature = self.function(z)
            gradient = beta * (z - m) - gamma * (a - h) * slope
            hessian = beta + gamma * (slope.square() - (a - h) * curvature)
            lower, upper = torch.where(gradient < 0, z, lower), torch.where(gradient > 0, z, upper)
            new = z - gradient / hessian
            inside = (hessian > 0) & (new >= lower) & (new <= upper)
            z = torch.where(gradient == 0, z, torch.where(inside, new, 0.5 * (lower + upper)))
        return z


Activation = PiecewiseLinear | Smooth


def _tanh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.tanh(z)
    slope = 1 - h.square()
    return h, slope, -2 * h * slope


def _softplus(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slope = torch.sigmoid(z)
    return F.softplus(z), slope, slope * (1 - slope)


def _inverse_tanh(a: Tensor) -> Tensor:
    end = 1 - torch.finfo(a.dtype).eps
    return torch.where(a.abs() < 1, torch.atanh(a.clamp(-end, end)), math.inf * a.sign())


def _inverse_softplus(a: Tensor) -> Tensor:
    positive = a.clamp(min=torch.finfo(a.dtype).tiny)
    return torch.where(a > 0, positive + torch.log(-torch.expm1(-positive)), -math.inf)


INFINITY = math.inf

#: Activations by name.
SPLIT_ACTIVATIONS: dict[str, Activation] = {
    "identity": PiecewiseLinear(((1.0, 0.0, -INFINITY, INFINITY),)),
    "relu": PiecewiseLinear(((0.0, 0.0, -INFINITY, 0.0), (1.0, 0.0, 0.0, INFINITY))),
    "leaky_relu": PiecewiseLinear(((0.01, 0.0, -INFINITY, 0.0), (1.0, 0.0, 0.0, INFINITY))),
    "hard_sigmoid": PiecewiseLinear(((0.0, 0.0, -INFINITY, 0.0), (1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 1.0, INFINITY))),
    "tanh": Smooth(_tanh, _inverse_tanh),
    "softplus": Smooth(_softplus, _inverse_softplus),
}


def hinge(z: Tensor, y: Tensor) -> Tensor:
    """sum_k max(0, 1 - z_k) for the class k of the sample, max(0, z_k) for the others; (batch,)."""
    return torch.where(_is_class(z, y), 1 - z, z).clamp(min=0).sum(1)


def squared(z: Tensor, y: Tensor) -> Tensor:
    """sum_k (z_k - y_k)^2, y_k = 1 for the class and 0 for the others, or targets of the shape of z; (batch,)."""
    return (z - _targets(z, y)).square().sum(1)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_k for the class k; (batch,)."""
    return F.cross_entropy(z, y, reduction="none")


def hinge_proximal(m: Tensor, y: Tensor, beta: float) -> Tensor:
    """argmin_z hinge(z, y) + beta |z - m|^2."""
    step = 0.5 / beta
    of_class = torch.where(m >= 1, m, (m + step).clamp(max=1))
    of_others = torch.where(m <= 0, m, (m - step).clamp(min=0))
    return torch.where(_is_class(m, y), of_class, of_others)


def squared_proximal(m: Tensor, y: Tensor, beta: float) -> Tensor:
    """argmin_z squared(z, y) + beta |z - m|^2."""
    return (beta * m + _targets(m, y)) / (beta + 1)


def cross_entropy_proximal(m: Tensor, y: Tensor, beta: float) -> Tensor:
    """argmin_z cross_entropy(z, y) + beta |z - m|^2, by Newton's method with damped steps.

    The Hessian diag(p) - pp' + 2 beta I, p = softmax(z), is inverted by the formula of Sherman and Morrison. The
    function is self-concordant like log-sum-exp's, and strongly convex: a step of length 1/(1 + decrement) goes down.
    """
    targets, z = _targets(m, y), m
    for _ in range(4 * NEWTON_STEPS):
        p = z.softmax(1)
        gradient = p - targets + 2 * beta * (z - m)
        inverse = 1 / (p + 2 * beta)
        weighted = p * inverse
        slope = (weighted * gradient).sum(1, keepdim=True) / (1 - (weighted * p).sum(1, keepdim=True))
        step = inverse * gradient + weighted * slope
        decrement = (step * gradient).sum(1, keepdim=True).clamp(min=0).sqrt()
        z = z - step / (1 + torch.where(decrement < 0.25, 0.0, 2.0 * decrement))
        if not bool((decrement > 1e-9).any()):
            break
    return z


@dataclass(frozen=True)
class Loss:
    """A loss of single samples with its proximal map.

    Args:
        value: (outputs, targets) to the losses, (batch,).
        proximal: (m, targets, beta) to argmin_z value(z) + beta |z - m|^2, (batch, outputs).
    """

    value: Callable[[Tensor, Tensor], Tensor]
    proximal: Callable[[Tensor, Tensor, float], Tensor]


#: Losses by name.
LOSSES = {
    "hinge": Loss(hinge, hinge_proximal),
    "squared": Loss(squared, squared_proximal),
    "cross_entropy": Loss(cross_entropy, cross_entropy_proximal),
}


def _targets(z: Tensor, y: Tensor) -> Tensor:
    return y if y.is_floating_point() else _is_class(z, y).to(z.dtype)


def _is_class(z: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, z.shape[1]).bool()


def require_classes(y: Tensor, outputs: int) -> None:
    """Raise `InputError` for labels outside of 0 ... outputs - 1."""
    if y.is_floating_point() or y.dim() != 1:
        raise InputError("labels", f"{y.dtype} of shape {tuple(y.shape)}", "integers, (samples,)")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < outputs:
        raise InputError("labels", f"{int(y.min())} to {int(y.max())}", f"0 to {outputs - 1}, the outputs")
