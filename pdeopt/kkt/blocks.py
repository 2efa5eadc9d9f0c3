"""What preconditioners know of a KKT operator [W F'; F 0]: the blocks of its steps.

W is block diagonal here: for each step a form of the state and one of the control. With the Riesz metric they are W
itself. For a Lagrangian, W keeps the Hessian of the objective; the curvature of the constraint and what couples states
to controls are left to the Krylov method. A state that the objective does not see gets a small weight, alpha times the
metric, where alpha is the price of control.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pdeopt.control.controlmap import ControlMap
from pdeopt.control.metric import DesignForm
from pdeopt.control.stepjacobian import SparseStepJacobian
from pdeopt.core.arrays import copy
from pdeopt.core.errors import InputError, SolveFailure, agree
from pdeopt.kkt.operator import KKTOperator
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.linear_mgrit import TimeSystem
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import at_columns
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.vectorlayout import Fields, VectorLayout
from pdeopt.steps.windows import Windows, sum_windows


@dataclass
class KKTBlocks:
    """The blocks of the steps of a rank, and the products with W, F and S = F W^-1 F' that are made of them.

    With T the state Jacobian over all steps (A on the diagonal, B below it), F = [T, C E, F_p]. The products take and
    return `Fields`: u (n_local, n), the flat controls of the rank, and p (param_dim,) on all ranks; rows of F and
    multipliers are (n_local, n). All products are collective. Blocks are a value: `cut` and `coarsen` give new ones.

    Attributes:
        grid: who owns which steps.
        A, B, C: dF/du_new (n, n), dF/du_old (n, n) and dF/dz (n, m), one a step of the rank or one for all.
        state, control: the forms W of a step, (n, n) and (m, m).
        conservative: steps conserve energy, see `TimeDependentConstraint`.
        design: the form of the flat controls where there is a control map E; None for one control a step.
        F_p: derivatives by the global parameters, (param_dim, n_local, n); None without.
        W_pp: their Hessian, (param_dim, param_dim).
        window: what couples windows of so many steps is left out; None leaves out nothing.
        is_exact: W misses nothing but the curvature of the constraint; no state was given a weight.
        whole: C and the form of the control before design variables were fixed; None where none is fixed.

    Example:
        A step of Richardson's iteration for S lam = r, preconditioned by A W^-1 A':

            blocks, steps = KKTBlocks.of(operator), step_solver(blocks.A)
            r = r - blocks.schur(lam)
            lam = lam + steps.solve(blocks.state.multiply(steps.solve(r)), transpose=True)
    """

    grid: TimeGrid
    A: StepMatrix
    B: StepMatrix
    C: StepMatrix
    state: InnerProduct
    control: InnerProduct
    conservative: bool = False
    design: DesignForm | None = None
    F_p: Tensor | None = None
    W_pp: Tensor | None = None
    window: int | None = None
    is_exact: bool = True
    whole: tuple[StepMatrix, InnerProduct] | None = None

    @classmethod
    def of(cls, operator: KKTOperator) -> KKTBlocks:
        """The blocks of an operator at its present point. Collective.

        Args:
            operator: whose `set_point` was called.

        Raises:
            InputError: the constraint has no sparsity pattern, or controls are fixed that have a control map.
            SolveFailure: the objective does not see a control, so that Wzz is singular; on all ranks.
        """
        problem, lin, metric = operator.problem, operator.lin, operator.metric
        jacobian = lin.jacobian
        if not isinstance(jacobian, SparseStepJacobian):
            raise InputError(
                "a preconditioner of the KKT system",
                f"{type(problem.constraint).__name__} without a sparsity pattern",
                "declare constraint.pattern = StepPattern(A, B, C, W)",
            )
        state, control = metric.state, metric.control
        W_pp = metric.parameters.multiply(torch.eye(problem.param_dim, dtype=torch.float64))
        is_exact = operator.hessian != "design"
        if not operator.is_metric:
            state, control = lin.objective_blocks
            seen = _seen(problem.grid, state, metric.state, _control_price(operator, control))
            state, is_exact = seen.agreed(problem.grid), seen is state
            control = control.agreed(problem.grid)
            W_pp = parameter_hessian(operator)
        A, B, C = (jacobian.blocks[name] for name in "ABC")
        F_p = _parameter_columns(operator) if problem.param_dim else None
        whole = None if operator.fixed is None else (C, control)
        if whole is not None:
            C, control = _freed(operator, C, control)
            F_p, W_pp = _freed_parameters(operator, F_p, W_pp)
        return cls(
            *(problem.grid, A, B, C, state, control, problem.constraint.conservative),
            design=None if problem.control_map is None else DesignForm(problem, control),
            F_p=F_p,
            W_pp=W_pp,
            is_exact=is_exact,
            whole=whole,
        )

    @property
    def n(self) -> int:
        """Unknowns of a state."""
        return self.A.shape[0]

    @property
    def control_map(self) -> ControlMap | None:
        """z_step = E z, where there is one."""
        return None if self.design is None else self.design.problem.control_map

    @cached_property
    def layout(self) -> VectorLayout:
        """Of the vectors [u | z | p | lam]."""
        controls = self.grid.n_local * self.C.shape[1] if self.design is None else self.design.problem.controls.size
        return VectorLayout(self.grid, self.n, controls, 0 if self.F_p is None else len(self.F_p))

    def cut(self, window: int) -> KKTBlocks:
        """The blocks without what couples windows of so many steps, counted from step 1; W and C stay."""
        return replace(self, window=window)

    def cut_coupling(self) -> StepMatrix:
        """B of the steps of this rank, zero where a window starts."""
        return StepMatrix(self.B.sparsity, self._kept * self.B.values)

    @cached_property
    def _kept(self) -> Tensor:
        """1 where a step is coupled to the one before, (n_local, 1)."""
        step = torch.arange(self.grid.begin, self.grid.end)[:, None]
        return (step % (self.window or self.grid.num_steps) != 0).double()

    def coarsen(self, factor: int, with_control: bool = True) -> KKTBlocks | None:
        """The blocks of the grid of every `factor`-th node: sums over windows of steps. Collective.

        A sum is the Galerkin product for states, controls and multipliers that are constant in a window; for
        implicit Euler it is the rediscretized step. What a cut leaves out stays left out; the sum is cut, too, where
        `factor` divides the windows, and else has a weaker coupling there.

        Args:
            factor: steps that become one.
            with_control: off makes C zero.

        Returns:
            The blocks; None on a rank that owns no step of the coarser grid.

        Raises:
            InputError: there are a control map or global parameters.
        """
        if self.design is not None or self.F_p is not None:
            raise InputError("coarser KKT systems", "a control map or global parameters", "one control a step")
        windows = Windows(self.grid, factor)
        fine = self.B if self.window is None else self.cut_coupling()
        A, B = TimeSystem(self.grid, self.A, fine, factor).coarse_matrices()
        window = self.window // factor if self.window is not None and self.window % factor == 0 else None
        C, (state, control) = sum_windows(windows, self.C), (form.sum(windows) for form in (self.state, self.control))
        whole = self.whole and (sum_windows(windows, self.whole[0]), self.whole[1].sum(windows))
        coarse = self.grid.coarsen(factor)
        if coarse is None:
            return None
        if not with_control:
            C = StepMatrix(C.sparsity, torch.zeros_like(C.values))
        return KKTBlocks(coarse, A, B, C, state, control, self.conservative, window=window, whole=whole)

    def jacobian(self, x: Fields) -> Tensor:
        """F (u, z, p), rows (n_local, n). Collective."""
        u, z, p = x
        z_step = z if self.control_map is None else self.control_map(z)
        rows = self.A(u) + self.B(self._before(u)) + self.C(z_step.reshape(len(u), -1))
        return rows if self.F_p is None else rows + torch.einsum("p,pin->in", p, self.F_p)

    def adjoint(self, lam: Tensor) -> Fields:
        """F'lam. Collective."""
        z = self.C.transpose(lam).reshape(-1)
        z = z if self.control_map is None else self.control_map.adjoint(z)
        p = lam.new_empty(0) if self.F_p is None else self.grid.sum(torch.einsum("pin,in->p", self.F_p, lam))
        following = self.B.transpose(lam)
        if self.window is not None:
            following = self._kept * following
        return self.A.transpose(lam) + self.grid.shift_adjoint(following)[0], z, p

    def _before(self, u: Tensor) -> Tensor:
        before = self.grid.shift(u)
        return before if self.window is None else self._kept * before

    def multiply(self, x: Fields) -> Fields:
        """W (u, z, p). Collective."""
        u, z, p = x
        if self.design is None:
            z = self.control.multiply(z.reshape(len(u), -1)).reshape(-1)
        else:
            z = self.design.multiply(z)
        return self.state.multiply(u), z, p if self.W_pp is None else self.W_pp @ p

    def inverse(self, g: Fields) -> Fields:
        """W^-1 (u, z, p). Collective."""
        u, z, p = g
        if self.design is None:
            z = self.control.solve(z.reshape(len(u), -1)).reshape(-1)
        else:
            z = self.design.solve(z)
        return self.state.solve(u), z, p if self.W_pp is None else torch.linalg.solve(self.W_pp, p)

    def schur(self, lam: Tensor) -> Tensor:
        """S lam = F W^-1 F'lam. Collective."""
        return self.jacobian(self.inverse(self.adjoint(lam)))


