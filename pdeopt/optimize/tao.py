"""Any TAO solver on a reduced objective: `-tao_type lmvm | bncg | nls | ntr | blmvm | bqnls | ...`.

TAO knows Euclidean products only. It therefore works on y = D z, where D^2 is the Riesz metric of the
design variables with its row sums on the diagonal: gradients in y are functions, not integrals, and counts
do not depend on mesh and time step. Bounds stay bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy as copy_of
from dataclasses import dataclass
from typing import Any

import numpy as np
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.metric import RieszMetric
from pdeopt.control.reduced import ReducedObjective, WindowSettings
from pdeopt.core.arrays import assign, copy
from pdeopt.core.autodiff import in_turn, plainly
from pdeopt.core.errors import InputError, SolveFailure, as_raised
from pdeopt.core.interrupt import Interrupted
from pdeopt.core.monitor import ControlResult, History, Monitor, Reason, Record, explain, print_monitor, remedy
from pdeopt.core.options import defaults, set_default
from pdeopt.core.petsc_values import check_petsc_values, types_of
from pdeopt.core.ranks import freed
from pdeopt.core.settings import Section, Settings, read, setting
from pdeopt.functions.petsc import PetscFunction
from pdeopt.functions.smooth import ScaledFunction, SmoothFunction
from pdeopt.optimize.coarse_time import with_coarse_space
from pdeopt.optimize.descent.adam import Adam
from pdeopt.optimize.descent.apts import APTS
from pdeopt.optimize.descent.astrom import ASTROM
from pdeopt.optimize.descent.minimizer import Minimizer
from pdeopt.optimize.descent.mlvr import MLVR
from pdeopt.optimize.descent.multilevel import MGOPT
from pdeopt.optimize.descent.quasinewton import LBFGS, SSBroyden
from pdeopt.optimize.descent.rmtr import RMTR
from pdeopt.optimize.descent.schwarz import SPQN
from pdeopt.optimize.descent.trust import TrustRegionMinimizer
from pdeopt.optimize.fullspace.curvature import NO_MINIMUM, curves_down
from pdeopt.optimize.fullspace.method import with_price
from pdeopt.optimize.parts.bounds import Bound, Bounds, InBox

# TaoConvergedReason; petsc4py names the class `Reason` or `ConvergedReason`, by its version.
TAO_CONTINUE_ITERATING, TAO_DIVERGED_MAXITS, TAO_DIVERGED_USER, TAO_CONVERGED_USER = 0, -2, -8, 8

#: TAO types that honor bounds on the variables.
BOUNDED = ("blmvm", "bncg", "bnls", "bntr", "bntl", "bqnls", "bqnkls", "bqnktr", "bqnktl", "tron", "gpcg")

#: TAO types that need what a reduced objective has not: residuals, constraints, an explicit Hessian.
UNFIT = (
    *("pounders", "brgn", "bmrm", "lcl", "ipm", "pdipm", "almm", "admm", "bqpip", "shell"),
    *("ssils", "ssfls", "asils", "asfls"),
)

#: TAO types that approximate the Hessian from gradients.
QUASI_NEWTON = ("lmvm", "blmvm", "bqnls", "bqnkls", "bqnktr", "bqnktl")

#: Optimizers of pdeopt as TAO's type python, by what -tao_python_type calls them.
PYTHON_TYPES: dict[str, type[Minimizer]] = {
    f"pdeopt.optimize.{each.__name__}": each
    for each in (LBFGS, SSBroyden, SPQN, TrustRegionMinimizer, APTS, MGOPT, RMTR, MLVR, ASTROM, Adam)
}

#: Those of them that need samples, which a control problem does not have.
SAMPLING = (MLVR, ASTROM)

#: Of SPQN: controls are coupled over the whole time, and windows alone cost more than they gain.
CONTROL_DEFAULTS: dict[str, Any] = {"local_it": 0, "memory": 50, "coarse_rtol": 1e-3}


def _groups(optimizer: type[Minimizer]) -> tuple[Section, ...]:
    return (Section(optimizer.Settings, defaults=CONTROL_DEFAULTS if optimizer is SPQN else {}),)


@dataclass(frozen=True)
class TaoPythonSettings(Settings, prefix="tao_"):
    """Optimizers of pdeopt as types of TAO."""

    python_type: str = setting(
        "",
        "optimizer of TAO's type python: one of pdeopt.optimize, or MODULE.NAME of a class of yours",
        reads={name: _groups(optimizer) for name, optimizer in PYTHON_TYPES.items() if optimizer not in SAMPLING},
    )


@dataclass(frozen=True)
class TaoTypeSettings(Settings, prefix="tao_"):
    """TAO on the reduced objective; -tao_view and -help show its own options."""

    type: str = setting(
        "lmvm", "TAO solver; default bqnls with bounds", reads={"python": (Section(TaoPythonSettings), WindowSettings)}
    )


@dataclass(frozen=True)
class TaoSettings(Settings, prefix="sqp_", includes=(Section(TaoTypeSettings),)):
    """When TAO stops, by the options of the full-space solvers."""

    max_it: int = setting(1000, "largest number of iterations; -tao_max_it wins", at_least=0)
    opt_tol: float = setting(1e-8, "tolerance of the reduced gradient in the dual norm", above=0)
    gauss_newton: bool = setting(False, "leave the constraint's curvature out of Hessian products (nls, ntr, ...)")
    monitor: bool = setting(False, "print a line an iteration")


class TaoSolver:
    """min J(u(z), z) by TAO, stopped by the gradient's dual norm (projected where there are bounds).

        result = TaoSolver(ReducedObjective(problem), lower=0.0).solve()

    `-tao_type` is any type of TAO, or python with an optimizer of pdeopt as `-tao_python_type`. Each iterate solves the
    state equation. Collective over the ranks of the problem's grid.

    Args:
        reduced: the objective.
        lower, upper: bounds on the design variables, as for `Bounds.of`; None for none.
        prefix: of the options, before `tao_` and `sqp_`.
        **defaults: settings that replace the defaults, and `tao_type`; options win.

    Raises:
        InputError: bounds that cross, or a TAO type that knows no bounds.
    """

    def __init__(
        self, reduced: ReducedObjective, lower: Bound = None, upper: Bound = None, prefix: str = "", **defaults: object
    ) -> None:
        is_bounded = lower is not None or upper is not None
        given = defaults.pop("tao_type", "bqnls" if is_bounded else "lmvm")
        self.settings = read(TaoSettings, prefix, **defaults)
        self.reduced, self.problem, self.prefix = reduced, reduced.problem, prefix
        if self.settings.gauss_newton:
            self.reduced = copy_of(reduced)
            self.reduced.gauss_newton = True
        check_petsc_values()
        self.metric = RieszMetric(self.problem)
        self.bounds = Bounds.of(self.problem, lower, upper) if is_bounded else None
        self.type = read(TaoTypeSettings, prefix, type=given).type
        if self.bounds is not None and self.type not in BOUNDED:
            raise InputError("-tao_type with bounds", self.type, " | ".join(BOUNDED))
        if self.type in UNFIT:
            raise InputError("-tao_type", self.type, " | ".join(sorted({*types_of("tao_type")} - {*UNFIT})))
        if self.type == "python":
            _check_python_type(read(TaoPythonSettings, prefix).python_type)
        self._scale = self.metric.root()
        whole = self.reduced if self.bounds is None else InBox(self.reduced, self.bounds)
        self._function = PetscFunction(ScaledFunction(whole, copy(self._scale)))

    @in_turn
    @plainly
    def solve(
        self, z: PETSc.Vec | None = None, *, monitors: Sequence[Monitor] = (), history: History | None = None
    ) -> ControlResult:
        """Solve from the design z (default zero), which is copied. Collective.

        Args:
            monitors: called with each record; they may raise `Interrupted`.
            history: of an interrupted run whose last point is z.
        """
        problem = self.problem
        design = self._into_box(problem.create_design() if z is None else z.copy())
        self.design, self.history = design, History(list(history.records) if history else [])
        #: design, state and multiplier of the last good iteration
        self.last = ControlResult(design, Reason.ITERATING, "", self.history)
        self.last.state, self.last.multiplier = (lambda: problem.constant_state(design)), problem.create_multiplier
        self._failure = ""
        self._first = int(self.history[-1].iteration) if len(self.history) else 0
        self._signal: Interrupted | None = None
        title = f"TAO ({self.type})"
        printing = [print_monitor(self.problem.grid.comm, title)] if self.settings.monitor else []
        self._monitors = [*printing, *monitors]
        hessian = _Hessian(self._function)
        size = self._scale.getSizes()
        matrix = PETSc.Mat().createPython((size, size), hessian, comm=self.problem.grid.comm)
        matrix.setUp()
        matrix.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        tao = self._create(matrix, hessian)
        with freed(tao, matrix), as_raised():  # objects with Python contexts must not live on to the interpreter's end
            tao.setSolution(_product(self.design, self._scale))
            tao.solve()
            return self._result(tao.getConvergedReason())

    def _create(self, matrix: PETSc.Mat, hessian: _Hessian) -> PETSc.TAO:
        tao = PETSc.TAO().create(self.problem.grid.comm)
        tao.setOptionsPrefix(self.prefix)
        tao.setType(self.type)
        tao.setObjective(_callback(self._value))
        tao.setObjectiveGradient(_callback(self._value_and_gradient), self._scale.duplicate())
        tao.setGradient(_callback(self._gradient), self._scale.duplicate())
        tao.setHessian(_callback(lambda y, H, P: hessian.set_point(y)), matrix)
        most = self.settings.max_it
        tao.setMaximumIterations(min(max(most, 1), np.iinfo(PETSc.IntType).max))  # newer versions refuse 0
        self._ends_at_start = most == 0 and not PETSc.Options(self.prefix).hasName("tao_max_it")
        tao.setAppCtx(_Context(self.reduced, self._scale))
        if self.bounds is not None:
            tao.setVariableBounds(tuple(map(self._scaled_bound, (self.bounds.lower, self.bounds.upper))))
        if self.type in QUASI_NEWTON:  # the default, a diagonal, takes ten times the iterations here
            set_default(f"{self.prefix}tao_{self.type}_mat_lmvm_scale_type", "scalar")
            set_default(f"{self.prefix}tao_{self.type}_mat_lmvm_hist_size", "10")
        spqn = {f"{self.prefix}spqn_{name}": str(value) for name, value in CONTROL_DEFAULTS.items()}
        with defaults(spqn), as_raised():
            tao.setFromOptions()
        _default_to_no_preconditioner(tao.getKSP())
        tao.setConvergenceTest(_callback(lambda: self._test(tao)))
        return tao

    def _unscaled(self, y: PETSc.Vec) -> PETSc.Vec:
        z = y.duplicate()
        z.pointwiseDivide(y, self._scale)
        return self._into_box(z)

    def _into_box(self, z: PETSc.Vec) -> PETSc.Vec:
        """z itself, moved into the bounds, which y keeps up to rounding only."""
        if self.bounds is not None:
            assign(z, self.bounds.nearest(copy(z)))
        return z

    def _scaled_bound(self, end: Tensor) -> PETSc.Vec:
        """A bound of y, with PETSc's infinity."""
        bound = self.problem.create_design()
        assign(bound, (end * copy(self._scale)).clamp(PETSc.NINFINITY, PETSc.INFINITY))
        return bound

    def _value(self, y: PETSc.Vec) -> float:
        value = self._function.value(y)
        return value if math.isfinite(value) else self._bowl(y, None)

    def _value_and_gradient(self, y: PETSc.Vec, g: PETSc.Vec) -> float:
        value = self._function.value_and_gradient(y, g)
        return value if math.isfinite(value) else self._bowl(y, g)

    def _gradient(self, y: PETSc.Vec, g: PETSc.Vec) -> None:
        self._value_and_gradient(y, g)

    def _bowl(self, y: PETSc.Vec, g: PETSc.Vec | None) -> float:
        """Where there is no state: a steep paraboloid about the last good point, from which line searches,
        which interpolate values and slopes, find the way back. Infinity would lose them."""
        away = y.copy()
        away.axpy(-1.0, _product(self.design, self._scale))
        value = self.history[-1].objective if len(self.history) else 0.0
        height = 10.0 * (1.0 + abs(value))
        if g is not None:
            away.copy(g)
            g.scale(2.0 * height / max(away.dot(away), 1e-300))
        return float(value + height)

    def _result(self, code: int) -> ControlResult:
        """The last good point, and why there is none after it."""
        reason, detail = Reason.DIVERGED_TAO, f"TAO reason {code}, type {self.type}"
        if self._signal is not None:
            reason, detail = Reason.INTERRUPTED, str(self._signal)
        elif self._failure:
            reason, detail = Reason.DIVERGED_NAN, self._failure
        elif self.history[-1].optimality <= self.settings.opt_tol:
            reason = Reason.CONVERGED_OPTIMALITY
        elif code > 0:
            reason = Reason.CONVERGED_TAO
        elif code == TAO_DIVERGED_MAXITS:
            reason = Reason.DIVERGED_MAX_IT
        message = with_price(explain(reason, detail, remedy(reason, "tao")), reason, self.problem)
        if reason == Reason.CONVERGED_OPTIMALITY and len(self.history) == 1 and self._curves_down():
            message = f"{message}: {NO_MINIMUM}"
        self.last.reason, self.last.message = reason, message
        return self.last

    def _curves_down(self) -> bool:
        """Whether the start, where the gradient is nothing, is seen to be no minimum. Collective."""
        if self.reduced.sweeps is not None:
            return False
        z, lam = copy(self.design), self.last.multiplier
        held = None if self.bounds is None else (z == self.bounds.lower) | (z == self.bounds.upper)
        return curves_down(self.metric, self.reduced.linearization(z), lam, held)

    def _test(self, tao: PETSc.TAO) -> int:
        """Record the iteration, and stop by the dual norm of the (projected) gradient."""
        z, iteration = self._unscaled(tao.getSolution()), tao.getIterationNumber()
        try:
            record = self._record(tao, z, iteration)
        except SolveFailure as failure:
            self._failure = str(failure)
            if not len(self.history):
                nan = math.nan
                self.history.append(Record(self._first, nan, nan, nan, nan, 0, "no state"))
            return TAO_DIVERGED_USER
        self.last.state, self.last.multiplier = self.reduced.solution(copy(z))
        z.copy(self.design)
        if self._first + iteration >= len(self.history):  # else the record of before
            self.history.append(record)
        try:
            for monitor in self._monitors:
                monitor(record)
        except Interrupted as signal:
            self._signal = signal
            return TAO_DIVERGED_USER
        if record.optimality <= self.settings.opt_tol:
            return TAO_CONVERGED_USER
        ends = self._ends_at_start or iteration >= tao.getMaximumIterations()
        return TAO_DIVERGED_MAXITS if ends else TAO_CONTINUE_ITERATING

    def _record(self, tao: PETSc.TAO, z: PETSc.Vec, iteration: int) -> Record:
        _, gradient, feasibility = self.reduced.evaluation(copy(z))
        g = self.problem.create_design()
        assign(g, gradient)
        krylov = int(tao.getKSP().getIterationNumber()) if tao.getKSP() and iteration else 0
        value, optimality = tao.getObjectiveValue(), self._optimality(z, g)
        return Record(self._first + iteration, value, feasibility, optimality, math.nan, krylov)

    def _optimality(self, z: PETSc.Vec, g: PETSc.Vec) -> float:
        """|g| in the dual norm; with bounds |z - P(z - D^-2 g)| in D, P the projection onto the box."""
        if self.bounds is None:
            return self.metric.design_dual_norm(g)
        D, point = copy(self._scale), copy(z)
        step = D * (self.bounds.nearest(point - copy(g) / D**2) - point)
        return math.sqrt(float(self.problem.grid.sum(step @ step)))


