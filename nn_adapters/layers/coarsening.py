"""Coarse steps of a chain of layers: what one long step in the place of m short ones is, and with which weights.

An interval of m layers u + dt F(u; z_i) becomes one step of two stages,

    v = u + (M - dt) / 2 F(u; z),   u + M F(v; z),   M = m dt,

which is the m Euler steps with equal weights to second order in M: their sum u + sum_j dt F(u + j dt F) has the mean
argument u + (m - 1) dt / 2 F. A single Euler step of length M, as S. Guenther et al. (SIMODS 2, 2020) take it, is so to
first order. For m = 1 both are the layer itself.

The weights of a long step are the means over its interval where weights change slowly from layer to layer: what noise
they have then cancels as it does in the layers. Where they jump, the mean of ReLU(W_i u) is no more ReLU of the mean,
and the layer in the middle of the interval is the better sample. Which of the two holds is measured.

Where the settings ask for it, a long step is the interval's first layer and a map that earlier batches have taught
(`parts/intervalfit.py`); before the first batch it is as above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nn_adapters.layers.parts.layerstep import StepLength
from pdeopt.steps.transfer import Move, interval_sums

#: Neighboring rows whose difference is, in the mean square, more than this share of what independent rows of mean zero
#: differ by are rough. Found by noise of all sizes on smooth weights, see docs/networks.md.
ROUGH = 0.3

#: (features (layers, ...), parameters of these layers) -> F.
Value = Callable[[Tensor, Sequence[Tensor]], Tensor]


def two_stages(value: Value, shortest: float, u: Tensor, theta: Sequence[Tensor], dt: StepLength) -> Tensor:
    """The states after long steps of a residual network.

    Args:
        value: F.
        shortest: length of a layer.
        u: the states before them, (rows, ...).
        theta: weights of the steps, (rows, ...) each.
        dt: length of the steps, a number or one a row.
    """
    middle = add_scaled(u, value(u, theta), half_way(dt, shortest))
    return add_scaled(u, value(middle, theta), dt)


def half_way(dt: StepLength, shortest: float) -> StepLength:
    """(M - dt) / 2: where the mean layer of an interval of length M starts, of layers of length dt."""
    return (dt - shortest) / 2


def add_scaled(u: Tensor, v: Tensor, dt: StepLength) -> Tensor:
    """u + dt v, dt a number or one a row.

    Args:
        u, v: (rows, ...).
        dt: a number, or (rows,).
    """
    if isinstance(dt, float):
        return torch.add(u, v, alpha=dt)
    return torch.addcmul(u, v, column(dt, u.dim()).to(u))


def column(dt: Tensor, dim: int) -> Tensor:
    """One number a row, to be multiplied with rows of `dim` axes."""
    return dt.reshape(-1, *[1] * (dim - 1))


def coarse_controls(
    controls: Sequence[Tensor], factors: Sequence[int], means: bool | Tensor, moves: Sequence[Move] | None = None
) -> list[list[Tensor]]:
    """The controls of each level, finest first.

    Args:
        controls: of the finest level, (steps, ...) each, whole intervals but the last.
        factors: coarsening factors, finest level first.
        means: whether those of a long step are the means over its interval, rather than those in its middle. As a
            tensor, of no axes, it is asked where it is, and no device is waited for.
        moves: of the steps of each level between ranks, see `Mgrit`; None for none. Collective where there are some.
    """
    if not controls:
        return [[] for _ in range(1 + len(factors))]
    levels, layers = [list(controls)], torch.ones(len(controls[0]))  # layers in each step: the last may have fewer
    for level, factor in enumerate(factors, 1):
        rows = [_of_intervals(z, factor, layers, means) for z in levels[-1]]
        layers = interval_sums(layers, factor)
        if moves is not None and moves[level].is_needed:
            *rows, layers = (moves[level].there([part])[0] for part in (*rows, layers))
        levels.append(rows)
    return levels


def _of_intervals(rows: Tensor, factor: int, layers: Tensor, means: bool | Tensor) -> Tensor:
    if isinstance(means, Tensor):
        return torch.where(means, _means(rows, factor, layers.tolist()), _middles(rows, factor))
    return _means(rows, factor, layers.tolist()) if means else _middles(rows, factor)


def _means(rows: Tensor, factor: int, layers: Sequence[float]) -> Tensor:
    """The mean of each interval of `factor` rows; of the last one, where it is shorter, over its layers.

    Args:
        layers: of each row; the last may have fewer, all others are alike.
    """
    is_whole = len(rows) % factor == 0 and layers[-1:] == layers[:1]
    whole = (len(rows) - (not is_whole)) // factor
    found = rows[: whole * factor].unflatten(0, (whole, factor)).mean(1) if whole else rows[:0]
    rest, total = rows[whole * factor :], sum(layers[whole * factor :])
    if len(rest) == 0:
        return found
    shares = rows.new_full((len(rest),), layers[0] / total)
    shares[-1:].fill_(layers[-1] / total)  # made where the rows are, as nothing goes to a device inside of a CUDA graph
    return torch.cat([found, (column(shares, rows.dim()) * rest).sum(0, keepdim=True)])


def _middles(rows: Tensor, factor: int) -> Tensor:
    """The row in the middle of each interval; the last of a shorter interval."""
    middles = rows[factor // 2 :: factor]
    return middles if len(middles) * factor >= len(rows) else torch.cat([middles, rows[-1:]])


def roughness(controls: Sequence[Tensor], factor: int, mpi: Any) -> Tensor:
    """By how much neighboring rows differ: 0 for equal ones, 1 for independent ones of mean zero. Collective.

    sum |z_i - z_{i+1}|^2 / sum (|z_i|^2 + |z_{i+1}|^2) over one pair in each interval, so that it does not depend on
    how intervals are spread over ranks, and costs little.

    Args:
        controls: of the steps of this rank, (steps, ...) each.
        factor: steps of an interval, at least 2.
        mpi: communicator of the ranks.

    Returns:
        A number in double precision, on one rank where the controls are.
    """
    device = next((rows.device for rows in controls), None)  # of layers that have no weights, the host
    shares = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in controls:
        second = rows.detach()[1::factor]
        first = rows.detach()[::factor][: len(second)]
        double = torch.promote_types(rows.dtype, torch.float64)  # complex numbers stay complex
        difference, *sizes = (torch.linalg.vector_norm(t, dtype=double) for t in (first - second, first, second))
        shares += torch.stack([difference.square(), sizes[0].square() + sizes[1].square()])
    if mpi.size > 1:
        shares = torch.as_tensor(mpi.allreduce(shares.cpu().numpy()))
    return shares[0] / shares[1].clamp(min=1e-300)
