"""Full-space solvers of a `ControlProblem`, from options: `-sqp_type auto | composite | newton | feasible |
active_set | interior | moreau_yosida`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from petsc4py import PETSc

from pdeopt.control.problem import ControlProblem
from pdeopt.core.autodiff import in_turn, plainly
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.monitor import History, Monitor, Reason, Result, print_monitor
from pdeopt.core.petsc_values import check_petsc_values
from pdeopt.core.ranks import freed
from pdeopt.core.settings import Section, Settings, read, setting
from pdeopt.optimize.fullspace.activeset import ActiveSetKKT
from pdeopt.optimize.fullspace.composite import CompositeSettings, CompositeStep
from pdeopt.optimize.fullspace.feasible import FeasibleNewton
from pdeopt.optimize.fullspace.handover import NewtonThenComposite, Single
from pdeopt.optimize.fullspace.interior import InteriorPoint, InteriorSettings
from pdeopt.optimize.fullspace.kktchoice import KKTSettings
from pdeopt.optimize.fullspace.method import full_space_test
from pdeopt.optimize.fullspace.moreauyosida import MoreauYosida, MoreauYosidaSettings
from pdeopt.optimize.fullspace.newton import NewtonKKT
from pdeopt.optimize.parts.bounds import Bound, Bounds
from pdeopt.optimize.parts.inequalities import Inequalities, Limit
from pdeopt.optimize.parts.loop import Observer, iterate

#: The methods for inequalities on states and paths, and their settings.
ON_PATHS: dict[str, tuple[type[InteriorPoint | MoreauYosida], type[Any]]] = {
    "interior": (InteriorPoint, InteriorSettings),
    "moreau_yosida": (MoreauYosida, MoreauYosidaSettings),
}

#: The part of its tolerances to which a linear-quadratic problem is solved at once.
NEARLY = 0.1

#: The options of the KKT systems.
KKT = Section(KKTSettings, outer="sqp_")


@dataclass(frozen=True)
class SQPSettings(Settings, prefix="sqp_"):
    """Full-space solvers: sqp, newton, active_set."""

    type: str = setting(
        "auto",
        "method: Newton, and from where its steps are poor a feasible path or the composite step (auto); one of them; "
        "or "
        "Newton with bounds on controls and parameters, which auto is where there are some; or an interior point "
        "method, which auto is with inequalities on states and paths, or Moreau-Yosida path-following for these",
        choices=("auto", "composite", "newton", "feasible", "active_set", *ON_PATHS),
        reads={
            "auto": (CompositeSettings, KKT),
            "composite": (CompositeSettings, KKT),
            "newton": (KKT,),
            "feasible": (),
            "active_set": (KKT,),
            **{name: (settings, KKT) for name, (_, settings) in ON_PATHS.items()},
        },
    )
    max_it: int = setting(100, "largest number of outer iterations", at_least=0)
    opt_tol: float = setting(1e-8, "tolerance of the Lagrangian's gradient |L_x| in the dual norm", above=0)
    feas_tol: float = setting(1e-8, "tolerance of the constraint's residual |F| in the dual norm", above=0)
    gauss_newton: bool = setting(False, "leave the constraint's curvature out of the Hessian (auto, composite, newton)")
    kkt_rtol: float = setting(1e-8, "relative tolerance of KKT solves (all but composite)", above=0, at_most=1)
    start: str = setting(
        "initial", "first state: u_0 at all times, or that of the first control", choices=("initial", "state")
    )
    monitor: bool = setting(False, "print a line an iteration")
    view: bool = setting(False, "print the solver's settings and the outcome")


class SQPSolver:
    """min J subject to F = 0 over state, controls and parameters together.

        solver = SQPSolver(problem, type="newton", max_it=20)
        result = solver.solve()
        result.converged, result.objective, result.state, result.design

    The state equation holds at the end only, so that an iteration costs linear solves with all steps at once and never
    a nonlinear one. `type` is the method: `newton`, fast near the solution; `composite`, globally convergent by a trust
    region with inexact solves; `feasible`, Newton's method in the design alone, with the state solved for at each
    point; `auto`, the first, the third where the equations bend too much for it, the second where states are not
    found; `active_set`, Newton with bounds on controls and parameters, which is what bounds choose; `interior`, which
    inequalities on states and paths choose, and bounds on controls where active sets come back; `moreau_yosida`,
    path-following for the same inequalities.

    Args:
        problem: the control problem.
        prefix: of the options, before `sqp_`; those of the linear solver are `-{prefix}sqp_kkt_ksp_type` and so on.
        lower, upper: bounds on the design variables (active_set), as for `Bounds.of`, or on the controls of the steps
            (interior, moreau_yosida); None for none.
        state_lower, state_upper, path: bounds on states, and functions c(u, z, steps) <= 0, see `Inequalities`.
        **defaults: settings that replace the defaults, `type="newton"` or `precond="direct"` for instance; those of
            `SQPSettings`, `CompositeSettings` and `KKTSettings`. Options win.

    Attributes:
        settings: those of `SQPSettings`.
        kind: the method that the last solve ended with, one of `-sqp_type` other than auto.
        ways: how it solved KKT systems, see `FullSpaceMethod.ways`.

    Raises:
        InputError: a setting that is not legal, bounds that cross, or a type that knows none.
    """

    def __init__(
        self,
        problem: ControlProblem,
        prefix: str = "",
        *,
        lower: Bound = None,
        upper: Bound = None,
        state_lower: Limit = None,
        state_upper: Limit = None,
        path: Any = None,
        **defaults: object,
    ) -> None:
        check_petsc_values()
        self.problem, self.prefix = problem, prefix
        groups = (SQPSettings, CompositeSettings, KKTSettings)
        names = {name for group in groups for name in group.__dataclass_fields__}
        if unknown := set(defaults) - names:
            raise InputError("SQPSolver setting", ", ".join(sorted(unknown)), ", ".join(sorted(names)))
        shared, own, self.kkt = (
            {name: value for name, value in defaults.items() if name in group.__dataclass_fields__} for group in groups
        )
        is_bounded = lower is not None or upper is not None
        is_on_path = any(each is not None for each in (state_lower, state_upper, path))
        self.settings = read(SQPSettings, prefix, **shared)
        is_open = self.settings.type == "auto" and problem.control_map is None
        #: the bounds, where the interior point method may go on from active sets
        self._given = (lower, upper) if is_open and is_bounded and not is_on_path else None
        if self.settings.type == "auto" and (is_bounded or is_on_path):
            self.settings = replace(self.settings, type="interior" if is_on_path else "active_set")
        is_composite = self.settings.type in ("auto", "composite")
        self.composite = read(CompositeSettings, prefix, **own) if is_composite else None
        is_for_paths = self.settings.type in ON_PATHS
        self.on_path = read(ON_PATHS[self.settings.type][1], prefix) if is_for_paths else None
        if self.on_path is None:
            self.bounds = Bounds.of(problem, lower, upper)
        else:
            self.inequalities = Inequalities(problem, lower, upper, state_lower, state_upper, path)
        self.kind, self.ways = self.settings.type, dict[str, list[str]]()
        if is_on_path and self.on_path is None:
            legal = " | ".join(("auto", *ON_PATHS))
            raise InputError("inequalities on states", f"-{prefix}sqp_type {self.settings.type}", legal)
        if is_bounded and self.settings.type not in ("active_set", *ON_PATHS):
            legal = " | ".join(("auto", "active_set", *ON_PATHS))
            raise InputError("bounds on the design", f"-{prefix}sqp_type {self.settings.type}", legal)

    @in_turn
    @plainly
    def solve(
        self,
        x: PETSc.Vec | None = None,
        lam: PETSc.Vec | None = None,
        *,
        monitors: Sequence[Monitor] = (),
        observers: Sequence[Observer] = (),
        memory: dict[str, Any] | None = None,
        history: History | None = None,
    ) -> Result:
        """Solve from x = [u | z | p] and the multiplier; both are copied. Collective.

        Args:
            x: default `start()`.
            lam: default zero, so that the first Hessian is that of the objective: an adjoint far from the
                solution would put its curvature in the way.
            monitors, observers: called after each iteration; see `iterate`.
            memory, history: of an interrupted run, to go on with the same iterates from its last point x, lam.

        Returns:
            a `ControlResult` with the last good point: state, design and multiplier, new vectors.
        """
        x = self.start() if x is None else x.copy()
        lam = self.problem.create_multiplier() if lam is None else lam.copy()
        start = None if self._given is None or memory is not None else (x.copy(), lam.copy())
        method = self._method(x, lam)
        if memory is not None:
            method.recall(memory)
        if self.settings.monitor:
            monitors = [print_monitor(self.problem.grid.comm, f"SQP ({self.settings.type})"), *monitors]
        test = full_space_test(self.settings.max_it, self.settings.opt_tol, self.settings.feas_tol)
        if isinstance(method, NewtonThenComposite):
            test = method.beyond_saddles(test)
        with freed(method):
            result = iterate(method, test, monitors=monitors, observers=observers, history=history)
            self.kind, self.ways = method.kind, method.ways()
        if start is not None and result.reason == Reason.DIVERGED_CYCLE:
            result = self._from_inside(result, *start, monitors)
        if self.settings.view:
            self._view(result)
        return result

    def _from_inside(self, cycled: Result, x: PETSc.Vec, lam: PETSc.Vec, monitors: Sequence[Monitor]) -> Result:
        """The interior point method where active sets came back; their result where it knows no such bounds, or fails.

        Nobody observes it: a restart repeats it.
        """
        assert self._given is not None
        try:
            inequalities = Inequalities(self.problem, *self._given)
        except InputError:
            return cycled
        settings, outer = self.settings, self.prefix + SQPSettings.prefix
        words: dict[str, Any] = {"tol": settings.opt_tol, "rtol": settings.kkt_rtol, "outer": outer, "kkt": self.kkt}
        method = InteriorPoint(self.problem, x, lam, inequalities, read(InteriorSettings, self.prefix), **words)
        with freed(method):
            result = iterate(
                method, full_space_test(settings.max_it, settings.opt_tol, settings.feas_tol), monitors=monitors
            )
            if not result.converged:
                return cycled
            self.kind, self.ways = method.kind, self.ways | method.ways()
        result.message += "; by an interior point method, as active sets came back"
        return result

    def rehearse(self, x: PETSc.Vec, lam: PETSc.Vec) -> None:
        """Make one step on copies and forget it: then all solvers have looked for their options. Collective.

        For runs that end where they begin, so that a misspelt option is found there, too.

        Args:
            x, lam: from where.
        """
        method = self._method(x.copy(), lam.copy())
        with freed(method), suppress(SolveFailure):
            method.record(0)
            method.step()

    def start(self, design: PETSc.Vec | None = None) -> PETSc.Vec:
        """A starting point: the design (default zero), with u_i = u_0 or, `-sqp_start state`, its state.

        The first needs no solve over time, and does for the second where that fails.
        """
        design = self.problem.create_design() if design is None else design
        if self.settings.start == "state":
            try:
                return self.problem.join(self.problem.solve_state(design), design)
            except SolveFailure:
                pass
        return self.problem.join(self.problem.constant_state(design), design)

    def _method(self, x: PETSc.Vec, lam: PETSc.Vec) -> NewtonThenComposite | Single | InteriorPoint | MoreauYosida:
        settings, kind = self.settings, self.settings.type
        words: dict[str, Any] = {"outer": self.prefix + SQPSettings.prefix, "kkt": self.kkt}
        if kind == "active_set":
            return ActiveSetKKT(self.problem, x, lam, self.bounds, rtol=settings.kkt_rtol, **words)
        if self.on_path is not None:
            words |= {"tol": settings.opt_tol, "rtol": settings.kkt_rtol}
            return ON_PATHS[kind][0](self.problem, x, lam, self.inequalities, self.on_path, **words)
        words["gauss_newton"] = settings.gauss_newton

        def composite(x: PETSc.Vec, lam: PETSc.Vec) -> CompositeStep:
            assert self.composite is not None
            return CompositeStep(self.problem, x, lam, self.composite, **words)

        def feasible(x: PETSc.Vec, lam: PETSc.Vec) -> FeasibleNewton:
            return FeasibleNewton(self.problem, x, lam, gauss_newton=settings.gauss_newton)

        if kind == "composite":
            return composite(x, lam)
        if kind == "feasible":
            return feasible(x, lam)

        def newton(x: PETSc.Vec, lam: PETSc.Vec) -> NewtonKKT:
            enough = NEARLY * min(settings.opt_tol, settings.feas_tol)
            return NewtonKKT(self.problem, x, lam, rtol=settings.kkt_rtol, enough=enough, **words)

        if kind == "newton":
            return newton(x, lam)
        return NewtonThenComposite(newton, feasible, composite, x, lam, settings.feas_tol)

    def _view(self, result: Result) -> None:
        lines = [f"SQP object ({self.prefix}sqp_): type {self.settings.type}"]
        for settings in (self.settings, self.composite, self.on_path):
            if settings is not None:
                lines += [f"  {name}: {value}" for name, value in vars(settings).items()]
        lines.append(f"  method {self.kind}; KKT systems by {said(self.ways)}")
        lines.append(f"  {result.message}; {result.iterations} iterations")
        PETSc.Sys.Print("\n".join(lines), comm=self.problem.grid.comm)


def said(ways: Mapping[str, Sequence[str]]) -> str:
    """The ways of `SQPSolver` in words: "reduced, then wathen"."""
    words = {", then ".join(each): None for each in ways.values()}
    return "; ".join(words) or "none"
