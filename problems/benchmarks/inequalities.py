"""Bounds on states and paths by both methods for them: six problems with optima of IPOPT; a process solves one.

    python -m problems.benchmarks.inequalities heat
    python -m problems.benchmarks.inequalities heat moreau_yosida

The cases are heat, bounded, free, burgers, oscillator and mixed, and burgers32, burgers128 and burgers256 on other
meshes (two more, in the plane: `plates.py`). The last line is JSON: the objective and its distance
to that of IPOPT at a tolerance of 1e-12, matrices with inequalities, Krylov iterations of their solves, the largest
violation, integrals of multipliers, and CPU seconds of the solve.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

import pdeopt as po
from pdeopt.optimize.fullspace import KKTSolver
from problems.benchmarks.small import ReactionDiffusion, VanDerPol
from problems.burgers import BurgersCase, BurgersSettings
from problems.heat import HeatCase, HeatSettings


def oscillator() -> po.ControlProblem:
    """200 steps to T = 10, halves of squares."""
    objective = po.Tracking(np.zeros(2)) + po.ControlCost(1.0)
    return po.ControlProblem(VanDerPol(), objective, po.TimeGrid.uniform(200, T=10.0))


def reaction_diffusion() -> po.ControlProblem:
    """63 unknowns, 100 steps, toward sin(pi x)."""
    constraint = ReactionDiffusion(63)
    target = np.sin(np.pi * constraint.h * np.arange(1, 64))
    objective = po.Tracking(target, constraint.state_mass) + po.ControlCost(1e-3, constraint.control_mass)
    return po.ControlProblem(constraint, objective, po.TimeGrid.uniform(100, T=1.0))


def heat() -> po.ControlProblem:
    """30 by 10 elements, 64 steps, cheap control."""
    return HeatCase(po.read(HeatSettings, nx=30, ny=10, nt=64, alpha=1e-4)).problem


def burgers(size: int = 64) -> po.ControlProblem:
    """As many elements as steps."""
    return BurgersCase(po.read(BurgersSettings, nx=size, nt=size)).problem


def sum_of_both(u: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
    """x + z <= 0.7."""
    return u[:, 0] + z[:, 0] - 0.7


#: Optima of IPOPT on other meshes, NaN where it was not asked.
BURGERS = {32: math.nan, 128: 0.063399559039, 256: 0.065076990095}

#: Problem, inequalities, and the optimum of IPOPT.
CASES: dict[str, tuple[Callable[[], po.ControlProblem], dict[str, Any], float]] = {
    **{f"burgers{size}": (partial(burgers, size), {"state_lower": -0.02}, J) for size, J in BURGERS.items()},
    "heat": (heat, {"state_upper": 0.2}, 0.0175081089),
    "bounded": (reaction_diffusion, {"state_upper": 0.5, "lower": -1.0, "upper": 3.0}, 0.0576754623),
    "free": (reaction_diffusion, {"state_upper": 0.5}, 0.0485575227),
    "burgers": (burgers, {"state_lower": -0.02}, 0.0602964961),
    "oscillator": (oscillator, {"state_lower": [-0.25, -np.inf]}, 1.8082076166),
    "mixed": (oscillator, {"state_lower": [-0.25, -np.inf], "path": sum_of_both}, 1.8084422625),
}


@contextmanager
def counted() -> Iterator[list[int]]:
    """The number of KKT matrices that are made inside, in a list of one entry."""
    count, made = [0], KKTSolver.set_point

    def set_point(solver: KKTSolver, *point: Any) -> None:
        count[0] += 1
        made(solver, *point)

    with patch.object(KKTSolver, "set_point", set_point):
        yield count


def measure(name: str, method: str = "auto") -> dict[str, Any]:
    """Solve a case; what is measured by name."""
    make, words, expected = CASES[name]
    problem, begin = make(), time.process_time()
    with counted() as count:
        result = po.solve(problem, method, **words)
    assert isinstance(result, po.InequalityResult)
    free = sum("without" in record.note for record in result.history.records)
    inside = result.history.records[free:]
    reports = result.inequalities.values()
    return {
        "case": name,
        "method": result.method,
        "message": result.message,
        "objective": result.objective,
        "beside_ipopt": result.objective - expected,
        "matrices": count[0] - free,
        "krylov": sum(record.krylov for record in inside),
        "violation": max(report.violation for report in reports),
        "integrals": {report.name: report.integral for report in reports},
        "cpu": time.process_time() - begin,
    }


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CASES:
        raise SystemExit(f"cases: {' | '.join(CASES)}")
    print(json.dumps(measure(*sys.argv[1:3])))
