"""Transient constraints F_i(u_{i-1}, u_i, z_i; p) = 0, written by the user for a batch of steps.

Rows of a batch are steps and do not interact, so one `torch.func.jvp` or `vjp` of the batched residual
*is* the block diagonal Jacobian: no loop over steps. `TimeDependentConstraint` derives every verb from
`residual`; a constraint overrides one only where it knows a better form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import scipy.sparse as sp
import torch
from mpi4py import MPI
from torch import Tensor

from pdeopt.control.stepjacobian import SparseStepJacobian, StepJacobian
from pdeopt.core.autodiff import columns, jvp, vjp
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.space.layouts.layout import Layout
from pdeopt.steps.matrices.recovery import sparse_pattern
from pdeopt.steps.sparse import StepPattern
from pdeopt.steps.sparsity import ParameterPattern, Sparsity
from pdeopt.steps.timegrid import Steps, TimeGrid

#: The most columns of a step's Jacobian [B A C] that are differentiated one by one for its pattern.
DENSE_COLUMNS = 4096

#: The most unknowns of a step, states and controls, and the most parameters, for a pattern of derivatives in these.
DETECTION_LIMIT = 2048

#: Of Newton's method for single steps.
MAX_NEWTON_STEPS, MAX_HALVINGS = 50, 20


class TimeDependentConstraint(ABC):
    """F_i(u_{i-1}, u_i, z_i; p) = 0 for i = 1..N, and u_0 = G(p): the state equation, as a user writes it.

    A subclass sets `state_dim` and `control_dim` and writes `residual` and `initial_state`; everything else is derived
    from them by automatic differentiation. It may override `advance`, `linearize` or `pattern` where it knows a better
    form. No method talks to other ranks: each sees the steps that it is given, in any number and order, and must
    treat each row by itself. Each step must have a unique solution u_i, so that dF_i/du_i is regular.

    Attributes:
        state_dim, control_dim: unknowns of one step, n and m.
        param_dim: length of the global parameters `p`, found in `steps.p`; 0 for none.
        state_mass, control_mass, param_mass: inner products of one step's state, of its control and of p, as
            `StepMatrix`, scipy or dense matrices; None for the Euclidean one. They make norms, and with them
            iteration counts, independent of the mesh. Where p is a field, `param_mass` is that of its space, an
            L2 or H1 product, or the inverse covariance of a prior.
        conservative: steps conserve energy, as the midpoint rule does for waves; preconditioners then damp both
            ends of a step alike.

    Example:
        >>> class Decay(TimeDependentConstraint):            # backward Euler for u' = -u^3 + z
        ...     state_dim, control_dim = 1, 1
        ...
        ...     def residual(self, u_old, u_new, z, steps):
        ...         return u_new - u_old - steps.dt[:, None] * (z - u_new**3)
        ...
        ...     def initial_state(self, p):
        ...         return torch.ones(1, dtype=torch.float64)
    """

    state_dim: int
    control_dim: int
    param_dim: int = 0
    state_mass: Any = None
    control_mass: Any = None
    param_mass: Any = None
    conservative: bool = False
    #: of states and controls of a step that is spread over ranks, see `SpaceConstraint`; None where rows are whole
    layout: Layout | None = None
    controls: Layout | None = None

    @abstractmethod
    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """F_i(u_{i-1}, u_i, z_i; p) for a batch of steps.

        Written by torch functions that torch.func can transform: no branches on values, no assignment to the
        arguments, no conversion to NumPy.

        Args:
            u_old: states at the beginning of the steps, (batch, n), float64.
            u_new: states at their end, (batch, n).
            z: controls, (batch, m).
            steps: numbers, times and lengths of the steps, (batch,) each, and the global parameters p.

        Returns:
            (batch, n), float64; row k depends on row k of the arguments (and on p) alone. The unit is the user's:
            the norm of residuals divides by dt and the state mass, so F is best scaled as M (u_new - u_old) + dt ...
        """

    @abstractmethod
    def initial_state(self, p: Tensor) -> Tensor:
        """u_0 = G(p).

        Args:
            p: global parameters, (param_dim,); empty where param_dim is 0.

        Returns:
            (n,), float64, by torch functions where it depends on p.
        """

    def advance(self, u_old: Tensor, z: Tensor, steps: Steps, guess: Tensor | None = None) -> Tensor:
        """u_new with F(u_old, u_new, z) = 0 for each row, by Newton's method with step halving.

        Args:
            u_old: states at the beginning of the steps, (batch, n).
            z: controls, (batch, m).
            steps: the steps.
            guess: where to begin, (batch, n); default u_old.

        Returns:
            (batch, n).

        Raises:
            SolveFailure: a row does not converge.
        """
        u = u_old.clone() if guess is None else guess.clone()
        r = self.residual(u_old, u, z, steps)
        for _ in range(MAX_NEWTON_STEPS):
            if not self.norms(r).isfinite().all():
                break
            du = self.linearize(u_old, u, z, steps).solve(-r)
            size = self.largest(torch.stack([du.abs().amax(-1), u.abs().amax(-1)]))
            if (size[0] <= 1e-9 * (1 + size[1])).all():  # quadratic: next error 1e-18
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
        scale, size = torch.ones_like(u[:, :1]), self.norms(r)
        for _ in range(MAX_HALVINGS):
            trial = u + scale * du
            r_trial = self.residual(u_old, trial, z, steps)
            good = self.norms(r_trial) < size
            if good.all():
                break
            scale = torch.where(good, scale, 0.5 * scale)
        return trial, r_trial

    def norms(self, r: Tensor) -> Tensor:
        """Euclidean norms of whole rows, (batch, n) -> (batch, 1); of all ranks of a step, where it is spread."""
        if self.layout is not None and self.layout.mpi.size > 1:
            return self.layout.sum(r.square().sum(-1, keepdim=True)).sqrt()
        found: Tensor = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        return found

    def largest(self, sizes: Tensor) -> Tensor:
        """The largest of numbers that the ranks of a step have, entry by entry."""
        return sizes if self.layout is None else self.layout.max(sizes)

    def linearize(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> StepJacobian:
        """The step Jacobian F' = [B A C] at a batch of steps: sparse where there is a pattern.

        Args:
            u_old, u_new, z, steps: the point, as in `residual`.

        Returns:
            A value that stays valid whatever is linearized later.

        Raises:
            InputError: the pattern misses entries of the Jacobian.
        """
        if self.pattern is None:
            return StepJacobian(self, u_old, u_new, z, steps)
        return SparseStepJacobian.colored(self, u_old, u_new, z, steps, self.pattern)

    @cached_property
    def pattern(self) -> StepPattern | None:
        """The sparsity of a step; found by differentiating at random points unless declared.

        None where rows have some hundred entries, or derivatives are not finite there: products with derivatives then
        stay matrix-free. Declare it as an attribute: `self.pattern = StepPattern(A, B, C, W)`, or None to stay
        matrix-free.
        """
        return self.detect_pattern()

    def detect_pattern(self, samples: int = 3) -> StepPattern | None:
        """Where derivatives at random points are not zero; None if these are not finite, or too many. Collective.

        Up to `DENSE_COLUMNS` columns one by one, beyond by some fifty directions for each entry of a row, see
        `sparse_pattern`. An accidental zero has probability zero for a smooth residual; `SparseStepJacobian.colored`
        nevertheless checks the pattern with a random product at each linearization.
        """
        sample = self._sample(samples)

        def stacked(x: Tensor) -> Tensor:
            return sample.residual(x, sample.steps.p)

        def gradient(x: Tensor) -> Tensor:
            return vjp(stacked, (x,), sample.lam)[0]

        J, H = (_entries(function, sample.x) for function in (stacked, gradient))
        if bool(
            self.largest(torch.tensor([float(J is None or H is None)], dtype=torch.float64))
        ):  # on one of the ranks
            return None
        return self._as_pattern(J, H)

    def _as_pattern(self, J: Any, H: Any) -> StepPattern:
        """From the patterns of [B A C], (n, 2n + m), and of W, (2n + m, 2n + m)."""
        n = self.state_dim
        return StepPattern(J[:, n : 2 * n], J[:, :n], J[:, 2 * n :], H)

    @cached_property
    def parameter_pattern(self) -> ParameterPattern | None:
        """Where derivatives in p have entries; found by differentiating at random points unless declared.

        None without parameters, with more than `DETECTION_LIMIT` of them, or where derivatives are not finite:
        products with them then stay matrix-free.
        """
        if not 0 < self.param_dim <= DETECTION_LIMIT or self.state_dim + self.control_dim > DETECTION_LIMIT:
            return None
        sample = self._sample(samples=3)

        def gradient(x: Tensor, p: Tensor) -> tuple[Tensor, ...]:
            return vjp(sample.residual, (x, p), sample.lam)

        def column(dp: Tensor) -> tuple[Tensor, ...]:
            point, direction = (sample.x, sample.steps.p), (torch.zeros_like(sample.x), dp)
            return jvp(sample.residual, point, direction), *jvp(gradient, point, direction)

        F, W, W_pp = columns(column, torch.eye(self.param_dim, dtype=torch.float64), chunk_size=256)
        if not all(part.isfinite().all() for part in (F, W, W_pp)):
            return None
        found = ((F != 0).any(1), (W != 0).any(1), W_pp != 0)
        return ParameterPattern(*(Sparsity(part.T.numpy()) for part in found))

    def _sample(self, samples: int) -> _Sample:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x, lam = draw(samples, 2 * self.state_dim + self.control_dim), draw(samples, self.state_dim)
        time = torch.rand(samples, generator=generator, dtype=torch.float64)
        index, dt, p = torch.ones(samples, dtype=torch.int64), torch.full_like(time, 0.1), draw(self.param_dim)
        return _Sample(self.residual, self.state_dim, x, lam, Steps(index, time, time + 0.1, dt, 2, p))


class _Sample(NamedTuple):
    """Random points of a few steps."""

    function: Callable[..., Tensor]
    width: int
    x: Tensor
    lam: Tensor
    steps: Steps

    def residual(self, x: Tensor, p: Tensor) -> Tensor:
        """F of rows [u_old | u_new | z]."""
        n = self.width
        return self.function(x[:, :n], x[:, n : 2 * n], x[:, 2 * n :], self.steps.with_parameters(p))


def _entries(function: Callable[[Tensor], Tensor], x: Tensor) -> sp.csr_matrix | None:
    """Where the derivative of a function of rows is not zero at one of the rows x, (entries of f, of x); None where it
    is not finite, or rows have too many."""

    def product(directions: Tensor) -> Tensor:
        return columns(lambda d: jvp(function, (x,), (d.expand(x.shape),)), directions)

    width = x.shape[1]
    if width > DENSE_COLUMNS:
        return sparse_pattern(product, len(x), (function(x).shape[1], width))
    found = [product(part) for part in torch.eye(width, dtype=torch.float64).split(256)]
    if not all(bool(part.isfinite().all()) for part in found):
        return None
    return sp.csr_matrix(torch.cat([(part != 0).any(1) for part in found]).T.numpy())


def require_layout(constraint: TimeDependentConstraint, grid: TimeGrid) -> None:
    """Refuse a layout of other ranks than share the steps of a grid, or one that is not the same for all steps, for
    states go from rank to rank. Collective."""
    name, layouts = type(constraint).__name__, [x for x in (constraint.layout, constraint.controls) if x is not None]
    if layouts and not _are_same(layouts[0].mpi, grid.space):
        legal = "a layout, or for weak forms a mesh, made with grid.space_comm"
        raise InputError(f"layout of {name}", f"{layouts[0].mpi.size} other ranks", legal)
    if grid.space_ranks == 1:
        return
    own = grid.time.size == 1 or [(each.digest, each.natural.tobytes()) for each in layouts]
    legal = "one cut for all steps; for meshes of DOLFINx partitioner=pdeopt.mesh_partitioner(grid)"
    is_known = grid.time.size == 1 or all((each.natural >= 0).all() for each in layouts)
    if int(grid.mpi.allreduce(int(own != grid.time.bcast(own)))):
        raise InputError(f"layout of {name}", "unknowns cut otherwise on ranks with other steps", legal)
    if int(grid.mpi.allreduce(int(not is_known))):
        got = "elements with unknowns at one place, which several groups of ranks cannot compare"
        raise InputError(f"layout of {name}", got, "ranks along space alone")


def _are_same(one: Any, two: Any) -> bool:
    """Whether communicators have the same ranks in the same order; alone, each is itself."""
    if one.size == two.size == 1:
        return True
    return MPI.Comm.Compare(one, two) in (MPI.IDENT, MPI.CONGRUENT)
