"""What a gradient costs by multigrid cycles and one layer after the other, by counts of calls and multiplications.

Costs are in units of a call of a few operations of PyTorch; `problems.benchmarks.layer_model` has messages, too. No
clock enters, so that what is chosen by them is chosen on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

#: Multiplications that a call of a few operations of PyTorch, and the arithmetic of a feature, are worth.
CALL, ENTRY = 200_000, 40

#: Multiplications that it is worth to read an entry of weights, where all steps have the same: with a GRU of 1000 units
#: (`problems.benchmarks.video_model`) a call takes 1.4 ms, and 0.09 ms more for each sample.
READ = 16

#: Units of a layer: forward, its adjoint by the state, its adjoint by state and weights.
FORWARD, BACK, GRADIENT = 1, 1, 2


class Seen(NamedTuple):
    """What a chain of layers was last called with.

    Attributes:
        numbers: in a state.
        shapes: of a layer's weights, or of those that all layers share.
        share: of the batch that a rank has at most where samples are spread over ranks, for layers that share weights;
            0 where each layer has its own, on its rank.
    """

    numbers: int = 0
    shapes: Sequence[Sequence[int]] = ()
    share: float = 0.0


def layer_work(mgrit: Any) -> float:
    """Multiplications of a layer as a `LayerMgrit` has last seen it, and what its entries are worth.

    Weights are matrices and kernels (outputs, inputs, ...), of one layer, or for all of them in a GRU.
    """
    seen = mgrit.seen
    products = sum(math.prod(s) * seen.numbers / max(min(s[:2]), 1) for s in seen.shapes if len(s) >= 2)
    return float(products) + ENTRY * seen.numbers


def call_cost(mgrit: Any) -> float:
    """Of a call without samples, in units of a call: weights that all layers share are read once."""
    entries = sum(math.prod(s) for s in mgrit.seen.shapes if len(s) >= 2) if mgrit.seen.share else 0
    return 1 + READ * entries / CALL


def serial_cost(mgrit: Any) -> float:
    """Of a gradient, one layer after the other, in units of a call, on the rank that has most.

    The same on any number of ranks, but for layers that share weights: there each rank takes its samples through all.
    """
    share = mgrit.seen.share or 1.0
    return mgrit.grid.num_steps * (FORWARD + GRADIENT) * (call_cost(mgrit) + share * layer_work(mgrit) / CALL)


def chain_cost(mgrit: Any, ratio: float) -> float:
    """Of a gradient by one compiled loop through all layers, from rank to rank: arithmetic alone, in units of a call.

    Args:
        mgrit: a `LayerMgrit`.
        ratio: the time of a multiplication in the loop over that in a batched step.
    """
    return float(mgrit.grid.num_steps * (FORWARD + GRADIENT) * ratio * layer_work(mgrit) / CALL)


def mgrit_cost(mgrit: Any) -> float:
    """Of a gradient by the cycles of a `LayerMgrit`, on the rank that has most, in units of a call."""
    costs, stages = (call_cost(mgrit), layer_work(mgrit) / CALL), mgrit.stages
    ways = (mgrit.forward, FORWARD, FORWARD), (mgrit.adjoint, BACK, GRADIENT)
    return sum(_solve(solver, *costs, stages, unit, last) for solver, unit, last in ways)


def _solve(solver: Any, call: float, row: float, stages: float, unit: int, last_unit: int) -> float:
    """Of one solve: the start, its cycles, and the last run through the intervals."""
    rows = [int(np.diff(offsets).max()) for offsets in solver.offsets]
    last, factors = solver.last, solver.factors
    march = int(solver.offsets[last][-1]) * (call + row) * stages * unit

    def travel(level: int) -> float:
        return (factors[level] * call + rows[level] * row) * (stages if level else 1) * unit

    def cycle(level: int, kind: str) -> float:
        coarse = level + 1
        own = (1 + solver.settings.relaxation.count("C")) * travel(level) + (call + rows[coarse] * row) * stages * unit
        if coarse == last:
            return own + march
        visits = ("F", "V") if kind == "F" else ("V",)
        return own + sum(cycle(coarse, again) for again in visits) + travel(coarse)

    start = march + sum(travel(level) for level in range(1, last))
    final = travel(0) * last_unit / unit
    return start + solver.cycles * cycle(0, solver.settings.cycle) + final
