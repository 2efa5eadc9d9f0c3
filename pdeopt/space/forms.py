"""`FormConstraint`: a weak form in UFL of one time step as a constraint, with all derivatives by UFL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.core.arrays import Array
from pdeopt.core.autodiff import constant, is_plain
from pdeopt.core.errors import InputError
from pdeopt.space import border
from pdeopt.space.derivatives import FormDerivatives
from pdeopt.space.fenicsx import packages
from pdeopt.space.formjacobian import FormJacobian
from pdeopt.space.layouts.layout import Layout, extended
from pdeopt.space.stepforms import evaluate
from pdeopt.space.steppoint import StepPoint
from pdeopt.steps.sparse import StepMatrix, StepPattern
from pdeopt.steps.sparsity import ParameterPattern
from pdeopt.steps.timegrid import Steps

#: Linear steps whose matrices are kept, by lengths and times.
KEPT_MATRICES = 8


class FormConstraint(TimeDependentConstraint):
    """F(u_old, u_new, z; p) = 0 of one time step as a weak form in UFL, on a mesh of DOLFINx.

    UFL differentiates the form, to second order; DOLFINx compiles and assembles it: once for all steps of a length
    where the equation is linear, else once a step. Every rank of the time grid has the whole mesh, made with
    `MPI.COMM_SELF`, and its steps; or ranks share the mesh, made with `grid.space_comm`, and have their unknowns of
    the steps. Rows of states, (batch, n), have the coefficients of u_new that no Dirichlet condition fixes; those of
    controls, (batch, m), the coefficients of z that F depends on: all of them for a source, those on a part of the
    boundary where z stands in an integral over it.

    Args:
        F: residual of a step, a `ufl.Form` linear in one test function of the space of u_new.
        u_new, u_old: `Function`s of one space: the states at the end and the beginning of the step. Parts of mixed
            functions are taken by `ufl.split`.
        z: `Function` of the control, of any space on the mesh; None without one.
        dt: `Constant` in F for the length of a step. Without time both u_old and dt are None, and the grid is a
            `SingleNode`; `initial` is where the solve for the state begins.
        t: `Constant` in F for its end; the beginning is t - dt. None where F does not depend on time.
        bcs: Dirichlet conditions on the space of u_new, by `dolfinx.fem.dirichletbc`.
        p: `Function`s that are global parameters, as a field of coefficients; in `steps.p` one after the other.
        initial: u_0: a number, a function of x, (3, points) -> (points,), as DOLFINx interpolates it, a `Function`,
            whose values are taken now, or one of `p`: then the initial state is sought.
        at_time: t -> None, sets the values of `Function`s and `Constant`s that depend on time but are none of the
            above, those of `bcs` among them. Forms see them at t_new; conditions count at both ends of a step.
        state_mass, control_mass, param_mass: the inner products, each a quadratic functional (1/2 |u|^2 of u_new, z or
            p as a form of UFL), whose second derivative it is, or a matrix; default the L2 products of the functions.
        conservative: see `TimeDependentConstraint`.

    Attributes:
        state_dofs, control_dofs: numbers of the coefficients of u_new and z that are unknowns, (n,) and (m,); of those
            that this rank has, the ones that it owns.
        layout, controls: of the unknowns of states and controls.

    Raises:
        InputError: no DOLFINx; arguments that are no functions or constants, or that F does not depend on; a form that
            is not linear in one test function; conditions on another space, or not the same on all ranks; parameters
            or integrals over interior facets on a mesh of several ranks.

    Example:
        >>> F = (u - u_old) * v * dx + dt * (inner(grad(u), grad(v)) - z * v) * dx
        >>> heat = FormConstraint(F, u, u_old, z, dt, bcs=[dirichletbc(0.0, dofs, V)])
    """

    layout: Layout
    controls: Layout

    def __init__(
        self,
        F: Any,
        u_new: Any,
        u_old: Any,
        z: Any,
        dt: Any,
        t: Any = None,
        bcs: Sequence[Any] = (),
        *,
        p: Sequence[Any] = (),
        initial: Any = 0.0,
        at_time: Callable[[float], Any] | None = None,
        state_mass: Any = None,
        control_mass: Any = None,
        param_mass: Any = None,
        conservative: bool = False,
    ) -> None:
        p = list(p) if isinstance(p, (list, tuple)) else [p]
        border.require_arguments(F, u_new, u_old, z, dt, t, p)
        fem, space = packages().fem, u_new.function_space
        before = fem.Function(space) if u_old is None else u_old
        length = fem.Constant(space.mesh, 1.0) if dt is None else dt
        self._point = StepPoint(before, u_new, z, fem.Function(space), p, length, t, bcs, at_time)
        self._forms = FormDerivatives(F, self._point)
        border.require_dependence(self._forms, z, dt, initial)
        self.layout, self.controls = self._point.new.layout, self._point.controls
        self.state_dim, self.control_dim = self.layout.n_owned, self.controls.n_owned
        self.param_dim, field = self._forms.dims[2], self._point.z
        self.state_dofs = self._point.new.owned
        self.control_dofs = np.array([], dtype=int) if field is None else field.owned
        self.conservative = conservative
        self._initial = _initial(self, initial)
        self._matrices: dict[tuple[bytes, ...], dict[str, StepMatrix]] = {}
        self.state_mass = border.inner_product(self._point, [u_new], state_mass)
        self.control_mass = border.inner_product(self._point, [] if z is None else [z], control_mass)
        self.param_mass = border.inner_product(self._point, p, param_mass)

    # -- what a constraint is ---------------------------------------------------------------------------------

    def initial_state(self, p: Tensor) -> Tensor:
        return p[self._initial] if self._initial.dtype == torch.int64 else self._initial

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        forms = self._forms
        if forms.is_affine and not self.param_dim:
            matrices, load = constant(lambda u: (self._linear(steps), forms.residual.at_times(steps)), u_new)
            known = matrices["B"](u_old) + matrices["A"](u_new) + load
            total: Tensor = known + matrices["C"](z) if self.control_dim else known
            return total
        if all(is_plain(x) for x in (u_old, u_new, z, steps.p)):
            return self._assembled(u_old, u_new, z, steps)
        return _Residual.apply(u_old, u_new, z, steps.p, self, steps)  # type: ignore[no-any-return, no-untyped-call]

    def _assembled(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        point = extended(self.layout, self.controls, u_old, u_new, z)
        return evaluate([self._forms.residual], point, steps)[0].expand(len(steps), -1)

    def linearize(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> FormJacobian:
        point = extended(self.layout, self.controls, u_old, u_new, z)
        jacobian = FormJacobian(self, point, steps, self.pattern, {})
        jacobian.derivatives = self._forms
        if self._forms.is_affine:
            jacobian.blocks = self._linear(steps)
            return jacobian
        forms = [*self._forms.jacobian, self._forms.residual]
        *blocks, residual = evaluate(forms, point, steps)
        jacobian.blocks = self._named(blocks)
        jacobian.residual = residual
        return jacobian

    def _linear(self, steps: Steps) -> dict[str, StepMatrix]:
        """A, B and C of a linear step, kept with their factors and products for the same lengths and times."""
        entries = [form.at_times(steps) for form in self._forms.jacobian]
        name = tuple(form.name(steps) for form in self._forms.jacobian)
        if name not in self._matrices:
            if len(self._matrices) >= KEPT_MATRICES:
                self._matrices.pop(next(iter(self._matrices)))
            self._matrices[name] = self._named(entries)
        return self._matrices[name]

    def _named(self, entries: Sequence[Tensor]) -> dict[str, StepMatrix]:
        found = {name: StepMatrix(getattr(self.pattern, name), part) for name, part in zip("ABC", entries)}
        if "C" not in found:
            found["C"] = StepMatrix(self.pattern.C, torch.zeros(1, 0, dtype=torch.float64))
        return found

    @cached_property
    def pattern(self) -> StepPattern:
        return self._forms.pattern()

    @cached_property
    def parameter_pattern(self) -> ParameterPattern | None:
        return self._forms.parameter_pattern() if self.param_dim else None

    # -- what a user reads ------------------------------------------------------------------------------------

    def values(self, rows: Any, of: str = "state", t: Any = None) -> Array:
        """All coefficients of the functions that rows of unknowns stand for, those that conditions fix among them.

        Args:
            rows: (batch, n) of states or (batch, m) of controls, a tensor or an array.
            of: state | control.
            t: times of the rows, (batch,), where conditions depend on time.

        Returns:
            (batch, coefficients), as `Function.x.array` has them. Collective where ranks share the mesh.
        """
        rows = np.atleast_2d(np.asarray(rows))
        if of not in ("state", "control"):
            raise InputError("of", of, "state | control")
        field = self._point.new if of == "state" else self._point.z
        if field is None or rows.shape[1] != field.layout.n_owned:
            legal = f"(batch, {0 if field is None else field.layout.n_owned})"
            raise InputError(f"rows of a {of}", f"shape {rows.shape}", legal)
        out = np.zeros((len(rows), field.size))
        for k in range(len(rows)) if of == "state" else ():
            out[k] = self._point.boundary(0.0 if t is None else float(t[k]))
        out[:, field.dofs] = field.layout.extend(torch.from_numpy(rows)).numpy()[:, : len(field)]
        return out

    def hessian(self, functional: Any, of: Any) -> sp.csr_matrix | StepMatrix:
        """The second derivative of a quadratic functional over the unknowns of one function: a mass, say.

        A sparse matrix; where ranks share the mesh a `StepMatrix` of the owned rows.

        Args:
            functional: form without arguments, as 1/2 u^2 dx.
            of: u_new, z, or a function of p.
        """
        return border.hessian(self._point, functional, [of])

    def coefficients(self, values: Any, of: Any) -> Array:
        """The owned unknowns of a function of x, a number or a `Function`, interpolated: a target, say.

        Args:
            values: x (3, points) -> (points,), or a number, or a `Function` of the space.
            of: u_new, z, or a function of p.
        """
        return border.interpolated(values, of.function_space)[border.field_of(self._point, of).owned]


def _initial(constraint: FormConstraint, initial: Any) -> Tensor:
    """u_0, (n,), or the places of its values in p."""
    at = constraint._point
    start = 0
    for field in at.p:
        if field.function is initial:
            return torch.from_numpy(start + at.new.owned)
        start += len(field)
    return torch.from_numpy(border.interpolated(initial, at.new.function.function_space)[at.new.owned])


class _Residual(torch.autograd.Function):
    """F for PyTorch's differentiation: its derivatives are products with the assembled Jacobian."""

    generate_vmap_rule = False

    @staticmethod
    def forward(u_old: Tensor, u_new: Tensor, z: Tensor, p: Tensor, constraint: FormConstraint, steps: Steps) -> Tensor:
        at = steps.with_parameters(p.detach())
        return constraint._assembled(u_old.detach(), u_new.detach(), z.detach(), at)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u_old, u_new, z, p, constraint, steps = inputs
        ctx.save_for_backward(u_old, u_new, z, p)
        ctx.save_for_forward(u_old, u_new, z, p)
        ctx.constraint, ctx.steps = constraint, steps

    @staticmethod
    def _jacobian(ctx: Any) -> FormJacobian:
        u_old, u_new, z, p = (x.detach() for x in ctx.saved_tensors)

        def linearize(u_new: Tensor) -> FormJacobian:
            jacobian: FormJacobian = ctx.constraint.linearize(u_old, u_new, z, ctx.steps.with_parameters(p))
            _ = jacobian.F_p if len(p) else None  # now, not inside a transform
            return jacobian

        return constant(linearize, u_new)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return *_Residual._jacobian(ctx).vjp(cotangents[0]), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Residual._jacobian(ctx).jvp(*tangents[:4])
