"""One call for a control problem: `solve(problem)` chooses a method, or takes the one that is named.

result = solve(problem)                          # Newton, globalized by the composite step
result = solve(problem, lower=0.0, upper=1.0)    # active sets
result = solve(problem, method="spqn", max_it=50, monitor=True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.checkpointing import CheckpointSettings
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.arrays import assign, copy, flat
from pdeopt.core.autodiff import in_turn, plainly
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.monitor import AnyRecord, ControlResult, History, Monitor, Reason, Result
from pdeopt.core.settings import Section, Settings, read, setting
from pdeopt.optimize.coarse_time import with_coarse_space
from pdeopt.optimize.curvedproblem import CurvedSettings, curved_function
from pdeopt.optimize.descent.apts import APTS
from pdeopt.optimize.descent.minimizer import Minimizer, StopSettings
from pdeopt.optimize.descent.multilevel import MGOPT
from pdeopt.optimize.descent.quasinewton import LBFGS, SSBroyden
from pdeopt.optimize.descent.rmtr import RMTR
from pdeopt.optimize.descent.schwarz import SPQN
from pdeopt.optimize.descent.trust import TrustRegionMinimizer
from pdeopt.optimize.fullspace.composite import CompositeSettings
from pdeopt.optimize.fullspace.kktchoice import KKTSettings
from pdeopt.optimize.fullspace.method import with_price
from pdeopt.optimize.fullspace.sqp import ON_PATHS, SQPSettings, SQPSolver
from pdeopt.optimize.parts.bounds import Bound
from pdeopt.optimize.parts.inequalities import Limit
from pdeopt.optimize.squares.gaussnewton import GaussNewton, GaussNewtonSettings
from pdeopt.optimize.tao import CONTROL_DEFAULTS, TaoSettings, TaoSolver

#: Full-space methods, and what `-sqp_type` calls them.
FULL_SPACE = {"sqp": "composite", **{name: name for name in ("newton", "feasible", "active_set", *ON_PATHS)}}

#: The other way round.
NAMES = {kind: name for name, kind in FULL_SPACE.items()}

#: TAO on the reduced objective.
TAO = ("reduced", "tao")

#: Optimizers of smooth functions, on the reduced objective.
DESCENT: dict[str, type[Minimizer]] = {
    "lbfgs": LBFGS,
    "ssbroyden": SSBroyden,
    "spqn": SPQN,
    "tr": TrustRegionMinimizer,
    "apts": APTS,
    "mgopt": MGOPT,
    "rmtr": RMTR,
}

#: Damped Gauss-Newton steps, on the reduced objective or with states as unknowns.
GAUSS_NEWTON = "gauss_newton"

#: Methods that honor bounds.
BOUNDED = ("auto", "active_set", *ON_PATHS, *TAO)


@dataclass(frozen=True)
class SolveSettings(Settings, prefix="solve_"):
    """The method of `solve`."""

    method: str = setting(
        "auto",
        "method that solves a control problem; auto is newton, sqp from where its steps are poor, active_set with "
        "bounds, and interior with inequalities on states",
        choices=("auto", *FULL_SPACE, *TAO, *DESCENT, GAUSS_NEWTON),
        reads={
            "auto": (SQPSettings,),
            **{name: (Section(SQPSettings, defaults={"type": kind}),) for name, kind in FULL_SPACE.items()},
            GAUSS_NEWTON: tuple(map(Section, (CurvedSettings, GaussNewtonSettings, StopSettings))),
            **dict.fromkeys(TAO, (Section(TaoSettings), Section(CheckpointSettings))),
            **{
                name: (Section(cls.Settings), Section(StopSettings), Section(CheckpointSettings))
                for name, cls in DESCENT.items()
            },
        },
    )
    view: bool = setting(False, "print which method was chosen, and how it ended")


@in_turn
@plainly
def solve(
    problem: ControlProblem,
    method: str = "auto",
    lower: Bound = None,
    upper: Bound = None,
    start: Any = None,
    monitor: bool | Monitor = False,
    callback: Callable[[ControlResult], None] | None = None,
    *,
    state_lower: Limit = None,
    state_upper: Limit = None,
    path: Any = None,
    **settings: Any,
) -> ControlResult:
    """min J(u, z, p) subject to the steps of the problem, and to bounds on controls and parameters, if there are some.

        result = solve(problem, lower=0.0, monitor=True)
        z = result.design.getArray()

    Collective over the ranks of the problem's grid. Options win over arguments: `-solve_method newton` chooses the
    method, `-solve_view` prints the choice, and each method has its own options (`-sqp_max_it 20`).

    Args:
        problem: the control problem.
        method: `auto` is newton, sqp from where its steps are poor, active_set with bounds, and interior with
            inequalities on states or paths; or

            - `sqp`, `newton`, `active_set`, `interior`, `moreau_yosida`: state, design and multiplier as unknowns, see
              `SQPSolver`;
            - `feasible`: Newton's method on the design alone, in a trust region;
            - `tao`, `reduced`: TAO on the reduced objective z -> J(u(z), z), by `-tao_type` or its default, a
              quasi-Newton method with limited memory, see `TaoSolver`;
            - `gauss_newton`: damped Gauss-Newton steps by a few conjugate gradients, for networks preconditioned by
              Kronecker factors, see `GaussNewton`; with `states="unknown"` in the full space;
            - `lbfgs`, `ssbroyden`, `spqn`, `tr`, `apts`, `mgopt`, `rmtr`: an optimizer of smooth functions on the
              reduced objective, see `Minimizer`. Its unknowns are scaled by the Riesz metric as TAO's.
        lower, upper: bounds for active_set, tao and reduced: a number for all controls; or values of this rank, of its
            controls, (control_size,) or (n_local, m), or of controls and parameters, (control_size + param_dim,), as
            list, array, tensor or vector. Without controls, of the parameters. Results keep them to the last bit.
        start: the first design [z | p], values of this rank, (control_size + param_size,), as list, array, tensor or
            vector, or a number for all; or an earlier result, whose state and multiplier serve, too. Default zero.
        monitor: True prints a line an iteration; a function is called with the record of each iteration.
        callback: called after each iteration with the result so far, whose `reason` is `Reason.ITERATING`.
        state_lower, state_upper: bounds on the states of the steps: a number, values of the components, (n,), rows of
            this rank, (n_local, n), or a function of the times; infinite entries are none. Beside them `lower` and
            `upper` are bounds on the controls of the steps, in the same forms.
        path: c(u, z, steps) <= 0, a function of a batch of steps, a `PathConstraint`, or several of them. The result
            then is an `InequalityResult`, with multipliers, violations and where they are active.
        **settings: of the method, such as `max_it` and `opt_tol`, the largest number of iterations and the tolerance
            of the gradient, which all methods have; `precond="direct"` and other `KKTSettings` for sqp, newton and
            active_set; `tao_type` for tao; `gauss_newton=True` leaves the curvature of the constraint out.

    Returns:
        design, state and multiplier, PETSc vectors; why it stopped; the history; and in `method` the method's name.

    Raises:
        InputError: a method or a setting that does not exist (the message lists those that do), bounds that cross or
            that the method cannot keep, a start of another size.
    """
    chosen = read(SolveSettings, method=method)
    is_bounded = lower is not None or upper is not None
    name = chosen.method
    on_path = {"state_lower": state_lower, "state_upper": state_upper, "path": path}
    is_on_path = any(each is not None for each in on_path.values())
    if is_on_path and name not in ("auto", *ON_PATHS):
        raise InputError("inequalities on states", f"method {name}", " | ".join(("auto", *ON_PATHS)))
    if is_bounded and name not in BOUNDED:
        raise InputError("bounds on the design", f"method {name}", " | ".join(BOUNDED))
    _check_settings(name, settings)
    run = _Run(problem, _start(problem, start), start if isinstance(start, ControlResult) else None, monitor, callback)
    if name in ("auto", *FULL_SPACE):
        result = run.full_space(name, {"lower": lower, "upper": upper, **on_path}, settings)
    elif name in TAO:
        result = run.tao(name, lower, upper, settings)
    elif name == GAUSS_NEWTON:
        result = run.gauss_newton(settings)
    else:
        result = run.descent(name, settings)
    if chosen.view:
        why = "" if chosen.method != "auto" else " (auto: bounds)" if is_bounded or is_on_path else " (auto)"
        words = f"{result.message}; {result.iterations} iterations, J = {result.objective:.11e}"
        PETSc.Sys.Print(f"solve: method {result.method}{why}\n  {words}", comm=problem.grid.comm)
    return result


@dataclass
class _Run:
    """One call of `solve`: from where, and who looks on."""

    problem: ControlProblem
    design: PETSc.Vec
    earlier: ControlResult | None
    monitor: bool | Monitor
    callback: Callable[[ControlResult], None] | None

    def full_space(self, name: str, bounds: dict[str, Any], settings: dict[str, Any]) -> ControlResult:
        kind = FULL_SPACE.get(name, "auto")
        solver = SQPSolver(self.problem, **bounds, type=kind, monitor=self.monitor is True, **settings)

        def observe(method: Any, history: History) -> None:
            self.tell(method.result(Reason.ITERATING, "", history), NAMES[method.kind])

        if self.earlier is None:
            x, lam = solver.start(self.design), None
        else:
            x, lam = self.problem.join(self.earlier.state, self.design), self.earlier.multiplier
        result = solver.solve(x, lam, monitors=self.monitors, observers=[observe])
        return _named(result, NAMES[solver.kind])  # -sqp_type wins

    def tao(self, name: str, lower: Bound, upper: Bound, settings: dict[str, Any]) -> ControlResult:
        reduced = ReducedObjective(self.problem)
        solver = TaoSolver(reduced, lower, upper, monitor=self.monitor is True, **settings)

        def observe(record: AnyRecord) -> None:
            self.tell(solver.last, name)

        return _named(solver.solve(self.design, monitors=[*self.monitors, observe]), name)

    def descent(self, name: str, settings: dict[str, Any]) -> ControlResult:
        reduced = ReducedObjective(self.problem, settings.pop("gauss_newton", False))
        scale = RieszMetric(self.problem).root()
        given = CONTROL_DEFAULTS if name == "spqn" else {}
        given = given | {"gtol" if key == "opt_tol" else key: value for key, value in settings.items()}
        minimizer = DESCENT[name](with_coarse_space(reduced, scale), monitor=self.monitor is True, **given)

        def observe(method: Any, history: History) -> None:
            self.tell(lift(Result(method.x, Reason.ITERATING, "", history)), name)

        def lift(result: Result) -> ControlResult:
            return _lifted(reduced, result, result.design / copy(scale))

        y = copy(self.design) * copy(scale)
        return _named(lift(minimizer.minimize(y, monitors=self.monitors, observers=[observe])), name)

    def gauss_newton(self, settings: dict[str, Any]) -> ControlResult:
        own = {each.name for each in fields(CurvedSettings)}
        function = curved_function(self.problem, **{key: settings.pop(key) for key in own & set(settings)})
        reduced = ReducedObjective(self.problem)
        given = {"gtol" if key == "opt_tol" else key: value for key, value in settings.items()}
        minimizer = GaussNewton(function, monitor=self.monitor is True, **given)

        def lift(result: Result) -> ControlResult:
            return _lifted(reduced, result, result.design)

        def observe(method: Any, history: History) -> None:
            self.tell(lift(Result(method.x, Reason.ITERATING, "", history)), GAUSS_NEWTON)

        observers = [] if self.callback is None else [observe]
        found = minimizer.minimize(copy(self.design), monitors=self.monitors, observers=observers)
        return _named(lift(found), GAUSS_NEWTON)

    @property
    def monitors(self) -> Sequence[Monitor]:
        return [self.monitor] if callable(self.monitor) else []

    def tell(self, result: ControlResult, name: str) -> None:
        """Call the user's function, with vectors that it may keep."""
        if self.callback is not None:
            vectors = {key: getattr(result, key).copy() for key in ("design", "state", "multiplier")}
            self.callback(replace(result, history=History(list(result.history.records)), method=name, **vectors))


