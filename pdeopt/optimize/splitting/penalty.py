"""The penalty of ADMM, chosen while it runs."""

from __future__ import annotations

import math

from torch import Tensor

#: A penalty is changed where it is wrong by this factor: new factors cost more than a few iterations.
WRONG_BY = 2.0

#: Iterations in which it may change, so that ADMM converges after them.
LEARNING = 30

#: Least cosine of the angle between differences of sides and multipliers at which a curvature is believed.
CORRELATION = 0.2


def curvature(side: float, product: float, multiplier: float) -> float | None:
    """The curvature of a block's function along the last move, between the two Barzilai-Borwein ones.

    The hybrid rule of Z. Xu, M. A. T. Figueiredo, T. Goldstein, Adaptive ADMM with spectral penalty parameter
    selection, AISTATS 2017, equations (22) to (27).

    Args:
        side, product, multiplier: |da|^2, <da, dl> and |dl|^2 of the moves da of a side and dl of its gradient.

    Returns:
        None where both moves are nearly orthogonal, or the function curves down.
    """
    if not (side > 0 and multiplier > 0 and product > CORRELATION * math.sqrt(side * multiplier)):
        return None
    steepest, least = multiplier / product, product / side
    return least if 2 * least > steepest else steepest - 0.5 * least


def spectral(gram: Tensor) -> float | None:
    """2 beta for which both blocks contract best: the geometric mean of their curvatures.

    Args:
        gram: inner products of the moves of a, of its multiplier, of b and of its multiplier, (4, 4).
    """
    first = curvature(float(gram[0, 0]), -float(gram[0, 1]), float(gram[1, 1]))
    second = curvature(float(gram[2, 2]), float(gram[2, 3]), float(gram[3, 3]))
    if first is None or second is None:
        return first or second
    return math.sqrt(first * second)