def sees_all_states(operator: KKTOperator) -> bool:
    """Whether W has no zero row in any state of any step, see `KKTBlocks`. Collective."""
    problem, lin = operator.problem, operator.lin
    if operator.is_metric:
        return operator.hessian != "design"
    state, _ = lin.objective_blocks
    return not float(problem.grid.max(state.zero_rows().any().double()))


def _seen(grid: TimeGrid, state: InnerProduct, metric: InnerProduct, price: float) -> InnerProduct:
    """The form of the state, with `price` times the metric for unknowns that it does not see. Collective."""
    unseen = grid.over_steps(state.zero_rows().expand(grid.n_local, -1).double().sum(0))  # in how many steps
    if grid.all(not bool(unseen.any())):
        return state
    everywhere = unseen == grid.num_steps
    if not grid.all(not bool(unseen[~everywhere].any())):  # not at the same places in all steps: a weight for all
        return state + metric.scaled(torch.full_like(metric.weight, price))
    pattern, keep = metric.matrix.sparsity, everywhere.double()
    kept = keep[pattern.rows] * at_columns(pattern, keep[None]) * metric.matrix.values
    return state + InnerProduct(price * metric.weight, StepMatrix(pattern, kept))


def _control_price(operator: KKTOperator, control: InnerProduct) -> float:
    """The least alpha with control = alpha times metric, by row sums; 1 where there are no controls. Collective."""
    sums, failure = control.row_sums(), None
    if not bool((sums > 0).all()):
        failure = SolveFailure(
            "a control has no price, so Wzz is singular", "add ControlCost to the objective, or use a direct solver"
        )
    agree(operator.problem.grid.mpi, failure)
    prices = (sums / operator.metric.control.row_sums()).flatten()
    own = prices.amin() if len(prices) else prices.new_tensor(math.inf)  # a rank may have no controls of a step
    least = -float(operator.problem.grid.max(-own))
    return least if math.isfinite(least) else 1.0


