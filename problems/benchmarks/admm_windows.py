"""ADMM on windows of time: what penalties, over-relaxation and Anderson acceleration gain, and what Newton takes.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.admm_windows -json build/admm_windows.json

Iterations until the control is within 1e-4 and 1e-6 of the optimum, relative, and CPU seconds of the whole run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from petsc4py import PETSc

import pdeopt as po
from pdeopt.core import freed
from pdeopt.optimize.splitting import ADMM, CONTROL_DEFAULTS, TimeSplitting, TimeSplittingSettings
from problems.burgers import BurgersCase, BurgersSettings
from problems.heat import HeatCase, HeatSettings

#: Problems by name, and their numbers of windows.
CASES: dict[str, tuple[Callable[[], po.ControlProblem], tuple[int, ...]]] = {
    "heat 15x5, nt 32": (lambda: HeatCase(HeatSettings(nx=15, ny=5, nt=32)).problem, (4, 16)),
    "heat 15x5, nt 32, alpha 1": (lambda: HeatCase(HeatSettings(nx=15, ny=5, nt=32, alpha=1.0)).problem, (8,)),
    "heat 15x5, nt 32, boundary": (
        lambda: HeatCase(HeatSettings(nx=15, ny=5, nt=32, heat_control="boundary", heat_boundary="neumann")).problem,
        (8,),
    ),
    "burgers 64, nt 64": (lambda: BurgersCase(BurgersSettings(nx=64, nt=64)).problem, (8,)),
}

#: The default problems.
DEFAULTS: dict[str, tuple[Callable[[], po.ControlProblem], tuple[int, ...]]] = {
    "heat 60x20, nt 64": (lambda: HeatCase(HeatSettings()).problem, (4, 8, 16)),
    "burgers 128, nt 256": (lambda: BurgersCase(BurgersSettings()).problem, (4, 8, 16)),
}

#: Ways by name; "balance" is residual balancing, which the library does without.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"anderson": 0},
    "relax 1.7": {"anderson": 0, "relax": 1.7},
    "balance": {"anderson": 0},
    "spectral": {"anderson": 0, "penalty": "spectral"},
    "spectral, relax 1.7": {"anderson": 0, "penalty": "spectral", "relax": 1.7},
    "Anderson 10": {"anderson": 10},
    "Anderson 20": {},
    "Anderson 20, relax 1.7": {"relax": 1.7},
    "Anderson 20, spectral": {"penalty": "spectral"},
}

#: Relative errors of the control, and iterations at most.
ERRORS, MOST = (1e-4, 1e-6), 100

Row = dict[str, Any]


def compare(name: str, problem: po.ControlProblem, windows: int, way: str) -> Row:
    """One run."""
    expected = optimum(name, problem)
    start, found = time.process_time(), dict.fromkeys(ERRORS, math.nan)
    splitting = TimeSplitting(problem, TimeSplittingSettings(windows=windows))

    def observe(method: ADMM, history: po.History) -> None:
        error = splitting.design()
        error.axpy(-1.0, expected)
        for each in ERRORS:
            if error.norm() <= each * expected.norm() and math.isnan(found[each]):
                found[each] = history[-1].iteration
        if way == "balance":
            balance(splitting, history)

    def is_there(method: ADMM) -> bool:
        return not math.isnan(found[ERRORS[-1]])

    settings = CONTROL_DEFAULTS | WAYS[way] | {"rtol": 0.0, "max_it": MOST}
    with freed(splitting):
        result = ADMM(splitting, **settings).solve(observers=[observe], until=is_there)
    seconds = time.process_time() - start
    return {
        "case": name,
        "windows": windows,
        "way": way,
        **{f"to {error:g}": its for error, its in found.items()},
        "penalty": splitting.pair.beta,
        "cpu_seconds": seconds,
        "multiplications": result.history[-1].solves + result.history[-1].products,
    }


def balance(splitting: TimeSplitting, history: po.History) -> None:
    """beta doubled or halved where a residual is ten times the other (S. Boyd et al. 2011, section 3.4.1)."""
    last = history[-1]
    if 1 <= last.iteration <= 30:
        factor = 2.0 if last.feasibility > 10 * last.optimality else 0.5
        if not 0.1 < last.feasibility / last.optimality < 10:
            splitting.pair.beta *= factor


_optima: dict[str, PETSc.Vec] = {}


def optimum(name: str, problem: po.ControlProblem) -> PETSc.Vec:
    """The control by Newton's method."""
    if name not in _optima:
        start = time.process_time()
        solver = po.SQPSolver(problem, type="newton", precond="auto", opt_tol=1e-10, feas_tol=1e-10)
        _optima[name] = solver.solve().design
        PETSc.Sys.Print(f"{name}: Newton takes {time.process_time() - start:.2f} CPU s")
    return _optima[name]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run all, or the default problems or the small ones alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", choices=("ways", "defaults"), default=None)
    words = parser.parse_args(argv)
    runs = [] if words.only == "defaults" else [(case, list(WAYS)) for case in CASES.items()]
    runs += [] if words.only == "ways" else [(case, ["Anderson 20"]) for case in DEFAULTS.items()]
    rows = []
    for (name, (make, counts)), ways in runs:
        problem = make()
        for windows in counts:
            for way in ways:
                rows.append(compare(name, problem, windows, way))
                PETSc.Sys.Print(
                    "  ".join(f"{each:.3g}" if isinstance(each, float) else str(each) for each in rows[-1].values())
                )
    if words.json:
        Path(words.json).write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
