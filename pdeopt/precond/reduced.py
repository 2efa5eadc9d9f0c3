"""KKT systems by conjugate gradients on the reduced Hessian, as a PETSc Python PC.

States and multipliers are eliminated (`Elimination`); what is left, H d = r in the design variables d = [z | p],
is solved by a KSP of its own. Its preconditioner is the Hessian of the objective in the controls, alpha times the
inner product where control has a price: H is that plus a compact operator, so iterations depend neither on the mesh nor
on the number of steps. They grow as alpha falls. A product takes one sweep forward and one backward in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Eliminated, Elimination
from pdeopt.control.metric import DesignForm, dual_length
from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import SolveFailure
from pdeopt.kkt.blocks import parameter_hessian
from pdeopt.kkt.operator import KKTOperator
from pdeopt.precond.base import Preconditioner
from pdeopt.precond.carrying import CarryingCG
from pdeopt.precond.operator import operator_of
from pdeopt.steps.linear_mgrit import EXACT_RTOL
from pdeopt.steps.matrices.krylov import keeping_few
from pdeopt.steps.vectorlayout import Fields

#: Controls of a rank above which the directions of conjugate gradients are freed after a solve.
LARGE = 1 << 19

#: The share of a tolerance that is left to errors of sweeps, and the relative residual that these always reach.
SWEEP_SHARE, LOOSEST_RTOL = 0.1, 1e-2

#: So many global parameters have their block of the reduced Hessian computed, where the objective alone gives none.
FEW_PARAMETERS = 16

#: Of more of them, fields, the dense Hessian of the objective is not made; their inner product stands for it.
MANY_PARAMETERS = 500

#: Iterations after which states and multipliers that were carried along are found anew, and rounding errors are seen.
MOST_CARRIED = 100

#: Conjugate gradients are allowed a bound of so many times the iterations that they may take.
PESSIMISM = 2.0


class ReducedHessian:
    """H = W_dd + W_du S + S'W_ud + S'W_uu S, S = -F_u^-1 F_d, over vectors of design variables: a shell matrix.

    Args:
        operator: the KKT operator, at a point.

    Attributes:
        operator: the same.
        elimination: states and multipliers of a design.
        curvature: d'H d of the last product.
        curves_down: whether that was not positive for some d since this was set to False.
    """

    def __init__(self, operator: KKTOperator) -> None:
        self.operator = operator
        self.elimination = Elimination(operator.lin, operator.problem.propagator, operator.hessian_fields)
        self.curves_down, self.curvature = False, 0.0

    def eliminate(self, design: Tensor, g: Fields | None = None, c: Tensor | None = None) -> Eliminated:
        """See `Elimination`; fixed design variables are left out, their equations are those of the pin."""
        fixed = self.operator.fixed
        if fixed is None:
            return self.elimination(design, g, c)
        found = self.elimination(torch.where(fixed, 0.0, design), g, c)
        given = 0.0 if g is None else torch.cat([g[1], g[2][: self.operator.problem.layout.param_size]])
        return found._replace(rest=torch.where(fixed, given - self.operator.pin * design, found.rest))

    def mult(self, matrix: PETSc.Mat | None, x: PETSc.Vec, out: PETSc.Vec) -> None:
        """out = H x; the verb of a PETSc shell matrix."""
        assign(out, -self.product(copy(x)).rest)

    def product(self, design: Tensor) -> Eliminated:
        """States and multipliers of a design, and -H times it; looks at the curvature along it."""
        found = self.eliminate(design)
        self.curvature = -float(self.operator.problem.grid.sum(design @ found.rest))
        self.curves_down |= not self.curvature > 0
        return found

    multTranspose = mult  # H is symmetric

    def sum(self, own: Tensor) -> Tensor:
        """Over the ranks."""
        return self.operator.problem.grid.sum(own)

    def shell(self) -> PETSc.Mat:
        """A new PETSc matrix; the caller destroys it. Collective."""
        sizes = (self.operator.problem.layout.design_size, None)
        matrix = PETSc.Mat().createPython((sizes, sizes), context=self, comm=self.operator.problem.grid.comm)
        matrix.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        matrix.setUp()
        return matrix


class ReducedPC(Preconditioner):
    """Conjugate gradients on the reduced Hessian, states and multipliers eliminated.

    One application solves the KKT system to the tolerance of the KSP that it belongs to, relative to the right-hand
    side in the dual norm of the Riesz metric; so `preonly` is the method outside. Inside, `-{prefix}reduced_ksp_type`
    is `CarryingCG`, conjugate gradients that stop where the Hessian curves down: then the design of the last iteration
    is given back, with its states and multipliers, along which the quadratic model falls; `curves_down` says so. The
    preconditioner is that of `-{prefix}reduced_pc_type`, default a `ControlBlock`; another one, as of Kronecker factors
    for networks, finds H and the problem by `pc.getOperators()[0].getPythonContext()`, a `ReducedHessian`.

    With the metric of the design alone ("design") H is that metric, and an application is exact: one sweep back and one
    forward, without iterations.

    Attributes:
        iterations: of the last application.
        curves_down: whether it met a direction along which the reduced Hessian is not positive.
        missed: the dual norm of what it left of the right-hand side, where that is in the design variables alone.
        size: the norm of the right-hand side to come, where it is known.
        foresees: whether a solve ends after its first iteration where that promises more than it may take.
        gave_up: whether the last one did; then it found nothing, zero.
    """

    iterations = 0
    curves_down = gave_up = foresees = False
    missed = math.inf
    size: float | None = None
    _rtol = 1e-8

    def update(self, pc: PETSc.PC) -> None:
        self.operator = operator_of(pc.getOperators()[1])
        self.hessian = ReducedHessian(self.operator)
        self._matrix, self._ksp = self.hessian.shell(), PETSc.KSP().create(pc.getComm())
        self._right, self._left = self._matrix.createVecs()
        self.own(*(each.destroy for each in (self._matrix, self._right, self._left, self._ksp)))
        self._ksp.setOptionsPrefix(self.prefix + "reduced_")
        self._ksp.setOperators(self._matrix)
        self._choose_type()
        self._ksp.getPC().setType("python")
        self._ksp.getPC().setPythonContext(ControlBlock())
        propagator = self.operator.problem.propagator
        with keeping_few(self.prefix + "reduced_", propagator.settings.propagator == "serial"):
            self._ksp.setFromOptions()
        self._max_it = self._ksp.getTolerances()[3]
        self._ksp.setUp()  # now, where a failure reaches all ranks
        self._is_flexible = self._ksp.getType() == "fcg"
        self._carrying = self._ksp.getPythonContext() if self._ksp.getType() == "python" else None
        if self._is_flexible:
            self._before = self._left.duplicate()
            self.own(self._before.destroy)
            self._ksp.setConvergenceTest(self._watch)

    def _choose_type(self) -> None:
        """Conjugate gradients that carry along where sweeps are exact, else flexible ones; or as the options say."""
        is_exact = self.operator.problem.propagator.is_exact(self.operator.lin.jacobian)
        default = "python" if is_exact else "fcg"
        kind = PETSc.Options(self._ksp.getOptionsPrefix()).getString("ksp_type", default)
        self._ksp.setType(kind)
        if kind == "python":
            self._ksp.setPythonContext(CarryingCG())
        else:
            self._ksp.setNormType(PETSc.KSP.NormType.NATURAL)

    def preSolve(self, pc: PETSc.PC, ksp: PETSc.KSP, right: PETSc.Vec, left: PETSc.Vec) -> None:
        """Tolerance and limit of the solve outside are those of the solve inside. PETSc calls it before a solve."""
        self._rtol, _, _, limit = ksp.getTolerances()
        self._ksp.setTolerances(max_it=min(limit, self._max_it))

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        layout, eliminate, elimination = self.operator.problem.layout, self.hessian.eliminate, self.hessian.elimination
        g, c = layout.kkt_fields(x)
        if self.is_exact:
            return self._project(g, c, y)
        sweep_rtol = SWEEP_SHARE * self._rtol if self._is_flexible else EXACT_RTOL
        elimination.rtol = sweep_rtol
        start = eliminate(torch.zeros(layout.design_size, dtype=torch.float64), g, c)
        size, self.size = self._size(g, c) if self.size is None else self.size, None
        assign(self._right, start.rest)
        if self._carrying is None:  # they are of all steps, and found anew in the end
            del start, g, c
        design = self._solve(size)
        self._rest()
        if self.gave_up:
            y.set(0.0)
            return
        elimination.rtol = sweep_rtol
        if isinstance(self._carrying, CarryingCG) and not self.curves_down and 0 < self.iterations <= MOST_CARRIED:
            state, multiplier, rest = self._carrying.found
            del self._carrying.found  # it is as large as all states
            found = Eliminated(start.state + state, start.multiplier + multiplier, rest)
        else:
            found = eliminate(design, *layout.kkt_fields(x))
        assign(y, found.state, design, found.multiplier)
        if not self._is_flexible:  # of inexact sweeps there is more that is missed
            assign(self._right, found.rest)
            self.missed = self.operator.metric.design_dual_norm(self._right)

    @property
    def is_exact(self) -> bool:
        """Whether the reduced Hessian is the metric of the design, whose inverse is at hand."""
        return self.operator.hessian == "design" and self.operator.fixed is None

    def _rest(self) -> None:
        """Free the directions of conjugate gradients, where they are large; made anew when needed. Collective.

        They are as large as a dozen vectors of all controls, and what follows a solve evaluates the next point.
        """
        if self._matrix.getSize()[0] > LARGE * self._matrix.getComm().getSize():
            self._ksp.reset()
            self._ksp.setOperators(self._matrix)

    def _project(self, g: Fields, c: Tensor, y: PETSc.Vec) -> None:
        """lam = T^-T g_u, d = R_d^-1 (g_d - C'lam), u = T^-1 (c - C d)."""
        elimination, metric = self.hessian.elimination, self.operator.metric
        lam = elimination.multiplier(g[0])
        assign(self._right, elimination.design_part(g[1], g[2], lam))
        design = copy(metric.design_inverse(self._right, self._left))
        assign(y, elimination.state(design, c), design, lam)

    def _size(self, g: Fields, c: Tensor) -> float:
        """The norm of a right-hand side."""
        return dual_length(self.operator.metric, *g, c)

    def _solve(self, size: float) -> Tensor:
        """d with |r - H d| <= rtol min(size, |r|) in the dual norm, or the last one before H curved down.

        r is in the vector of right-hand sides.
        """
        self._ksp.getPC().apply(self._right, self._left)
        natural = self._right.dot(self._left)
        self.iterations, self.curves_down, self.hessian.curves_down, self.gave_up = 0, False, False, False
        if natural == 0.0:
            return torch.zeros(self._right.getLocalSize(), dtype=torch.float64)
        if not (math.isfinite(natural) and natural > 0):
            raise SolveFailure(
                "the control block of the KKT system is not positive", "add ControlCost to the objective"
            )
        dual = self.operator.metric.design_dual_norm(self._right)
        self._ksp.setTolerances(rtol=1e-15, atol=self._rtol * min(size, dual) * math.sqrt(natural) / dual)
        self._natural = natural
        if self.foresees:
            self._ksp.setConvergenceTest(self._watch)
        if isinstance(self._carrying, CarryingCG):
            self._carrying.first = copy(self._left)
        self._ksp.solve(self._right, self._left)
        self.iterations = self._ksp.getIterationNumber()
        self.curves_down = self.hessian.curves_down
        if self.curves_down and self._is_flexible:
            self._before.copy(self._left)
        if self.curves_down and self._left.norm() == 0.0:
            self._ksp.getPC().apply(self._right, self._left)
        return copy(self._left)

    def _watch(self, ksp: PETSc.KSP, iteration: int, norm: float) -> PETSc.KSP.ConvergedReason:
        """The convergence test, with foresight; and how accurate the sweeps of the next product are.

        A product with the error E_k d_k moves the residual that is left by no more than the tolerance while
        |E_k| < eps / |r_k|: the nearer the solution, the less accurate (J. van den Eshof, G. L. G. Sleijpen, Inexact
        Krylov subspace methods for linear systems, SIAM J. Matrix Anal. Appl. 26, 2004, section 4).
        """
        reasons, (_, target, _, most) = PETSc.KSP.ConvergedReason, ksp.getTolerances()
        if not math.isfinite(norm):
            return reasons.DIVERGED_NANORINF
        if self.hessian.curves_down and self._is_flexible:  # `fcg` goes on: the design before this step is what counts
            return reasons.DIVERGED_INDEFINITE_MAT
        if norm <= target:
            return reasons.CONVERGED_ATOL
        if self.foresees and iteration == 1:
            self.gave_up = self._bound(target) > PESSIMISM * most
            if self.gave_up:
                return reasons.DIVERGED_MAX_IT
        if self._is_flexible:
            self._left.copy(self._before)
            self.hessian.elimination.rtol = min(LOOSEST_RTOL, SWEEP_SHARE * target / norm)
        return reasons.ITERATING

    def _bound(self, target: float) -> float:
        """Iterations that conjugate gradients need at most, from their first product: sqrt(|H|) log(2 / reduction) / 2.

        H >= P, the objective's own Hessian in the controls, and |H| is about d'H d / d'P d for the first direction
        d = P^-1 r, as right-hand sides are smooth. The bound does not see that the iteration gets faster as it goes on.
        """
        condition = max(self.hessian.curvature / self._natural, 0.0)
        return 0.5 * math.sqrt(condition) * math.log(2.0 * math.sqrt(self._natural) / target)

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        self.tell(pc, viewer, "states and multipliers eliminated; the design by")
        self.view_inner(pc, viewer, self._ksp)


class ControlBlock(Preconditioner):
    """The Hessian of the objective in the controls alone, or the Riesz metric of the design; exact where states count
    for nothing.

    Its inverse is that of the control form, one small solve a step; of few global parameters it is the inverse of their
    block of H, of many that of the objective's own Hessian in them, a prior for instance, and of a field that of
    `param_mass`, which is best the prior's precision.
    """

    def update(self, pc: PETSc.PC) -> None:
        hessian: ReducedHessian = pc.getOperators()[0].getPythonContext()
        self.operator = hessian.operator
        self._form = _control_form(self.operator)
        self._parameters = _parameter_block(hessian)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        layout, fixed = self.operator.problem.layout, self.operator.fixed
        given = copy(x)  # the inverse is cut, not that of a cut form: for masses they differ by a small factor
        free = given if fixed is None else torch.where(fixed, 0.0, given)
        z, p = free.split([layout.control_size, layout.param_size])
        blocks = self._form.solve(z), self._parameters(layout.on_all_ranks(p))[: layout.param_size]
        if fixed is None:
            assign(y, *blocks)
        else:
            assign(y, torch.where(fixed, given / self.operator.pin, torch.cat(blocks)))


def _control_form(operator: KKTOperator) -> DesignForm:
    """The form of the flat controls: that of the metric where W is one, or where a control has no price. Collective."""
    problem, lin = operator.problem, operator.lin
    if operator.is_metric:
        return operator.metric.design
    _, control = lin.objective_blocks
    control = control.agreed(problem.grid)
    has_price = not float(problem.grid.max(control.zero_rows().any().double()))
    return DesignForm(problem, control) if has_price else operator.metric.design


def _parameter_block(hessian: ReducedHessian) -> Callable[[Tensor], Tensor]:
    """The inverse of a form of the global parameters, (param_dim,) -> (param_dim,). Collective."""
    operator, problem = hessian.operator, hessian.operator.problem
    P = problem.param_dim
    if P == 0 or operator.is_metric or P > MANY_PARAMETERS:
        return lambda p: operator.metric.parameters.solve(p[None])[0]
    if P > FEW_PARAMETERS:
        block = parameter_hessian(operator)
    else:
        layout = problem.layout
        x, columns = layout.create_design(), []
        for dp in torch.eye(P, dtype=torch.float64):
            assign(x, torch.zeros(layout.control_size, dtype=torch.float64), dp[: layout.param_size])
            assign(x, -hessian.eliminate(copy(x)).rest)
            columns.append(layout.design_fields(x)[1])
        values, vectors = torch.linalg.eigh(torch.stack(columns))
        positive = values.abs().clamp(min=1e-12 * float(values.abs().amax()))
        block = vectors @ torch.diag(positive) @ vectors.T
    return lambda p: torch.linalg.solve(block, p)
