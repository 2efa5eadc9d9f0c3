"""Transient constraints F_i(u_{i-1}, u_i, z_i; p) = 0, written by the user for a batch of steps.

Rows of a batch are steps and do not interact, so one `torch.func.jvp` or `vjp` of the batched residual
*is* the block diagonal Jacobian: no loop over steps. `TimeDependentConstraint` derives every verb from
`residual`; a constraint overrides one only where it knows a better form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.autodiff import columns, jvp, vjp
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.steps.sparse import StepMatrix, StepPattern
from pdeopt.steps.stepsolve import StagedSubstitution, StepFactor, StepKrylov, Substitution, step_solver, substitution
from pdeopt.steps.timegrid import Steps

#: Above this many unknowns a step, the pattern is not found by dense differentiation: declare it.
DETECTION_LIMIT = 2048


class TimeDependentConstraint(ABC):
    """F_i(u_{i-1}, u_i, z_i; p) = 0 for i = 1..N, and u_0 = G(p).

    Attributes:
        state_dim, control_dim: unknowns of one step, n and m.
        param_dim: length of the global parameters `p`, found in `steps.p`; 0 for none.
        state_mass, control_mass: inner products of one step's state and control, as `StepMatrix`, scipy or
            dense matrices; None for the Euclidean one. They make norms, and with them iteration counts,
            independent of the mesh.
        conservative: steps conserve energy, as the midpoint rule does for waves; preconditioners then damp both
            ends of a step alike.
    """

    state_dim: int
    control_dim: int
    param_dim: int = 0
    state_mass: Any = None
    control_mass: Any = None
    conservative: bool = False

    @abstractmethod
    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """F_i for a batch of steps: (batch, n), (batch, n), (batch, m) -> (batch, n), by torch functions."""

    @abstractmethod
    def initial_state(self, p: Tensor) -> Tensor:
        """u_0 = G(p), shape (n,); `p` is empty where param_dim is 0."""

    def advance(self, u_old: Tensor, z: Tensor, steps: Steps, guess: Tensor | None = None) -> Tensor:
        """u_new with F(u_old, u_new, z) = 0, shape (batch, n), by Newton's method with step halving.

        Raises `SolveFailure` where a row does not converge.
        """
        u = u_old.clone() if guess is None else guess.clone()
        r = self.residual(u_old, u, z, steps)
        for _ in range(50):
            if not r.isfinite().all():
                break
            du = self.linearize(u_old, u, z, steps).solve(-r)
            if (du.abs() <= 1e-9 * (1 + u.abs().amax(-1, keepdim=True))).all():  # quadratic: next error 1e-18
                return u + du
            u, r = self._halve_until_smaller(u_old, u, du, z, steps, r)
        raise SolveFailure(
            f"Newton's method for the state failed in step {int(steps.index[0])}",
            "take smaller time steps or a smaller control",
        )

    def _halve_until_smaller(
        self, u_old: Tensor, u: Tensor, du: Tensor, z: Tensor, steps: Steps, r: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The longest of the steps 1, 1/2, 1/4, ... that shrinks the residual, row by row."""
        scale = torch.ones_like(r[:, :1])
        size = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        for _ in range(20):
            trial = u + scale * du
            r_trial = self.residual(u_old, trial, z, steps)
            good = torch.linalg.vector_norm(r_trial, dim=-1, keepdim=True) < size
            if good.all():
                break
            scale = torch.where(good, scale, 0.5 * scale)
        return trial, r_trial

    def linearize(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> StepJacobian:
        """The step Jacobian F' = [B A C] at a batch of steps: sparse where there is a pattern."""
        if self.pattern is None:
            return StepJacobian(self, u_old, u_new, z, steps)
        return SparseStepJacobian.colored(self, u_old, u_new, z, steps, self.pattern)

    @cached_property
    def pattern(self) -> StepPattern | None:
        """The sparsity of a step; found by differentiating at random points unless declared.

        None above `DETECTION_LIMIT` unknowns: products with derivatives then stay matrix-free. Declare
        it as an attribute: `self.pattern = StepPattern(A, B, C, W)`, or None to stay matrix-free.
        """
        if self.state_dim + self.control_dim > DETECTION_LIMIT:
            return None
        return self.detect_pattern()

    def detect_pattern(self, samples: int = 3) -> StepPattern | None:
        """Where derivatives at random points are not zero; None if the residual is not finite there.

        An accidental zero has probability zero for a smooth residual; `SparseStepJacobian.colored`
        nevertheless checks the pattern with a random product at each linearization.
        """
        n, size = self.state_dim, 2 * self.state_dim + self.control_dim
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(samples, size, generator=generator, dtype=torch.float64)
        lam = torch.randn(samples, n, generator=generator, dtype=torch.float64)
        index = torch.ones(samples, dtype=torch.int64)
        time = torch.rand(samples, generator=generator, dtype=torch.float64)
        p = torch.randn(self.param_dim, generator=generator, dtype=torch.float64)
        steps = Steps(index, time, time + 0.1, torch.full_like(time, 0.1), 2, p)

        def stacked(x: Tensor) -> Tensor:
            return self.residual(x[:, :n], x[:, n : 2 * n], x[:, 2 * n :], steps)

        def gradient(x: Tensor) -> Tensor:
            return vjp(stacked, (x,), lam)[0]

        unit = torch.eye(size, dtype=torch.float64)[:, None, :].expand(-1, samples, -1)
        J = columns(lambda d: jvp(stacked, (x,), (d,)), unit, chunk_size=256)
        H = columns(lambda d: jvp(gradient, (x,), (d,)), unit, chunk_size=256)
        if not (J.isfinite().all() and H.isfinite().all()):
            return None
        return StepPattern.from_dense(J.permute(1, 2, 0), H.permute(1, 2, 0), n)


class StepJacobian:
    """F' = [B A C] (and dF/dp) at a batch of steps: a value, linear in every verb; factors are cached.

    This class is matrix-free, by automatic differentiation. A direction or result of `None` means zero.
    """

    def __init__(self, constraint: TimeDependentConstraint, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps):
        self.constraint, self.steps = constraint, steps
        self.point = (u_old, u_new, z, steps.p)

    def _residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, p: Tensor) -> Tensor:
        return self.constraint.residual(u_old, u_new, z, self.steps.with_parameters(p))

    def _directions(self, *directions: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x) if d is None else d for x, d in zip(self.point, directions))

    def jvp(
        self,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> Tensor:
        """B d_old + A d_new + C dz + F_p dp, shape (batch, n)."""
        return jvp(self._residual, self.point, self._directions(d_old, d_new, dz, dp))

    def vjp(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B'w, A'w, C'w, F_p'w) in one sweep; the last summed over the batch, shape (param_dim,)."""
        w_old, w_new, w_z, w_p = vjp(self._residual, self.point, w)
        return w_old, w_new, w_z, w_p

    def hvp(
        self,
        lam: Tensor,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The Hessian of lam.F times a direction: rows for u_old, u_new, z, and the sum for p."""

        def gradient(*point: Tensor) -> tuple[Tensor, ...]:
            return vjp(self._residual, point, lam)

        h_old, h_new, h_z, h_p = jvp(gradient, self.point, self._directions(d_old, d_new, dz, dp))
        return h_old, h_new, h_z, h_p

    @cached_property
    def A(self) -> Tensor:
        """dF/du_new of each step, dense, shape (batch, n, n)."""
        unit = torch.eye(self.constraint.state_dim, dtype=torch.float64)
        by_column = columns(lambda d: self.jvp(d_new=d.expand_as(self.point[1])), unit)  # (n, batch, n)
        return by_column.permute(1, 2, 0)

    @cached_property
    def _lu(self) -> tuple[Tensor, Tensor]:
        factors, pivots, info = torch.linalg.lu_factor_ex(self.A)
        if info.any() or not factors.isfinite().all():
            raise SolveFailure("a step matrix dF/du_new is singular", "check that each step has a unique solution")
        return factors, pivots

    def solve(self, r: Tensor) -> Tensor:
        """A^-1 r of each step, shape (batch, n)."""
        solution: Tensor = torch.linalg.lu_solve(*self._lu, r[..., None])
        return solution[..., 0]

    def solve_adjoint(self, r: Tensor) -> Tensor:
        """A^-T r of each step, shape (batch, n)."""
        solution: Tensor = torch.linalg.lu_solve(*self._lu, r[..., None], adjoint=True)
        return solution[..., 0]

    def forward_sweep(self, r: Tensor) -> Tensor:
        """x with A_i x_i + B_i x_{i-1} = r_i over the batch, x_0 = 0: forward substitution."""
        x = torch.zeros_like(r)
        for i in range(len(r)):
            step = self._one(i)
            known = step.jvp(d_old=x[i - 1 : i]) if i else torch.zeros_like(r[:1])
            x[i] = step.solve(r[i : i + 1] - known)[0]
        return x

    def backward_sweep(self, r: Tensor) -> Tensor:
        """x with A_i' x_i + B_{i+1}' x_{i+1} = r_i over the batch: the transpose of `forward_sweep`."""
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
        values: entries of the stacked blocks [B A C], row by row: (batch, pattern.jacobian.nnz), or with
            batch 1 where all steps are equal.
    """

    def __init__(
        self,
        constraint: TimeDependentConstraint,
        point: tuple[Tensor, Tensor, Tensor],
        steps: Steps,
        pattern: StepPattern,
        values: Tensor,
    ) -> None:
        super().__init__(constraint, *point, steps)
        self.pattern = pattern
        self.blocks = pattern.split(values)

    @classmethod
    def colored(
        cls,
        constraint: TimeDependentConstraint,
        u_old: Tensor,
        u_new: Tensor,
        z: Tensor,
        steps: Steps,
        pattern: StepPattern,
    ) -> SparseStepJacobian:
        """Blocks by colored forward-mode differentiation, checked with one random product.

        Raises `InputError` where the residual depends on more than the pattern says.
        """
        n = constraint.state_dim
        x = torch.cat([u_old, u_new, z], dim=1)

        def residual(x: Tensor) -> Tensor:
            return constraint.residual(x[:, :n], x[:, n : 2 * n], x[:, 2 * n :], steps)

        def product(direction: Tensor) -> Tensor:
            return jvp(residual, (x,), (direction.expand_as(x),))

        values = pattern.jacobian.fill(product)
        probe = torch.linspace(1.0, 2.0, x.shape[1], dtype=x.dtype)
        expected, found = product(probe), StepMatrix(pattern.jacobian, values)(probe.expand_as(x))
        if (expected - found).abs().amax() > 1e-8 * (1 + expected.abs().amax()):
            raise InputError(
                f"{type(constraint).__name__}.pattern",
                "a sparsity that misses nonzero derivatives",
                "StepPattern(A, B, C, W) with all entries, or pattern = None for matrix-free products",
            )
        return cls(constraint, (u_old, u_new, z), steps, pattern, values)

    def jvp(
        self,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> Tensor:
        pairs = zip("BAC", (d_old, d_new, dz))
        terms = [self.blocks[name](d) for name, d in pairs if d is not None]
        if dp is not None and dp.numel() > 0:
            terms.append(super().jvp(dp=dp))
        return sum(terms[1:], terms[0]) if terms else torch.zeros_like(self.point[1])

    def vjp(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p = self.point[3]
        p_part = super().vjp(w)[3] if p.numel() > 0 else p
        B, A, C = (self.blocks[name] for name in "BAC")
        return B.transpose(w), A.transpose(w), C.transpose(w), p_part

    def solve(self, r: Tensor) -> Tensor:
        return self._factor.solve(r)

    def solve_adjoint(self, r: Tensor) -> Tensor:
        return self._factor.solve(r, transpose=True)

    @cached_property
    def _factor(self) -> StepFactor | StepKrylov:
        return step_solver(self.blocks["A"])

    @cached_property
    def _sweeps(self) -> Substitution | StagedSubstitution:
        return substitution(self.blocks["A"], self.blocks["B"], len(self.steps))

    def forward_sweep(self, r: Tensor) -> Tensor:
        return self._sweeps.forward(r)

    def backward_sweep(self, r: Tensor) -> Tensor:
        return self._sweeps.backward(r)
