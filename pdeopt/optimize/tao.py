"""Any TAO solver on a reduced objective: `-tao_type lmvm | bncg | nls | ntr | blmvm | bqnls | ...`.

TAO knows Euclidean products only. It therefore works on y = D z, where D^2 is the Riesz metric of the
design variables with its row sums on the diagonal: gradients in y are functions, not integrals, and counts
do not depend on mesh and time step. Bounds stay bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from petsc4py import PETSc

from pdeopt.arrays import readonly
from pdeopt.errors import InputError
from pdeopt.metric import RieszMetric
from pdeopt.monitor import History, Monitor, Reason, Record, Result, explain, print_monitor
from pdeopt.options import read, set_default, setting
from pdeopt.reduced import ReducedObjective

# TaoConvergedReason; petsc4py names the class `Reason` or `ConvergedReason`, by its version.
TAO_CONTINUE_ITERATING, TAO_DIVERGED_MAXITS, TAO_CONVERGED_USER = 0, -2, 8

#: TAO types that honour bounds on the variables.
BOUNDED = ("blmvm", "bncg", "bnls", "bntr", "bntl", "bqnls", "bqnkls", "bqnktr", "bqnktl", "tron", "gpcg")

#: TAO types that approximate the Hessian from gradients.
QUASI_NEWTON = ("lmvm", "blmvm", "bqnls", "bqnkls", "bqnktr", "bqnktl")


@dataclass(frozen=True)
class TaoSettings:
    """Settings beside TAO's own."""

    sqp_opt_tol: float = setting(1e-8, "tolerance of the reduced gradient in the dual norm", above=0)
    sqp_monitor: bool = setting(False, "print a line an iteration")


