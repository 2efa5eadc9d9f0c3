"""What a gradient costs by multigrid cycles and one layer after the other, by counts of calls and multiplications.

Costs are in units of a call of a few operations of PyTorch; `problems.benchmarks.layer_model` has messages, too. No
clock enters, so that what is chosen by them is chosen on any machine.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

#: Multiplications that a call of a few operations of PyTorch, and the arithmetic of a feature, are worth.
CALL, ENTRY = 200_000, 40

#: Units of a layer: forward, its adjoint by the state, its adjoint by state and weights.
FORWARD, BACK, GRADIENT = 1, 1, 2


def layer_work(mgrit: Any) -> float:
    """Multiplications of a layer as a `LayerMgrit` has last seen it, and what its entries are worth.

    Weights are matrices and kernels (outputs, inputs, ...), of one layer, or for all of them in a GRU.
    """
    numbers, shapes = mgrit.seen
    products = sum(math.prod(s) * numbers / max(min(s[:2]), 1) for s in shapes if len(s) >= 2)
    return float(products) + ENTRY * numbers


def serial_cost(mgrit: Any) -> float:
    """Of a gradient, one layer after the other, in units of a call; the same on any number of ranks."""
    return mgrit.grid.num_steps * (FORWARD + GRADIENT) * (1 + layer_work(mgrit) / CALL)


def chain_cost(mgrit: Any, ratio: float) -> float:
    """Of a gradient by one compiled loop through all layers, from rank to rank: arithmetic alone, in units of a call.

    Args:
        mgrit: a `LayerMgrit`.
        ratio: the time of a multiplication in the loop over that in a batched step.
    """
    return float(mgrit.grid.num_steps * (FORWARD + GRADIENT) * ratio * layer_work(mgrit) / CALL)


def mgrit_cost(mgrit: Any) -> float:
    """Of a gradient by the cycles of a `LayerMgrit`, on the rank that has most, in units of a call."""
    row, stages = layer_work(mgrit) / CALL, mgrit.stages
    ways = (mgrit.forward, FORWARD, FORWARD), (mgrit.adjoint, BACK, GRADIENT)
    return sum(_solve(solver, row, stages, unit, last) for solver, unit, last in ways)


def _solve(solver: Any, row: float, stages: int, unit: int, last_unit: int) -> float:
    """Of one solve: the start, its cycles, and the last run through the intervals."""
    rows = [int(np.diff(offsets).max()) for offsets in solver.offsets]
    last, factors = solver.last, solver.factors
    march = int(solver.offsets[last][-1]) * (1 + row) * stages * unit

    def travel(level: int) -> float:
        return (factors[level] + rows[level] * row) * (stages if level else 1) * unit

    def cycle(level: int, kind: str) -> float:
        coarse = level + 1
        own = (1 + solver.settings.relaxation.count("C")) * travel(level) + (1 + rows[coarse] * row) * stages * unit
        if coarse == last:
            return own + march
        visits = ("F", "V") if kind == "F" else ("V",)
        return own + sum(cycle(coarse, again) for again in visits) + travel(coarse)

    start = march + sum(travel(level) for level in range(1, last))
    final = travel(0) * last_unit / unit
    return start + solver.cycles * cycle(0, solver.settings.cycle) + final
