"""Which rows of a sum of squares to take: more of those that matter, with weights that keep the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.functions.subsampling import inclusion, uniform_numbers


def density(sizes: list[Tensor], floor: float) -> Tensor:
    """q = sum over the sizes of s / mean s, plus the floor: how likely each row is, up to a factor, (m,).

    C. Wu, M. Zhu, Q. Tan, Y. Kartha, L. Lu, A comprehensive study of non-adaptive and residual-based adaptive
    sampling for physics-informed neural networks, Comput. Methods Appl. Mech. Engrg. 403, 2023.

    Args:
        sizes: >= 0, (m,) each: of the residuals, say, and of the solution's gradient.
        floor: > 0: the larger, the more rows elsewhere.

    Raises:
        InputError: sizes that are not finite.
    """
    q = torch.full_like(sizes[0], floor)
    for size in sizes:
        if not bool(torch.isfinite(size).all()):
            raise InputError("sizes of rows, for drawing some", "values that are not finite", "finite ones")
        q += size / size.mean().clamp(min=1e-300)
    return q


def draw_rows(q: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows drawn by their density without replacement, and their weights: indices and w, (count,) each.

    Row i comes with the probability p_i = min(1, c q_i), sum p = count (sequential Poisson sampling, E. Ohlsson, J.
    Official Statist. 14, 1998), and has the weight count / (m p_i): the mean of w_i r_i^2 over the drawn rows is that
    of r^2 over all, up to the error of the sample. Few of many rows have w_i = mean q / q_i.

    Args:
        q: > 0, (m,).
        count: of rows; all where m is not more, with weights 1.
        seed: of the random numbers.
    """
    if count >= len(q):
        return torch.arange(len(q)), torch.ones_like(q)
    p = inclusion(q, count)
    u = uniform_numbers(len(q), torch.Generator().manual_seed(seed))
    indices = torch.where(p < 1.0, u / p, -1.0).argsort()[:count].sort()[0]
    return indices, count / (len(q) * p[indices])
