"""pdeopt: optimization under transient constraints, on PETSc.

The names that most programs need can be imported from here; each lives in a module of its own, which is
loaded when its name is first asked for: `petsc4py.init(sys.argv)` may still come before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pdeopt.constraint import TimeDependentConstraint as TimeDependentConstraint
    from pdeopt.controlmap import ControlMap as ControlMap
    from pdeopt.objective import ControlCost as ControlCost
    from pdeopt.objective import Objective as Objective
    from pdeopt.objective import TerminalLoss as TerminalLoss
    from pdeopt.objective import Tracking as Tracking
    from pdeopt.optimize.sqp import SQPSolver as SQPSolver
    from pdeopt.optimize.tao import TaoSolver as TaoSolver
    from pdeopt.problem import ControlProblem as ControlProblem
    from pdeopt.reduced import ReducedObjective as ReducedObjective
    from pdeopt.sparse import StepMatrix as StepMatrix
    from pdeopt.sparse import StepPattern as StepPattern
    from pdeopt.timegrid import TimeGrid as TimeGrid

_MODULE = {
    "TimeGrid": "timegrid",
    "TimeDependentConstraint": "constraint",
    "StepMatrix": "sparse",
    "StepPattern": "sparse",
    "Objective": "objective",
    "Tracking": "objective",
    "ControlCost": "objective",
    "TerminalLoss": "objective",
    "ControlMap": "controlmap",
    "ControlProblem": "problem",
    "ReducedObjective": "reduced",
    "SQPSolver": "optimize.sqp",
    "TaoSolver": "optimize.tao",
}

__all__ = [*sorted(_MODULE), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'pdeopt' has no attribute {name!r}; it has {', '.join(sorted(_MODULE))}")
    return getattr(import_module(f"pdeopt.{_MODULE[name]}"), name)
