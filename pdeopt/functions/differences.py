"""Derivatives of a smooth function compared with differences of its values and gradients."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.errors import DerivativeError
from pdeopt.functions import border
from pdeopt.functions.checked import NoHessianProducts

#: Relative error at which a derivative is wrong.
WRONG = 1e-5
#: Steps relative to x: the best of them tells; a wrong derivative is wrong at all.
STEPS = tuple(10.0**-k for k in range(1, 9))


def verify(function: Any, x: Tensor, seed: int = 0) -> dict[str, float]:
    """What `SmoothFunction.verify` says.

    Args:
        function: f, a `SmoothFunction`.
        x: (size,), where f is smooth.
        seed: of the direction.
    """
    x = border.start(x, function.size)
    generator = torch.Generator().manual_seed(seed + function.comm.rank)
    d = torch.randn(function.size, generator=generator, dtype=torch.float64)
    f, g = function.value_and_gradient(x)
    d = d / max(function.norm(d), 1e-300) * _length(function, x, f, g)
    slope = function.dot(g, d)
    rounding = 8.0 * sys.float_info.epsilon * abs(f)
    errors = {"gradient": min(_gradient_error(function, x, d, f, slope, h, rounding) for h in STEPS)}
    try:
        product = function.hvp(x, d)
    except (NoHessianProducts, NotImplementedError):  # there are none to compare
        pass
    else:
        errors["hessian"] = min(_hessian_error(function, x, d, product, h) for h in STEPS)
    for name, error in errors.items():
        if WRONG < error < math.inf:  # infinite: f is too flat here to tell
            words = f"at steps of {STEPS[-1]:.0e} to {STEPS[0]:.0e} of x"
            raise DerivativeError(f"{name} of {type(function).__name__}: relative error {error:.1e} {words}")
    return errors


def _length(function: Any, x: Tensor, f: float, g: Tensor) -> float:
    """As long as x; where that is zero, as what the gradient takes to lower f to zero."""
    size, norm = float(function.norm(x)), float(function.norm(g))
    if size > 0:
        return size
    return abs(f) / norm if norm > 0 and 0 < abs(f) / norm < math.inf else 1.0


def _gradient_error(function: Any, x: Tensor, d: Tensor, f: float, slope: float, h: float, rounding: float) -> float:
    plus, minus = function.value(x + h * d), function.value(x - h * d)
    size = max(abs(slope), abs(plus - f) / h, abs(f - minus) / h)  # the latter where x is stationary
    return _relative(abs((plus - minus) / (2.0 * h) - slope), size, rounding / h)


def _hessian_error(function: Any, x: Tensor, d: Tensor, product: Tensor, h: float) -> float:
    plus, minus = (function.value_and_gradient(x + sign * h * d)[1] for sign in (1.0, -1.0))
    difference = (plus - minus) / (2.0 * h)
    size = max(function.norm(product), function.norm(difference))
    rounding = 8.0 * sys.float_info.epsilon * function.norm(plus) / h
    return _relative(function.norm(difference - product), size, rounding)


def _relative(error: float, size: float, rounding: float) -> float:
    """Infinite where rounding errors are most of the difference: another step tells."""
    if size <= rounding:
        return 0.0 if size == 0.0 else math.inf
    return max(error - rounding, 0.0) / size if rounding <= 1e-2 * size else math.inf
