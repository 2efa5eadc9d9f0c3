"""The KKT operator [W J'; J 0] over [u | z | p | lam]: matrix-free, and assembled from the same problem.

With W = R, the Riesz metric, it is the augmented system of composite-step methods: positive definite in
the first block whatever the objective, also for a loss on the last state alone. With W = diag(0, R_d), R in the design
variables alone, it is that of the metric which counts the design only: one sweep back and one forward in time solve it.

Controls and parameters may be fixed, as those at an active bound are: their rows and columns become those of a small
multiple of the identity, so small that sums over windows of steps, as of coarser grids, are those of the free controls.
"""

from __future__ import annotations

from copy import copy as copy_of
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.control.objective import Objective
from pdeopt.control.stepjacobian import SparseStepJacobian
from pdeopt.core.arrays import copy, index_array, readonly, writable
from pdeopt.core.errors import InputError
from pdeopt.core.ranks import freed
from pdeopt.kkt.assembly import KKTAssembly, require_pattern
from pdeopt.kkt.layout import KKTLayout, spaces
from pdeopt.kkt.parameters import Parameters, ParameterValues
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import ParameterPattern, Sparsity
from pdeopt.steps.vectorlayout import Fields

Hessian = Literal["metric", "design", "full", "gauss-newton"]

#: The diagonal entry of a fixed design variable, relative to the mean lumped form of a control.
FIXED_DIAGONAL = 1e-3