def _check_settings(name: str, settings: dict[str, Any]) -> None:
    if name in ("auto", *FULL_SPACE):
        groups = [SQPSettings, KKTSettings, *([CompositeSettings] if name in ("auto", "sqp") else [])]
    elif name == GAUSS_NEWTON:
        groups = [StopSettings, GaussNewtonSettings, CurvedSettings]
    else:
        groups = [TaoSettings] if name in TAO else [StopSettings, DESCENT[name].Settings]
    legal = {each.name for group in groups for each in fields(group)} - {"type", "monitor"}
    if name in DESCENT:
        legal = legal - {"gtol"} | {"opt_tol", "gauss_newton"}
    if name == GAUSS_NEWTON:
        legal = legal - {"gtol"} | {"opt_tol"}
    if name in TAO:
        legal |= {"tao_type"}
    if unknown := sorted(set(settings) - legal):
        raise InputError(f"setting of method {name}", ", ".join(unknown), ", ".join(sorted(legal)))


def _start(problem: ControlProblem, start: Any) -> PETSc.Vec:
    """The first design, a new vector. Collective."""
    design = problem.create_design()
    values = flat(0.0 if start is None else start.design if isinstance(start, Result) else start, "start")
    size = design.getLocalSize()
    wrong, largest = len(values) not in (1, size), problem.grid.max
    if largest(torch.tensor(float(wrong))) > 0:
        raise InputError("start", f"{len(values)} numbers", f"one, or those of this rank, {size}")
    if largest((~values.isfinite()).any().double()) > 0:
        raise InputError("start", "entries that are not finite", "finite numbers")
    assign(design, values.expand(size))
    return design


def _lifted(reduced: ReducedObjective, result: Result, z: Tensor) -> ControlResult:
    """The result of an optimizer of the reduced objective, with the state and the multiplier of its design z."""
    problem = reduced.problem
    design = problem.create_design()
    assign(design, z)
    try:
        state, multiplier = reduced.solution(z)
    except SolveFailure:
        state, multiplier = problem.constant_state(design), problem.create_multiplier()
    message = with_price(result.message, result.reason, problem)
    return ControlResult(design, result.reason, message, result.history, state, multiplier, value=result.value)


def _named(result: Result, name: str) -> ControlResult:
    assert isinstance(result, ControlResult)
    result.method = name
    return result
