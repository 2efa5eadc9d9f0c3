"""`FormObjective`: functionals in UFL as an objective; those that are quadratic are assembled once."""

from __future__ import annotations

from typing import Any

import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.control.objective import Objective, Rows
from pdeopt.core.autodiff import constant, is_plain
from pdeopt.core.errors import InputError
from pdeopt.space.border import require_functional
from pdeopt.space.fenicsx import packages, with_degrees
from pdeopt.space.forms import FormConstraint
from pdeopt.space.stepforms import StepForm, evaluate
from pdeopt.space.steppoint import POINT, Field
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import Steps, TimeGrid


class FormObjective(Objective):
    """sum_i w_i j(u_i; t_i) + sum_k dt_k g(z_k; t_k) + l(u_N), functionals of a step's functions in UFL.

    UFL differentiates them twice. A quadratic functional is assembled once, its linear part once a time where it
    depends on `t`; another once a step and evaluation.

    Args:
        constraint: whose u_new, z and t the functionals are written in.
        state: j, a functional of u_new; w_i are the trapezoidal weights of the grid.
        control: g, a functional of z.
        terminal: l, a functional of u_new that counts at the last step alone.

    Raises:
        InputError: no functionals, or such of other functions than theirs; parameters beside a functional that is not
            quadratic.

    Example:
        >>> J = FormObjective(heat, state=0.5 * (u - d) ** 2 * dx, control=0.5 * alpha * z**2 * ds)
    """

    adds_up = True  # each rank integrates over its own cells

    def __init__(
        self, constraint: FormConstraint, state: Any = None, control: Any = None, terminal: Any = None
    ) -> None:
        self.constraint, self.terms = constraint, list[tuple[str, FormTerm]]()
        at = constraint._point
        fields = {"state": at.new, "control": at.z, "terminal": at.new}
        for (name, field), form in zip(fields.items(), (state, control, terminal)):
            if form is not None:
                if field is None:
                    raise InputError("control of FormObjective", "a functional", "None: the constraint has no control")
                self.terms.append((name, FormTerm(name, form, constraint, field)))
        if not self.terms:
            raise InputError("FormObjective", "no functional", "state, control or terminal")
        self.is_quadratic = all(term.is_quadratic for _, term in self.terms)
        self.is_convex = all(term.is_convex for _, term in self.terms)

    def check(self, n: int, m: int, grid: TimeGrid) -> None:
        if (n, m) != (self.constraint.state_dim, self.constraint.control_dim):
            raise InputError("FormObjective", f"a constraint of {n} and {m} unknowns", "the one that it was made with")

    def _weight(self, name: str, steps: Steps) -> Tensor:
        if name == "state":
            return steps.weight
        return steps.dt if name == "control" else (steps.index == steps.num_steps).to(steps.dt.dtype)

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        values = [
            self._weight(name, steps) * term.value(z if name == "control" else u, steps) for name, term in self.terms
        ]
        return torch.stack(values).sum(0)

    def gradient(self, u: Tensor, z: Tensor, steps: Steps) -> Rows:
        g_u, g_z = torch.zeros_like(u), torch.zeros_like(z)
        for name, term in self.terms:
            weight = self._weight(name, steps)[:, None]
            if name == "control":
                g_z = g_z + weight * term.gradient(z, steps)
            else:
                g_u = g_u + weight * term.gradient(u, steps)
        return g_u, g_z, torch.zeros_like(steps.p)

    def hvp(self, u: Tensor, z: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor) -> Rows:
        h_u, h_z = torch.zeros_like(du), torch.zeros_like(dz)
        for name, term in self.terms:
            weight = self._weight(name, steps)[:, None]
            if name == "control":
                h_z = h_z + weight * term.hessian(z, steps)(dz)
            else:
                h_u = h_u + weight * term.hessian(u, steps)(du)
        return h_u, h_z, torch.zeros_like(dp)

    def hessian_sparsity(self, n: int, m: int, steps: Steps) -> Sparsity:
        found = Sparsity.empty(n + m, n + m)
        for name, term in self.terms:
            own, none = term.second.sparsity.csr, sp.csr_matrix
            parts = [none((n, n)), own] if name == "control" else [own, none((m, m))]
            found = found | Sparsity(sp.block_diag(parts))
        return found

    def hessian_blocks(self, u: Tensor, z: Tensor, steps: Steps) -> tuple[InnerProduct, InnerProduct]:
        state, control = InnerProduct.zero(u.shape[1], len(steps)), InnerProduct.zero(z.shape[1], len(steps))
        for name, term in self.terms:
            own = InnerProduct(self._weight(name, steps), term.hessian(z if name == "control" else u, steps))
            if name == "control":
                control = control + own
            else:
                state = state + own
        return state, control