class KKTOperator:
    """K = [W F'; F 0] over [u | z | p | lam], at a linearization: matrix-free and assembled.

    Args:
        metric: the Riesz metric of the problem.
        hessian: which W: "metric" R, "design" R without states, "full" L'' or "gauss-newton" J'' alone.

    Attributes:
        layout: global numbers of the unknowns.
        lin, lam, fixed: the present point, see `set_point`.
        pin: the diagonal entry of fixed design variables.

    Raises:
        InputError: another word for `hessian`.

    Example:
        >>> operator = KKTOperator(RieszMetric(problem), "full")
        >>> operator.set_point(problem.at(x), lam)
        >>> matrix = operator.shell()                         # the caller destroys it
    """

    def __init__(self, metric: RieszMetric, hessian: Hessian = "full") -> None:
        if hessian not in get_args(Hessian):
            raise InputError("hessian", repr(hessian), " | ".join(get_args(Hessian)))
        self.metric, self.problem, self.hessian = metric, metric.problem, hessian
        self.layout = KKTLayout(self.problem)
        self._masses = (metric.state_mass, metric.control_mass)
        self._assembly: KKTAssembly | None = None
        self._assembled: PETSc.Mat | None = None

    @property
    def is_metric(self) -> bool:
        """Whether W is a metric, not a Hessian."""
        return self.hessian in ("metric", "design")

    def set_point(self, lin: Linearization, lam: PETSc.Vec | None = None, fixed: Tensor | None = None) -> None:
        """Move to a linearization. Collective.

        Args:
            lin: gives F, its derivatives and those of J.
            lam: the multiplier of the full Hessian; the other Hessians do without.
            fixed: which of the design variables [z | p] of this rank do not move, booleans, (design_size,); None on all
                ranks or on none.
        """
        self.lin, self.lam, self.fixed = lin, lam if self.hessian == "full" else None, fixed
        self._multiplier = None if self.lam is None else self.problem.layout.rows(self.lam)
        if fixed is not None:
            self.pin = FIXED_DIAGONAL * self._mean_design_form()

    def _mean_design_form(self) -> float:
        """1'Wzz 1 / 1'1 without the constraint's curvature, or that of the metric where controls have no price.

        Of the parameters where there are no controls."""
        layout, ones, image = self.problem.layout, self.problem.create_primal(), self.problem.create_primal()
        u, z, p = self.problem.fields(ones)
        has_controls = float(self.problem.grid.max(torch.tensor(float(layout.control_size)))) > 0
        z, p = torch.full_like(z, float(has_controls)), torch.full_like(p, float(not has_controls))
        with freed(ones, image):
            layout.pack(ones, u, z, p)
            size = 0.0 if self.is_metric else ones.dot(self.lin.hvp(None, ones, image))
            if not size > 0:
                size = self.problem.split(ones)[1].dot(self.metric.design_lumped())
            return float(size / ones.dot(ones))

    def mult(self, matrix: PETSc.Mat | None, k: PETSc.Vec, out: PETSc.Vec) -> None:
        """out = K k; the verb of a PETSc shell matrix."""
        layout, lin = self.problem.layout, self.lin
        held = self._take_fixed(k)
        (u, z, p), lam = layout.kkt_fields(k if held is None else held)
        c = lin.jacobian.jvp(lin.old_direction(u, p), u, lin.controls(z), p)
        Wx, JT_lam = self.hessian_fields(u, z, p), lin.vjp_fields(lam)
        w_u, w_z, w_p = (one + other for one, other in zip(Wx, JT_lam))
        layout.pack(out, w_u, w_z, w_p, c)
        if held is not None:
            self._pin(k, out)
            held.destroy()

    multTranspose = mult  # K is symmetric

    def _take_fixed(self, k: PETSc.Vec) -> PETSc.Vec | None:
        """A new vector with zeros in the fixed design variables; None where none is fixed. Collective."""
        if self.fixed is None:
            return None
        taken = k.copy()
        with writable(taken) as entries:
            entries[self._place_of_fixed] = 0.0
        return taken

    def _pin(self, k: PETSc.Vec, out: PETSc.Vec) -> None:
        """Write the pin times the fixed design variables of k into those of `out`."""
        with readonly(k) as given, writable(out) as entries:
            entries[self._place_of_fixed] = self.pin * given[self._place_of_fixed]

    @property
    def _place_of_fixed(self) -> Tensor:
        assert self.fixed is not None
        return torch.nonzero(self.fixed)[:, 0] + self.problem.layout.state_size

    def apply_hessian(self, x: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = W x, whatever is fixed."""
        return self.problem.layout.pack(out, *self.hessian_fields(*self.problem.fields(x)))

    def hessian_fields(self, u: Tensor, z: Tensor, p: Tensor) -> Fields:
        """W times rows u (n_local, n), flat controls z and p, whatever is fixed."""
        if not self.is_metric:
            return self.lin.hvp_fields(self._multiplier, u, z, p)
        states = self.metric.state.multiply(u) if self.hessian == "metric" else torch.zeros_like(u)
        return states, self.metric.design.multiply(z), self.metric.of_parameters(p)

    def shell(self) -> PETSc.Mat:
        """A new shell matrix; the caller destroys it. (It is not kept here: see the traps in docs.)"""
        size = (self.layout.local_size, self.layout.global_size)
        matrix = PETSc.Mat().createPython((size, size), context=self, comm=self.problem.grid.comm)
        matrix.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        matrix.setUp()
        return matrix

    def assemble(self) -> PETSc.Mat:
        """The matrix as AIJ at the present point, refilled at each call. Collective.

        `operator_of(matrix)` is this operator at that point, so that preconditioners of blocks can be used with it.

        Raises:
            InputError: the constraint has no sparsity pattern.
        """
        if self._assembly is None:
            self._assembly = KKTAssembly(self.problem, self._sparsity(self.lin.objective), self._parameter_pattern())
        lam = None if self.lam is None else copy(self.lam).reshape(-1, self.problem.n)
        values = self._metric_values() if self.is_metric else self._hessian_values(lam)
        self._assembled = self._assembly.matrix(self.lin, values, self._parameter_values(lam), self._assembled)
        if self.fixed is not None:
            start = self._assembled.getOwnershipRange()[0] + self.problem.layout.state_size
            self._assembled.zeroRowsColumns(index_array(start + torch.nonzero(self.fixed)[:, 0]), diag=self.pin)
        own = copy_of(self)  # which does not hold the assembled matrix, that holds it
        own._assembled = None
        self._assembled.setAttr("kkt", own)
        return self._assembled

    def free(self) -> None:
        """Free the assembled matrix. (`destroy` would be the verb of the shell matrix.)"""
        if self._assembled is not None:
            self._assembled.destroy()
            self._assembled = None

    def _sparsity(self, objective: Objective) -> Sparsity:
        """The pattern of a step's W over [u_old | u_new | z], with an objective."""
        problem, n, m = self.problem, self.problem.n, self.problem.m
        if self.is_metric:
            return self._placed(*(mass.sparsity.csr for mass in self._masses))
        if problem.grid.space_ranks > 1:
            state, control = self._spread_forms(self.lin)
            total = self._placed(state.sparsity.csr, control.sparsity.csr + sp.eye(*control.sparsity.shape))
            return total | require_pattern(problem).W if self.hessian == "full" else total
        p = torch.randn(problem.param_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self._objective = objective.hessian_sparsity(n, m, problem.grid.samples().with_parameters(p))
        own = sp.diags(np.repeat([0.0, 1.0], [n, m]))  # of fixed controls
        total = Sparsity(sp.block_diag([sp.csr_matrix((n, n)), self._objective.csr + own]))
        return total | require_pattern(problem).W if self.hessian == "full" else total

    def _placed(self, state: sp.csr_matrix, control: sp.csr_matrix) -> Sparsity:
        """Forms of owned rows among [u_old | u_new | z], ghosts included, their entries in the same order."""
        (_, n), (_, m) = spaces(self.problem)
        nothing = sp.csr_matrix((n, n))
        square = (
            sp.csr_matrix(
                (form.data, form.indices, np.r_[form.indptr, np.full(size - form.shape[0], form.nnz)]), (size, size)
            )
            for form, size in ((sp.csr_matrix(state), n), (sp.csr_matrix(control), m))
        )
        return Sparsity(sp.block_diag([nothing, *square]))

    def _spread_forms(self, lin: Linearization) -> tuple[StepMatrix, StepMatrix]:
        """The Hessian of an objective where ranks share a step: colored products would send messages."""
        objective, k = lin.objective, self.problem.grid.space_ranks
        if not (objective.is_quadratic or objective.has_blocks):
            got = f"{type(objective).__name__}, not quadratic, with {k} ranks a step"
            raise InputError("an assembled KKT matrix", got, "-kkt_precond reduced | wathen, or space_ranks 1")
        state, control = lin.objective_blocks
        return state.spread(), control.spread()

    def _metric_values(self) -> Tensor:
        state, control = (mass.values[0] for mass in self._masses)
        if self.hessian == "design":
            state = torch.zeros_like(state)
        return self.lin.steps.dt[:, None] * torch.cat([state, control])

    @cached_property
    def parameters(self) -> Parameters:
        """What p has in the matrix."""
        return Parameters(self.problem)

    def _parameter_pattern(self) -> ParameterPattern:
        """The pattern of F_p and of the columns of p in a step's W."""
        F, W, W_pp = self.parameters.pattern
        if not self.is_metric:
            return ParameterPattern(F, W, W_pp)
        return ParameterPattern(F, Sparsity.empty(*W.shape), self.metric.param_mass.sparsity)

    def _parameter_values(self, lam: Tensor | None) -> ParameterValues:
        if not self.is_metric:
            return self.parameters.values(self.lin, lam)
        F, first = self.parameters.jacobian(self.lin), float(self.problem.grid.is_root)  # R in p is counted once
        return ParameterValues(F, F[:, :0], first * self.metric.param_mass.values[0])

    def _hessian_values(self, lam: Tensor | None) -> Tensor:
        """Entries of each step's W by colored Hessian products, (n_local, nnz)."""
        assert self._assembly is not None
        pattern, are_all = self._assembly.W, True
        values = torch.zeros(len(self.lin.steps), pattern.nnz, dtype=torch.float64)
        if self.problem.grid.space_ranks > 1:
            forms = self._spread_forms(self.lin)
            placed = self._placed(*(form.sparsity.csr for form in forms))
            values[:, pattern.places(placed)] = torch.cat([form.values for form in forms], dim=1)
        else:
            are_all = self._fill_objective(values)
        if lam is not None:
            jacobian = self.lin.jacobian
            assert isinstance(jacobian, SparseStepJacobian)  # the constraint has a pattern
            constraint = jacobian.curvature(lam).W
            if constraint is not None:
                values[:, pattern.places(constraint.sparsity)] += constraint.values
            are_all = are_all and constraint is not None
        if not are_all:
            raise InputError(
                "the sparsity of second derivatives",
                "a pattern that misses nonzero entries",
                "StepPattern(A, B, C, W) with all entries of W, or another Objective.hessian_sparsity",
            )
        return values

    def _fill_objective(self, values: Tensor) -> bool:
        """Write the entries of the objective's Hessian, and return whether they are all."""
        assert self._assembly is not None
        lin, pattern, own, n = self.lin, self._assembly.W, self._objective, self.problem.n

        def rows(direction: Tensor) -> Tensor:
            du, dz = (d.expand(len(lin.steps), -1) for d in direction.split([n, self.problem.m]))
            h_u, h_z, _ = lin.objective.hvp(lin.u, lin.z_step, lin.steps, du, dz, torch.zeros_like(lin.p))
            return torch.cat([h_u, h_z], dim=1)

        objective, are_all = own.fill(rows, at_once=False)
        placed = Sparsity(sp.block_diag([sp.csr_matrix((n, n)), own.csr]))
        values[:, pattern.places(placed)] = objective
        return are_all