def _freed(operator: KKTOperator, C: StepMatrix, control: InnerProduct) -> tuple[StepMatrix, InnerProduct]:
    """C and the form of the control without the fixed controls, one a step. Collective."""
    assert operator.fixed is not None
    problem = operator.problem
    fixed = operator.fixed[: problem.control_size]
    if problem.control_map is not None:
        if float(problem.grid.max(fixed.any().double())) == 0:
            return C, control
        raise InputError(
            "a preconditioner of the KKT system",
            "controls with a control map that are fixed at bounds",
            "-sqp_kkt_precond direct, or one control a step",
        )
    pattern, fixed = control.matrix.sparsity, fixed.reshape(len(control.weight), -1).double()
    free, diagonal = 1.0 - fixed, torch.from_numpy(pattern.rows == pattern.cols)
    values = free[:, pattern.rows] * at_columns(pattern, free) * control.matrix.values
    values += diagonal * fixed[:, pattern.rows] * operator.pin / control.weight[:, None]
    C = StepMatrix(C.sparsity, at_columns(C.sparsity, free) * C.values)
    return C, InnerProduct(control.weight, StepMatrix(pattern, values))


def _freed_parameters(operator: KKTOperator, F_p: Tensor | None, W_pp: Tensor) -> tuple[Tensor | None, Tensor]:
    """F_p and W_pp without the fixed parameters. Collective."""
    assert operator.fixed is not None
    if F_p is None:
        return F_p, W_pp
    own = operator.fixed[operator.problem.control_size :].double()
    fixed = operator.problem.grid.from_first(own if len(own) else torch.zeros(len(W_pp), dtype=torch.float64))
    free = 1.0 - fixed
    return free[:, None, None] * F_p, free[:, None] * W_pp * free + torch.diag(operator.pin * fixed)


def parameter_hessian(operator: KKTOperator) -> Tensor:
    """W_pp, made positive where the objective does not see p. Collective."""
    lin, problem = operator.lin, operator.problem
    if problem.param_dim == 0:
        return torch.empty(0, 0, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(problem.grid.sum(operator.parameters.own(lin)))
    least = 1e-8 * max(float(values.abs().amax()), 1e-8)
    positive: Tensor = vectors @ torch.diag(values.abs().clamp(min=least)) @ vectors.T
    return positive


def _parameter_columns(operator: KKTOperator) -> Tensor:
    """F_p with the path through u_0 = G(p), (param_dim, n_local, n). Collective."""
    problem, x, out = operator.problem, operator.problem.create_primal(), operator.problem.create_multiplier()
    u, z, _ = problem.fields(x)
    columns = []
    for dp in torch.eye(problem.param_dim, dtype=torch.float64):
        operator.lin.jvp(problem.layout.pack(x, u, z, dp), out)
        columns.append(copy(out).reshape(-1, problem.n))
    return torch.stack(columns)