class _Context:
    """What optimizers of TAO's type python get instead of TAO's callbacks: windows of time, and coarser steps."""

    def __init__(self, reduced: ReducedObjective, scale: PETSc.Vec) -> None:
        self.reduced, self.scale = reduced, scale

    def smooth_function(self, tao: PETSc.TAO) -> SmoothFunction:
        del tao  # see `_callback`
        return with_coarse_space(self.reduced, self.scale)


class _Hessian:
    """Context of the shell matrix of a function's Hessian at a point, plus multiples of the identity from TAO."""

    def __init__(self, function: PetscFunction) -> None:
        self.function, self.moved = function, 0.0

    def set_point(self, y: PETSc.Vec) -> None:
        self.y, self.moved = y.copy(), 0.0

    def mult(self, matrix: PETSc.Mat, dy: PETSc.Vec, out: PETSc.Vec) -> None:
        del matrix  # see `_callback`
        self.function.hvp(self.y, dy, out)
        out.axpy(self.moved, dy)

    def shift(self, matrix: PETSc.Mat, amount: float) -> None:
        self.moved += amount


def _callback(function: Callable[..., Any]) -> Callable[..., Any]:
    """What TAO calls with itself and the arguments of `function`.

    A frame may outlive the solve, in a traceback that a caller keeps. It must not hold what TAO hands over: a
    reference of its own to the solver, which `destroy` does not end.
    """

    def call(tao: PETSc.TAO, *arguments: Any) -> Any:
        del tao
        return function(*arguments)

    return call


def _check_python_type(name: str) -> None:
    """TAO would end in a traceback."""
    if not name or (name.startswith("pdeopt.optimize.") and name not in PYTHON_TYPES):
        legal = " | ".join([*PYTHON_TYPES, "a class of yours, MODULE.NAME"])
        raise InputError("-tao_python_type", name or "nothing", legal)


def _product(a: PETSc.Vec, b: PETSc.Vec) -> PETSc.Vec:
    result = a.duplicate()
    result.pointwiseMult(a, b)
    return result


def _default_to_no_preconditioner(ksp: PETSc.KSP | None) -> None:
    """PETSc would take ILU, which a shell matrix has not; an option of the user wins."""
    if ksp and not PETSc.Options(ksp.getOptionsPrefix()).hasName("pc_type"):
        ksp.getPC().setType("none")
