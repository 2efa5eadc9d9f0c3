"""The Riesz maps of a problem: inner products of states, design variables and constraint residuals.

(u, v) = sum_i dt_i u_i'M v_i, (z, y) = sum_i dt_i (Ez)_i'Q(Ey)_i, (p, q) = p'P q, and for residuals, which
are functionals, the dual norm |F|^2 = sum_i F_i'(dt_i M)^-1 F_i: the L2 norm in space-time of what the
equation misses. In these norms iteration counts do not depend on the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import assign, copy, index_array
from pdeopt.core.options import set_default
from pdeopt.core.ranks import freed
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.sparse import block_diagonal

#: The inverse of a form, of rows or of flat controls.
Solve = Callable[[Tensor], Tensor]


class DesignForm:
    """E'diag(form) E for controls z_step = E z: a symmetric form of flat design controls, and its inverse.

    Args:
        problem: whose control map is E.
        form: of the control of one step.
    """

    def __init__(self, problem: ControlProblem, form: InnerProduct) -> None:
        self.problem, self.form = problem, form

    def multiply(self, z: Tensor) -> Tensor:
        """The form times z. Collective."""
        return self.problem.controls.adjoint(self.form.multiply(self.problem.controls(z)))

    def solve(self, g: Tensor) -> Tensor:
        """Its inverse times g. Collective."""
        if self.problem.control_map is None:
            return self.form.solve(g.reshape(self.problem.grid.n_local, self.problem.m)).reshape(-1)
        right, left = self._mapped.createVecs()
        assign(right, g)
        self._solver.solve(right, left)
        return copy(left)

    def diagonal(self) -> Tensor:
        """The diagonal of the form. Collective."""
        if self.problem.control_map is None:
            return self.form.diagonal().reshape(-1)
        return copy(self._mapped.getDiagonal())

    @cached_property
    def _mapped(self) -> PETSc.Mat:
        """With a control map, the form couples the steps."""
        grid, m, E = self.problem.grid, self.problem.m, self.problem.control_map.matrix  # type: ignore[union-attr]
        blocks = block_diagonal(self.form.spread())
        csr = (index_array(blocks.indptr), index_array(blocks.indices + grid.begin * m), blocks.data)
        weights = PETSc.Mat().createAIJ((E.getSizes()[0], E.getSizes()[0]), csr=csr, comm=grid.comm)
        return weights.ptap(E)

    @cached_property
    def _solver(self) -> PETSc.KSP:
        solver = PETSc.KSP().create(self.problem.grid.comm)
        solver.setOptionsPrefix("riesz_")
        solver.setOperators(self._mapped)
        solver.setType("cg")
        solver.getPC().setType("bjacobi")
        set_default("riesz_sub_pc_type", "lu")
        solver.setTolerances(rtol=1e-14, atol=0.0, max_it=200)
        solver.setFromOptions()
        return solver


class RieszMetric:
    """R x and R^-1 g for x = [u | z | p], and the norms made of them. Every verb is collective.

    Masses M, Q and P are `state_mass`, `control_mass` and `param_mass` of the constraint; the identity by default.
    (See R. Kirby, From functional analysis to iterative methods, SIAM Rev. 52, 2010, and for optimization M. Hinze,
    R. Pinnau, M. Ulbrich, S. Ulbrich, Optimization with PDE Constraints, Springer, 2009.)

    Args:
        problem: the control problem.

    Attributes:
        state_mass, control_mass, param_mass: M, Q and P.
        state, control: the forms dt_i M and dt_i Q of the steps of this rank.
        design: the form of flat design controls.
        parameters: the form P of the global parameters, as of a single step.

    Raises:
        InputError: masses of another size than n x n, m x m and param_dim x param_dim.

    Example:
        >>> metric = RieszMetric(problem)
        >>> metric.design_dual_norm(g)                     # what `opt_tol` is compared with
        >>> step = metric.design_inverse(g, g.duplicate())
    """

    def __init__(self, problem: ControlProblem) -> None:
        self.problem = problem
        self.state_mass, self.control_mass = problem.state_mass, problem.control_mass
        self.param_mass = problem.param_mass
        dt = problem.grid.steps.dt
        self.state, self.control = InnerProduct(dt, self.state_mass), InnerProduct(dt, self.control_mass)
        self.design = DesignForm(problem, self.control)
        self.parameters = InnerProduct(torch.ones(1, dtype=torch.float64), self.param_mass)
        self._feasibilities: WeakKeyDictionary[Linearization, float] = WeakKeyDictionary()

    def primal(self, x: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = R x: from x to the layout of gradients."""
        u, z, p = self.problem.fields(x)
        return self.problem.layout.pack(out, self.state.multiply(u), self.design.multiply(z), self.of_parameters(p))

    def primal_inverse(self, g: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = R^-1 g: the Riesz representative of a gradient."""
        u, z, p = self.problem.fields(g)
        return self.problem.layout.pack(out, self.state.solve(u), self.design.solve(z), self.parameters.solve(p[None]))

    def of_parameters(self, p: Tensor) -> Tensor:
        """P p, (param_dim,)."""
        return self.parameters.multiply(p[None])[0]

    def design_inverse(self, g: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = R^-1 g for a gradient in the design variables alone."""
        z, p = self.problem.layout.design_fields(g)
        return _pack_design(self.problem, out, self.design.solve(z), self.parameters.solve(p[None])[0])

    def design_lumped(self) -> PETSc.Vec:
        """A diagonal for the metric of the design variables, a new vector: its row sums, as of a mass, or its diagonal
        where that is larger, as of a stiffness matrix, whose rows sum up to nothing."""
        out = self.problem.create_design()
        out.set(1.0)
        z, p = self.problem.layout.design_fields(out)
        z = torch.maximum(self.design.multiply(z), self.design.diagonal())
        return _pack_design(self.problem, out, z, torch.maximum(self.of_parameters(p), self.parameters.diagonal()[0]))

    def root(self) -> PETSc.Vec:
        """D with D^2 = `design_lumped`: in y = D z, gradients are functions, not integrals."""
        out = self.design_lumped()
        out.sqrtabs()
        return out

    def residual_inverse(self, c: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out_i = (dt_i M)^-1 c_i: the function that a residual represents."""
        rows = copy(c).reshape(-1, self.problem.n)
        assign(out, self.state.solve(rows))
        return out

    def norm(self, x: PETSc.Vec) -> float:
        """sqrt(x.Rx)."""
        return _norm(self.primal, x)

    def dual_norm(self, g: PETSc.Vec) -> float:
        """sqrt(g.R^-1 g) of a gradient."""
        return dual_length(self, *self.problem.fields(g))

    def design_dual_norm(self, g: PETSc.Vec) -> float:
        """`dual_norm` of a gradient in the design variables alone."""
        return _norm(self.design_inverse, g)

    def residual_norm(self, c: PETSc.Vec) -> float:
        """|c| of a constraint residual."""
        return _of_squares(self, [(copy(c).reshape(-1, self.problem.n), self.state.solve)])

    def feasibility(self, lin: Linearization) -> float:
        """|F| at a linearization, found once."""
        if lin not in self._feasibilities:
            self._feasibilities[lin] = self.residual_norm(lin.residual)
        return self._feasibilities[lin]

    def state_norm(self, u: Tensor) -> float:
        """The L2 norm in space-time of rows of states, (n_local, n)."""
        return _root(float(self.problem.grid.sum((u * self.state.multiply(u)).sum())))

    def control_norm(self, z: Tensor) -> float:
        """The L2 norm in space-time of flat controls."""
        return _root(float(self.problem.grid.sum((z * self.design.multiply(z)).sum())))


def _pack_design(problem: ControlProblem, out: PETSc.Vec, z: Tensor, p: Tensor) -> PETSc.Vec:
    assign(out, z, p[: problem.layout.param_size])
    return out


def _norm(form: Callable[[PETSc.Vec, PETSc.Vec], PETSc.Vec], x: PETSc.Vec) -> float:
    """sqrt(x.(form x)), with form(x, out) -> out."""
    image = x.duplicate()
    with freed(image):  # it is large, and Python alone would only queue it
        return _root(x.dot(form(x, image)))


def dual_length(metric: RieszMetric, u: Tensor, z: Tensor, p: Tensor, c: Tensor | None = None) -> float:
    """sqrt(g.R^-1 g + |c|^2) of the fields of a gradient g, and of rows of a residual. Collective.

    Args:
        metric: R.
        u, z, p: rows (n_local, n), flat controls, and parameters on all ranks.
        c: (n_local, n).
    """
    of_p = float(p @ metric.parameters.solve(p[None])[0])
    pairs = [(u, metric.state.solve), (z, metric.design.solve), *([] if c is None else [(c, metric.state.solve)])]
    return _of_squares(metric, pairs, of_p)


def _of_squares(
    metric: RieszMetric, pairs: Iterable[tuple[Tensor, Callable[[Tensor], Tensor]]], more: float = 0.0
) -> float:
    """sqrt(sum g.(inverse g) + more), the sum over all ranks. Collective."""
    own = sum(float(g.reshape(-1) @ inverse(g).reshape(-1)) for g, inverse in pairs)
    return _root(float(metric.problem.grid.sum(own)) + more)


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0)) if square == square else math.nan
