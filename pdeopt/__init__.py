"""pdeopt: optimization under transient constraints, on PETSc.

The names that most programs need can be imported from here; each lives in a module of its own, which is
loaded when its name is first asked for: `petsc4py.init(sys.argv)` may still come before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pdeopt.control.constraint import TimeDependentConstraint as TimeDependentConstraint
    from pdeopt.control.controlmap import ControlMap as ControlMap
    from pdeopt.control.objective import ControlCost as ControlCost
    from pdeopt.control.objective import Objective as Objective
    from pdeopt.control.objective import TerminalLoss as TerminalLoss
    from pdeopt.control.objective import Tracking as Tracking
    from pdeopt.control.problem import ControlProblem as ControlProblem
    from pdeopt.control.reduced import ReducedObjective as ReducedObjective
    from pdeopt.optimize.fullspace.sqp import SQPSolver as SQPSolver
    from pdeopt.optimize.tao import TaoSolver as TaoSolver
    from pdeopt.steps.sparse import StepMatrix as StepMatrix
    from pdeopt.steps.sparse import StepPattern as StepPattern
    from pdeopt.steps.timegrid import TimeGrid as TimeGrid

_MODULE = {
    "TimeGrid": "steps.timegrid",
    "TimeDependentConstraint": "control.constraint",
    "StepMatrix": "steps.sparse",
    "StepPattern": "steps.sparse",
    "Objective": "control.objective",
    "Tracking": "control.objective",
    "ControlCost": "control.objective",
    "TerminalLoss": "control.objective",
    "ControlMap": "control.controlmap",
    "ControlProblem": "control.problem",
    "ReducedObjective": "control.reduced",
    "SQPSolver": "optimize.fullspace.sqp",
    "TaoSolver": "optimize.tao",
}

__all__ = [*sorted(_MODULE), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'pdeopt' has no attribute {name!r}; it has {', '.join(sorted(_MODULE))}")
    return getattr(import_module(f"pdeopt.{_MODULE[name]}"), name)