class FormTerm:
    """A functional of one function of a step, with its derivatives.

    Args:
        name: state | control | terminal, for errors.
        form: the functional.
        constraint: of the functions.
        field: of the one that it is a function of.
    """

    def __init__(self, name: str, form: Any, constraint: FormConstraint, field: Field) -> None:
        require_functional(form, f"{name} of FormObjective")
        at, ufl, form = constraint._point, packages().ufl, with_degrees(form)
        slope = ufl.derivative(form, field.function)
        self.form, self.first = StepForm(form, at), StepForm(slope, at, field)
        self.second = StepForm(ufl.derivative(slope, field.function), at, field, field)
        own, self.field, self._constraint = "z" if name == "control" else "u_new", field, constraint
        if strange := self.form.depends - {own, "t"}:
            got = f"a functional of {', '.join(sorted(strange))}"
            raise InputError(f"{name} of FormObjective", got, f"one of {own} and t")
        self.is_quadratic = not self.second.depends
        if constraint.param_dim and not self.is_quadratic:
            got = "a functional that is not quadratic, beside parameters"
            raise InputError(f"{name} of FormObjective", got, "a quadratic one, or an Objective of your own")
        self._last: tuple[Tensor, StepMatrix] | None = None
        self._matrix: StepMatrix | None = None
        if self.is_quadratic:
            self._matrix = StepMatrix(self.second.sparsity, self.second.values()[None])
        self.is_convex = self.second.is_zero or (self._matrix is not None and _is_semidefinite(self._matrix))

    def value(self, x: Tensor, steps: Steps) -> Tensor:
        """(batch,) of rows, (batch, k)."""
        if self._matrix is None:
            if is_plain(x):
                return self.assembled(self.form, x, steps)[:, 0]
            return _Value.apply(x, self, steps)  # type: ignore[no-any-return, no-untyped-call]
        value, slope = constant(lambda _: (self.form.at_times(steps), self.first.at_times(steps)), x)
        found: Tensor = value[:, 0] + (slope * x).sum(-1) + 0.5 * (x * self._matrix(x)).sum(-1)
        return found

    def gradient(self, x: Tensor, steps: Steps) -> Tensor:
        """(batch, k)."""
        if self._matrix is None:
            return self.assembled(self.first, x, steps)
        slope = constant(lambda _: self.first.at_times(steps), x)
        found: Tensor = slope + self._matrix(x)
        return found

    def hessian(self, x: Tensor, steps: Steps) -> StepMatrix:
        """Of each step; that of the last point is kept."""
        if self._matrix is not None:
            return self._matrix
        if self._last is None or not torch.equal(self._last[0], x):
            self._last = x.clone(), StepMatrix(self.second.sparsity, self.assembled(self.second, x, steps))
        return self._last[1]

    def assembled(self, form: StepForm, x: Tensor, steps: Steps) -> Tensor:
        """The entries of one of the forms at each step, (batch, k)."""
        layout, controls, rows = self._constraint.layout, self._constraint.controls, len(steps)
        u, z = (torch.zeros(rows, each.n_all, dtype=torch.float64) for each in (layout, controls))
        x = self.field.layout.extend(x)
        point = (u, u, x) if self.field is self._constraint._point.z else (u, x, z)
        (found,) = evaluate([form], point, steps) if form.depends & POINT else [form.at_times(steps)]
        return found.expand(rows, -1)


class _Value(torch.autograd.Function):
    """A functional for PyTorch's differentiation, once."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, term: FormTerm, steps: Steps) -> Tensor:
        return term.assembled(term.form, x.detach(), steps)[:, 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.term, ctx.steps = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def _gradient(ctx: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        found: Tensor = constant(lambda x: ctx.term.assembled(ctx.term.first, x, ctx.steps), x.detach())
        return found

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        return cotangents[0][:, None] * _Value._gradient(ctx), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        found: Tensor = (_Value._gradient(ctx) * tangents[0]).sum(-1)
        return found


def _is_semidefinite(matrix: StepMatrix) -> bool:
    try:
        StepMatrix.form(matrix, None, semidefinite=True)
    except InputError:
        return False
    return True
