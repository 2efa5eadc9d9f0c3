"""Steps of all levels of a chain of linearized dense layers, many at once, for cycles over intervals of layers.

    finest level:  u + D W u of a layer             coarse levels:  u + B u, with a matrix B for each sample

States are (rows, width, samples), or (rows, width, columns, samples). B is that of the product of the layers of an
interval, to second order. The layers' own matrices in its place, those in the middle of an interval, need twice as
many cycles: first weights are independent from layer to layer, and trained ones are so to a part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pdeopt.steps.mgrit import MgritSettings
from pdeopt.steps.transfer import interval_sums

#: Relative residual of sweeps by cycles, as exact as conjugate gradients need it; and cycles that may be needed, beside
#: those of the theorem: two-level FCF is exact after half as many as there are intervals.
CYCLES_RTOL = 1e-11

#: (states, rows of layers) -> states.
Map = Callable[[Tensor, slice], Tensor]


def tangents(W: Tensor, D: Tensor) -> Map:
    """u + D W u of layers."""
    return lambda u, rows: torch.addcmul(u, to_columns(D[rows], u), product(W[rows], u))


def cotangents(W: Tensor, D: Tensor) -> Map:
    """Its transpose, w + W' D w."""
    return lambda w, rows: w + product(W[rows].mT, to_columns(D[rows], w) * w)


def sums_of_layers(W: Tensor, D: Tensor, factor: int) -> Tensor:
    """The sum of D W over the layers of each interval, for each sample: (intervals, width, width, samples).

    Args:
        W, D: as those of a `LinearChain`; the last interval may have fewer layers.
        factor: layers of an interval.
    """
    missing = -len(W) % factor
    if missing:
        W, D = (torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) for part in (W, D))
    weights, slopes = (part.unflatten(0, (-1, factor)) for part in (W, D))
    return weights.permute(0, 2, 3, 1) @ slopes.transpose(1, 2)


def interval_matrices(sums: Tensor, count: int, factor: int) -> Tensor:
    """B with I + B = prod_j (I + A_j) to second order, from the sums A of the A_j of each interval.

    The second-order terms, products A_i A_j of i after j, are half of A^2 without the squares: (1 - 1/m) A^2 / 2 for m
    alike matrices. Where weights jump from layer to layer, as the first ones do, their sum is still that of the layers.

    Args:
        sums: A, (intervals, width, width, samples).
        count, factor: steps in all, and in an interval; the last may have fewer.
    """
    steps = interval_sums(torch.ones(count, 1, 1, 1, dtype=sums.dtype), factor)
    each = sums.permute(0, 3, 1, 2).contiguous()  # a matrix of its own for each sample
    return torch.addcmul(sums, 0.5 - 0.5 / steps, (each @ each).permute(0, 2, 3, 1))


def times(B: Tensor) -> Map:
    """u + B u, with a matrix for each sample."""
    return lambda u, rows: u + (_with_columns(B[rows], u) * u[:, None]).sum(2)


def times_transposed(B: Tensor) -> Map:
    """Its transpose, w + B' w."""
    return lambda w, rows: w + (_with_columns(B[rows], w) * w[:, :, None]).sum(1)


def _with_columns(B: Tensor, u: Tensor) -> Tensor:
    return B if u.dim() == 3 else B[:, :, :, None]


def product(W: Tensor, u: Tensor) -> Tensor:
    """W u of layers, u (layers, width, ..., samples)."""
    return torch.bmm(W, u.flatten(2)).view_as(u)


def to_columns(D: Tensor, u: Tensor) -> Tensor:
    """D with an axis for columns, where u has one."""
    return D if u.dim() == 3 else D[:, :, None]


def exact_cycles(settings: MgritSettings, num_steps: int) -> MgritSettings:
    """The settings with as many cycles as an exact sweep may take, and the tolerance that ends them earlier."""
    factors = settings.factors(num_steps)
    intervals = -(-num_steps // factors[0]) if factors else 1
    return replace(settings, cycles=intervals, adjoint_cycles=intervals, rtol=CYCLES_RTOL, start="nested")


def few_cycles(settings: MgritSettings) -> MgritSettings:
    """The settings with as many cycles as they say, but one at least in both directions."""
    cycles, adjoint = max(settings.cycles, 1), max(settings.adjoint_cycles, 1)
    return replace(settings, cycles=cycles, adjoint_cycles=adjoint, rtol=0.0, start="nested")
