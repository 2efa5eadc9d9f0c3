"""The Jacobian of a batch of steps: matrix-free, or with sparse blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pdeopt.core.autodiff import columns, curvature, is_transformed, jvp, pullback, vjp
from pdeopt.core.errors import InputError, StepFailure
from pdeopt.steps.bands import NOT_FINITE, SINGULAR_STEP, CoupledBand
from pdeopt.steps.sparse import StepMatrix, StepPattern
from pdeopt.steps.sparsity import ParameterPattern, fill_by_rows, has_fewer_row_colors
from pdeopt.steps.stepsolve import StagedSubstitution, StepSolver, step_solver
from pdeopt.steps.sweeps import Substitution, substitution
from pdeopt.steps.timegrid import Steps

#: Rows for u_old, u_new and z, and a sum over the batch for p; None for zero.
Curvature = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class StepEquation(Protocol):
    """What a step Jacobian differentiates; every `TimeDependentConstraint` is one."""

    state_dim: int

    @property
    def parameter_pattern(self) -> ParameterPattern | None:
        """Where derivatives in p have entries; None where that is not known."""

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """F_i(u_{i-1}, u_i, z_i; p) for a batch of steps, (batch, n)."""


class StepJacobian:
    """F' = [B A C] (and dF/dp) at a batch of steps: B = dF/du_old, A = dF/du_new, C = dF/dz.

    A value: linear in every verb, never changed, with factors of A that are made when first needed and kept. This
    class is matrix-free, by automatic differentiation of the constraint's residual; a subclass overrides verbs that it
    does better, as an explicit step overrides `solve` by the identity. A direction that is None means zero. No verb
    talks to other ranks.

    Args:
        constraint: whose residual is differentiated.
        u_old, u_new, z, steps: the point: (batch, n), (batch, n), (batch, m), and the steps.

    Example:
        >>> jacobian = constraint.linearize(u_old, u_new, z, steps)
        >>> du = jacobian.solve(-jacobian.jvp(dz=dz))       # du_i/dz_i dz_i of each step
        >>> w_old, w_new, w_z, w_p = jacobian.vjp(lam)
    """

    def __init__(self, constraint: StepEquation, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps):
        self.constraint, self.steps = constraint, steps
        self.point = (u_old, u_new, z, steps.p)

    def _residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, p: Tensor) -> Tensor:
        return self.constraint.residual(u_old, u_new, z, self.steps.with_parameters(p))

    def _directions(self, *directions: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x) if d is None else d for x, d in zip(self.point, directions))

    @cached_property
    def residual(self) -> Tensor:
        """F at the point, (batch, n)."""
        return self._residual(*self.point)

    def jvp(
        self,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> Tensor:
        """B d_old + A d_new + C dz + F_p dp.

        Args:
            d_old, d_new, dz: directions, (batch, n), (batch, n), (batch, m); None for zero.
            dp: direction of the global parameters, (param_dim,); None for zero.

        Returns:
            (batch, n).
        """
        return jvp(self._residual, self.point, self._directions(d_old, d_new, dz, dp))

    def vjp(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B'w, A'w, C'w, F_p'w) in one sweep.

        Args:
            w: cotangents of the residuals, (batch, n).

        Returns:
            (batch, n), (batch, n), (batch, m), and the sum over the batch, (param_dim,).
        """
        w_old, w_new, w_z, w_p = vjp(self._residual, self.point, w)
        return w_old, w_new, w_z, w_p

    def control_vjp(self, w: Tensor) -> Tensor:
        """C'w alone, (batch, m)."""
        return self.vjp(w)[2]

    def hvp(
        self,
        lam: Tensor,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> Curvature:
        """The Hessian of sum_i lam_i.F_i times a direction.

        Args:
            lam: multipliers of the steps, (batch, n).
            d_old, d_new, dz, dp: the direction, as in `jvp`.

        Returns:
            Rows for u_old, u_new and z, and the sum over the batch for p, as in `vjp`; None for what is always zero.
        """

        product = curvature(self._residual, self.point, lam)
        h_old, h_new, h_z, h_p = product(*self._directions(d_old, d_new, dz, dp))
        return h_old, h_new, h_z, h_p

    @cached_property
    def A(self) -> Tensor:
        """dF/du_new of each step, dense, shape (batch, n, n)."""
        unit = torch.eye(self.constraint.state_dim, dtype=torch.float64)
        return columns(lambda d: self.jvp(d_new=d.expand_as(self.point[1])), unit).permute(1, 2, 0)

    @cached_property
    def _lu(self) -> tuple[Tensor, Tensor]:
        factors, pivots, info = torch.linalg.lu_factor_ex(self.A)
        bad = (info != 0) | ~factors.isfinite().flatten(1).all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            with self.steps.naming():
                raise StepFailure(*(SINGULAR_STEP if self.A[row].isfinite().all() else NOT_FINITE), row)
        return factors, pivots

    def solve(self, r: Tensor) -> Tensor:
        """A^-1 r of each step, (batch, n) -> (batch, n). Raises `SolveFailure` where a step matrix is singular."""
        solution: Tensor = torch.linalg.lu_solve(*self._lu, r[..., None])
        return solution[..., 0]

    def solve_adjoint(self, r: Tensor) -> Tensor:
        """A^-T r of each step, (batch, n) -> (batch, n). Raises `SolveFailure` where a step matrix is singular."""
        solution: Tensor = torch.linalg.lu_solve(*self._lu, r[..., None], adjoint=True)
        return solution[..., 0]

    def forward_sweep(self, r: Tensor) -> Tensor:
        """x with A_i x_i + B_i x_{i-1} = r_i over a batch of consecutive steps, x_0 = 0: forward substitution.

        (batch, n) -> (batch, n). Raises `SolveFailure` where a step matrix is singular.
        """
        x = torch.zeros_like(r)
        for i in range(len(r)):
            step = self._one(i)
            known = step.jvp(d_old=x[i - 1 : i]) if i else torch.zeros_like(r[:1])
            x[i] = step.solve(r[i : i + 1] - known)[0]
        return x

    def backward_sweep(self, r: Tensor) -> Tensor:
        """x with A_i' x_i + B_{i+1}' x_{i+1} = r_i over the batch: the transpose of `forward_sweep`.

        (batch, n) -> (batch, n). Raises `SolveFailure` where a step matrix is singular.
        """
        x, known = torch.zeros_like(r), torch.zeros_like(r[:1])
        for i in reversed(range(len(r))):
            step = self._one(i)
            x[i] = step.solve_adjoint(r[i : i + 1] - known)[0]
            known = step.vjp(x[i : i + 1])[0]
        return x

    def _one(self, i: int) -> StepJacobian:
        """Step i of the batch alone, with its part of the factors."""
        u_old, u_new, z, _ = self.point
        rows = slice(i, i + 1)
        step = StepJacobian(self.constraint, u_old[rows], u_new[rows], z[rows], self.steps[rows])
        step._lu = (self._lu[0][rows], self._lu[1][rows])
        return step


class SparseStepJacobian(StepJacobian):
    """F' = [B A C] with sparse blocks: products without differentiation, sweeps without a loop.

    Args:
        constraint, point, steps: where; the point is (u_old, u_new, z).
        pattern: sparsities of the blocks.
        values: entries of the stacked blocks [B A C], row by row, (batch, pattern.jacobian.nnz), or by its name those
            of each block, or a `StepMatrix`, which may serve many points; with batch 1 where all steps are equal.
    """

    def __init__(
        self,
        constraint: StepEquation,
        point: tuple[Tensor, Tensor, Tensor],
        steps: Steps,
        pattern: StepPattern,
        values: Tensor | Mapping[str, Tensor | StepMatrix],
    ) -> None:
        super().__init__(constraint, *point, steps)
        self.pattern, self._widths = pattern, [x.shape[1] for x in point]
        self._curvature: StepCurvature | None = None  # of the last multiplier
        self._has_been_asked = False  # for a product with dF/dp
        if isinstance(values, Tensor):
            self.blocks = pattern.split(values)
        else:
            kept = {name: x for name, x in values.items() if isinstance(x, StepMatrix)}
            made = {name: StepMatrix(getattr(pattern, name), x) for name, x in values.items() if isinstance(x, Tensor)}
            self.blocks = kept | made

    @classmethod
    def colored(
        cls, constraint: StepEquation, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps, pattern: StepPattern
    ) -> SparseStepJacobian:
        """Blocks by colored differentiation, checked with one product: in the mode that needs fewer of them.

        Raises `InputError` where the residual depends on more than the pattern says.
        """

        def residual(u_old: Tensor, u_new: Tensor, z: Tensor) -> Tensor:
            return constraint.residual(u_old, u_new, z, steps)

        point = (u_old, u_new, z)
        if has_fewer_row_colors(pattern.jacobian):
            value, transposed = pullback(residual, point)
            values, are_all = fill_by_rows(pattern.jacobian, lambda w: torch.cat(transposed(w.expand_as(value)), dim=1))
        else:
            value, widths = residual(*point), [x.shape[1] for x in point]
            values, are_all = pattern.jacobian.fill(
                lambda d: jvp(residual, point, tuple(x.expand(len(z), -1) for x in d.split(widths)))
            )
        legal = "StepPattern(A, B, C, W) with all entries, or pattern = None for matrix-free products"
        _require(are_all, constraint, "pattern", legal)
        found = cls(constraint, point, steps, pattern, values)
        found.residual = value
        return found

    def jvp(
        self,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> Tensor:
        terms = [self.blocks[name](d) for name, d in zip("BAC", (d_old, d_new, dz)) if d is not None]
        if dp is not None and dp.numel() > 0:
            F_p = self._parameters()
            terms.append(super().jvp(dp=dp) if F_p is None else F_p(dp.expand(len(self.point[1]), -1)))
        if not terms:
            return self.point[1].new_zeros(len(self.steps), self.constraint.state_dim)
        return sum(terms[1:], terms[0])

    def vjp(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p_part = self.point[3]
        if p_part.numel() > 0:
            F_p = self._parameters()
            p_part = super().vjp(w)[3] if F_p is None else F_p.transpose(w).sum(0)
        B, A, C = (self.blocks[name] for name in "BAC")
        return B.transpose(w), A.transpose(w), C.transpose(w), p_part

    def control_vjp(self, w: Tensor) -> Tensor:
        return self.blocks["C"].transpose(w)

    def hvp(
        self,
        lam: Tensor,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> Curvature:
        earlier, found = self._curvature, None
        if not is_transformed() and self.curvature(lam) is earlier:  # for one product entries do not pay
            found = self.curvature(lam).product(*self._directions(d_old, d_new, dz, dp))
        return super().hvp(lam, d_old, d_new, dz, dp) if found is None else found

    def curvature(self, lam: Tensor) -> StepCurvature:
        """The Hessians of lam_i.F_i; kept for this multiplier.

        Args:
            lam: multipliers of the steps, (batch, n).
        """
        if self._curvature is None or not torch.equal(self._curvature.lam, lam):
            self._curvature = StepCurvature(self, lam.clone())
        return self._curvature

    @cached_property
    def F_p(self) -> StepMatrix | None:
        """dF/dp of each step by colored products; None where its pattern is not known, or has no few colors.

        Raises `InputError` where the pattern misses nonzero derivatives.
        """
        pattern = self.constraint.parameter_pattern
        if pattern is None or not pattern.is_sparse:
            return None
        free = super().jvp
        values, are_all = pattern.F.fill(lambda dp: free(dp=dp), at_once=False)
        _require(are_all, self.constraint)
        return StepMatrix(pattern.F, values)

    def _parameters(self) -> StepMatrix | None:
        """`F_p` from the second product on: for a single one it does not pay."""
        is_second, self._has_been_asked = self._has_been_asked, True
        return self.F_p if is_second and not is_transformed() else None

    def solve(self, r: Tensor) -> Tensor:
        with self.steps.naming():
            return self._factor.solve(r)

    def solve_adjoint(self, r: Tensor) -> Tensor:
        with self.steps.naming():
            return self._factor.solve(r, transpose=True)

    @cached_property
    def _factor(self) -> StepSolver:
        return step_solver(self.blocks["A"])

    @cached_property
    def _sweeps(self) -> CoupledBand | Substitution | StagedSubstitution:
        return substitution(self.blocks["A"], self.blocks["B"], len(self.steps))

    def forward_sweep(self, r: Tensor) -> Tensor:
        with self.steps.naming():
            return self._sweeps.forward(r)

    def backward_sweep(self, r: Tensor) -> Tensor:
        with self.steps.naming():
            return self._sweeps.backward(r)


class StepCurvature:
    """The Hessian of each lam_i.F_i of a batch of steps by colored products, made when asked for.

    Args:
        jacobian: at the point.
        lam: multipliers of the steps, (batch, n).
    """

    def __init__(self, jacobian: SparseStepJacobian, lam: Tensor) -> None:
        self.lam, self.pattern, self.constraint = lam, jacobian.pattern, jacobian.constraint
        self._residual, self.point = jacobian._residual, jacobian.point
        self._widths = [x.shape[1] for x in self.point[:3]]

    @cached_property
    def W(self) -> StepMatrix | None:
        """Over [u_old | u_new | z]; None where the pattern misses nonzero second derivatives."""

        def residual(u_old: Tensor, u_new: Tensor, z: Tensor) -> Tensor:
            return self._residual(u_old, u_new, z, self.point[3])

        def rows(d: Tensor) -> Tensor:
            return torch.cat(product(*(part.expand(len(self.lam), -1) for part in d.split(self._widths))), dim=1)

        product = curvature(residual, self.point[:3], self.lam)
        values, are_all = self.pattern.W.fill(rows, at_once=False)
        return StepMatrix(self.pattern.W, values) if are_all else None

    @cached_property
    def in_parameters(self) -> tuple[StepMatrix, StepMatrix] | None:
        """The columns of p: rows over [u_old | u_new | z] of each step, and the sum over the batch in p alone.

        None where the pattern of p is not known, or has no few colors. Raises `InputError` where it misses entries.
        """
        pattern = self.constraint.parameter_pattern
        if pattern is None or not pattern.is_sparse:
            return None
        product, still = curvature(self._residual, self.point, self.lam), [torch.zeros_like(x) for x in self.point[:3]]
        mixed, are_all = pattern.W.fill(lambda dp: torch.cat(product(*still, dp)[:3], dim=1), at_once=False)
        own, are_all_own = pattern.W_pp.fill(lambda dp: product(*still, dp)[3][None], at_once=False)
        _require(are_all and are_all_own, self.constraint)
        return StepMatrix(pattern.W, mixed), StepMatrix(pattern.W_pp, own)

    def product(
        self, d_old: Tensor, d_new: Tensor, dz: Tensor, dp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """`StepJacobian.hvp`; None where entries are not known."""
        d, h_p = torch.cat([d_old, d_new, dz], dim=1), dp
        if self.W is None or (len(dp) and self.in_parameters is None):
            return None
        h = self.W(d)
        if len(dp) and self.in_parameters is not None:
            W_p, W_pp = self.in_parameters
            h, h_p = h + W_p(dp.expand(len(d), -1)), W_p.transpose(d).sum(0) + W_pp(dp[None])[0]
        h_old, h_new, h_z = h.split(self._widths, dim=1)
        return h_old, h_new, h_z, h_p


def _require(
    are_all: bool,
    constraint: StepEquation,
    name: str = "parameter_pattern",
    legal: str = "ParameterPattern(F, W, W_pp) with all entries, or None",
) -> None:
    if not are_all:
        what = f"{type(constraint).__name__}.{name}"
        raise InputError(what, "a sparsity that misses nonzero derivatives", legal)