class TaoSolver:
    """min J(u(z), z) by TAO, stopped by the gradient's dual norm (projected where there are bounds).

    Args:
        reduced: the objective.
        lower, upper: bounds on the design variables, vectors or numbers; None for none.
        prefix: of the options before `tao_`.
    """

    def __init__(
        self,
        reduced: ReducedObjective,
        lower: PETSc.Vec | float | None = None,
        upper: PETSc.Vec | float | None = None,
        prefix: str = "",
        **defaults: object,
    ) -> None:
        self.reduced, self.problem = reduced, reduced.problem
        self.metric = RieszMetric(self.problem)
        self.settings = read(TaoSettings, prefix, **defaults)
        self.bounds = self._bounds(lower, upper)
        self._scale = self.metric.design_lumped()
        self._scale.sqrtabs()
        self.tao = self._create(prefix)
        self.history = History()

    def _create(self, prefix: str) -> PETSc.TAO:
        tao, size = PETSc.TAO().create(self.problem.grid.comm), self._scale.getSizes()
        tao.setOptionsPrefix(prefix)
        tao.setType("lmvm" if self.bounds is None else "blmvm")
        tao.setObjective(lambda _, y: self._value(y))
        tao.setObjectiveGradient(lambda _, y, g: self._value_and_gradient(y, g), self._scale.duplicate())
        tao.setGradient(lambda _, y, g: self._gradient(y, g), self._scale.duplicate())
        hessian = _ScaledHessian(self.reduced, self._scale)
        self._matrix = PETSc.Mat().createPython((size, size), hessian, comm=self.problem.grid.comm)
        self._matrix.setUp()
        self._matrix.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        tao.setHessian(lambda _, y, H, P: hessian.set_point(self.design(y)), self._matrix)
        tao.setMaximumIterations(1000)
        if self.bounds is not None:
            tao.setVariableBounds(tuple(_product(bound, self._scale) for bound in self.bounds))
        quasi_newton = PETSc.Options(prefix).getString("tao_type", tao.getType())
        if quasi_newton in QUASI_NEWTON:  # the default, a diagonal, takes ten times the iterations here
            set_default(f"{prefix}tao_{quasi_newton}_mat_lmvm_scale_type", "scalar")
            set_default(f"{prefix}tao_{quasi_newton}_mat_lmvm_hist_size", "10")
        tao.setFromOptions()
        if self.bounds is not None and tao.getType() not in BOUNDED:
            raise InputError("-tao_type with bounds", tao.getType(), " | ".join(BOUNDED))
        _default_to_no_preconditioner(tao.getKSP())
        tao.setConvergenceTest(self._test)
        return tao

    def design(self, y: PETSc.Vec) -> PETSc.Vec:
        """z = D^-1 y, a new vector."""
        z = y.duplicate()
        z.pointwiseDivide(y, self._scale)
        return z

    def _value(self, y: PETSc.Vec) -> float:
        return _huge_if_infinite(self.reduced.value(self.design(y)))

    def _value_and_gradient(self, y: PETSc.Vec, g: PETSc.Vec) -> float:
        value = self.reduced.value_and_gradient(self.design(y), g)
        g.pointwiseDivide(g, self._scale)
        return _huge_if_infinite(value)

    def _gradient(self, y: PETSc.Vec, g: PETSc.Vec) -> None:
        self.reduced.gradient(self.design(y), g)
        g.pointwiseDivide(g, self._scale)

    def _bounds(self, *bounds: PETSc.Vec | float | None) -> tuple[PETSc.Vec, PETSc.Vec] | None:
        if all(bound is None for bound in bounds):
            return None
        vectors = []
        for bound, infinite in zip(bounds, (PETSc.NINFINITY, PETSc.INFINITY)):
            vector = bound if isinstance(bound, PETSc.Vec) else self.problem.create_design()
            if not isinstance(bound, PETSc.Vec):
                vector.set(infinite if bound is None else bound)
            vectors.append(vector)
        with readonly(vectors[0]) as low, readonly(vectors[1]) as high:
            crossed = bool(self.problem.grid.sum(float((low > high).sum())) > 0)
        if crossed:
            raise InputError("bounds", "a lower bound above the upper one", "lower <= upper")
        return vectors[0], vectors[1]

    def solve(
        self, z: PETSc.Vec | None = None, *, monitors: Sequence[Monitor] = (), history: History | None = None
    ) -> Result:
        """Solve from the design z (default zero), which is copied. Collective."""
        z = self.problem.create_design() if z is None else z
        title = f"TAO ({self.tao.getType()})"
        printing = [print_monitor(self.problem.grid.comm, title)] if self.settings.sqp_monitor else []
        self._monitors, self.history = [*printing, *monitors], history or History()
        self._first = int(self.history[-1].iteration) + 1 if len(self.history) else 0
        y = _product(z, self._scale)
        self.tao.setSolution(y)
        self.tao.solve()
        return self._result(self.design(y))

    def destroy(self) -> None:
        """Free TAO and the Hessian's shell matrix."""
        self.tao.destroy()
        self._matrix.destroy()

    def _result(self, z: PETSc.Vec) -> Result:
        code = self.tao.getConvergedReason()
        reason = Reason.DIVERGED_TAO
        if self.history[-1].optimality <= self.settings.sqp_opt_tol:
            reason = Reason.CONVERGED_OPTIMALITY
        elif code > 0:
            reason = Reason.CONVERGED_TAO
        elif code == TAO_DIVERGED_MAXITS:
            reason = Reason.DIVERGED_MAX_IT
        detail = f"TAO reason {code}, type {self.tao.getType()}"
        state, multiplier = self.reduced.state(z), self.reduced.multiplier(z)
        return Result(state, z, multiplier, reason, explain(reason, detail), self.history)

    def _test(self, tao: PETSc.TAO) -> int:
        """Record the iteration, and stop by the dual norm of the (projected) gradient."""
        z, iteration = self.design(tao.getSolution()), tao.getIterationNumber()
        g = z.duplicate()
        self.reduced.gradient(z, g)
        feasibility = self.metric.residual_norm(self.reduced.linearization(z).residual)
        optimality = self._optimality(z, g)
        krylov = tao.getKSP().getIterationNumber() if tao.getKSP() and iteration else 0
        record = Record(
            self._first + iteration, tao.getObjectiveValue(), feasibility, optimality, math.nan, int(krylov)
        )
        self.history.append(record)
        PETSc.garbage_cleanup(self.problem.grid.comm)  # on several ranks, objects wait for this
        for monitor in self._monitors:
            monitor(record)
        if optimality <= self.settings.sqp_opt_tol:
            return TAO_CONVERGED_USER
        if iteration >= tao.getMaximumIterations():
            return TAO_DIVERGED_MAXITS
        return TAO_CONTINUE_ITERATING

    def _optimality(self, z: PETSc.Vec, g: PETSc.Vec) -> float:
        """|g| in the dual norm; with bounds |z - P(z - D^-2 g)| in D, P the projection onto the box."""
        if self.bounds is None:
            return self.metric.design_dual_norm(g)
        step = _product(self._scale, self._scale)
        step.pointwiseDivide(g, step)
        step.aypx(-1.0, z)
        step.pointwiseMax(step, self.bounds[0])
        step.pointwiseMin(step, self.bounds[1])
        step.axpy(-1.0, z)
        return float(_product(step, self._scale).norm())


class _ScaledHessian:
    """Context of the shell matrix D^-1 J'' D^-1 at a point, plus multiples of the identity from TAO."""

    def __init__(self, reduced: ReducedObjective, scale: PETSc.Vec) -> None:
        self.reduced, self.scale, self.moved = reduced, scale, 0.0

    def set_point(self, z: PETSc.Vec) -> None:
        self.z, self.moved = z, 0.0

    def mult(self, matrix: PETSc.Mat, dy: PETSc.Vec, out: PETSc.Vec) -> None:
        dz = dy.duplicate()
        dz.pointwiseDivide(dy, self.scale)
        self.reduced.hvp(self.z, dz, out)
        out.pointwiseDivide(out, self.scale)
        out.axpy(self.moved, dy)

    def shift(self, matrix: PETSc.Mat, amount: float) -> None:
        self.moved += amount


def _product(a: PETSc.Vec, b: PETSc.Vec) -> PETSc.Vec:
    result = a.duplicate()
    result.pointwiseMult(a, b)
    return result


def _huge_if_infinite(value: float) -> float:
    """TAO's line searches back away from huge values, not from infinity."""
    return value if math.isfinite(value) else 1e300


def _default_to_no_preconditioner(ksp: PETSc.KSP | None) -> None:
    """PETSc would take ILU, which a shell matrix has not; an option of the user wins."""
    if ksp and not PETSc.Options(ksp.getOptionsPrefix()).hasName("pc_type"):
        ksp.getPC().setType("none")
