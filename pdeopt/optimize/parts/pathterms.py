"""One kind of inequalities c(u_i, z_i, p) <= 0: bounds or a function of a user, and what they add to an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.control.metric import RieszMetric
from pdeopt.control.objective import Objective
from pdeopt.control.objective import Rows as Fields
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import Array, real_array
from pdeopt.core.autodiff import curvature, jvp, vjp
from pdeopt.core.errors import InputError
from pdeopt.space.layouts.layout import Layout
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import Steps


class PathConstraint:
    """c(u, z, steps) <= 0 for a batch of steps, by torch functions.

        speed = PathConstraint(lambda u, z, steps: (u[:, :1].square() + z.square() - 1.0), name="speed")
        result = po.solve(problem, path=speed)

    Args:
        function: (batch, n), (batch, m), steps -> (batch, k) or (batch,), float64; rows do not interact. An entry that
            is -inf where the state is u_0 and the control zero asks for nothing, as
            `torch.where(steps.t_new[:, None] > 1.0, u - 0.5, -torch.inf)` at early steps.
        weight: of the k entries in the integral over space, positive; default the lumped mass of the state where there
            is an entry for each of its unknowns, else 1.
        name: in results and messages.

    Raises:
        InputError: no function.
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Steps], Tensor], weight: Any = None, name: str = "path"):
        if not callable(function):
            raise InputError(name, type(function).__name__, "a function c(u, z, steps) -> (batch, k), c <= 0")
        self.function, self.weight, self.name = function, weight, name

    def __call__(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """c, (batch, k)."""
        c = self.function(u, z, steps)
        return c[:, None] if c.ndim == 1 else c


class Group(ABC):
    """One kind of inequalities c <= 0, k entries a step, with first derivatives.

    Attributes:
        name: in results and messages.
        size: k.
        weight: w, (n_local, k).
        sparsity: of c' over [u | z], for all steps, (k, n + m).
        layout: of the entries over the ranks of a step; None where a rank has all.
    """

    name: str
    size: int
    weight: Tensor
    sparsity: Sparsity
    layout: Layout | None = None

    @property
    def whole_size(self) -> int:
        """Entries a step of all ranks."""
        return self.size if self.layout is None else self.layout.size

    @property
    def numbers(self) -> Array:
        """Natural numbers of the entries of this rank, (k,)."""
        return np.arange(self.size) if self.layout is None else self.layout.natural

    @abstractmethod
    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """c, (batch, k)."""

    @abstractmethod
    def jvp(self, point: tuple[Tensor, Tensor, Steps], du: Tensor, dz: Tensor, dp: Tensor) -> Tensor:
        """c' times a direction, (batch, k)."""

    @abstractmethod
    def vjp(self, point: tuple[Tensor, Tensor, Steps], w: Tensor) -> Fields:
        """c'w by rows (batch, n), (batch, m), and (param_dim,) summed over the batch."""

    def curvature(self, point: tuple[Tensor, Tensor, Steps], w: Tensor, du: Tensor, dz: Tensor, dp: Tensor) -> Fields:
        """The Hessian of w.c times a direction; zero where c is linear."""
        return torch.zeros_like(du), torch.zeros_like(dz), torch.zeros_like(dp)

    @abstractmethod
    def scale(self, c: Tensor) -> Tensor:
        """The size of what is bounded, (k,) or a scalar; c as it is at the start."""


class BoundGroup(Group):
    """sign (x - limit) <= 0 for the state or the control of each step.

    Args:
        problem: whose steps these are.
        name: of the bound.
        field: 0 for u, 1 for z.
        limit: (n_local, size), infinite where there is none.
        other: of the opposite bound.
    """

    def __init__(self, problem: ControlProblem, name: str, field: int, limit: Tensor, other: Tensor) -> None:
        metric = RieszMetric(problem)
        self.name, self.field, self.limit, self.begin = name, field, limit, problem.grid.begin
        self.sign, self.size = 1.0 if name.endswith("upper") else -1.0, limit.shape[1]
        self.layout = (problem.constraint.layout, problem.constraint.controls)[field]
        self.weight = (metric.state, metric.control)[field].row_sums().expand_as(limit)
        blocks = [sp.csr_matrix((self.size, width)) for width in (problem.n, problem.m)]
        blocks[field] = sp.eye(self.size)
        self.sparsity = Sparsity(sp.hstack(blocks))
        gap, largest = (other - limit).abs(), problem.grid.max(torch.where(limit.isinf(), 0.0, limit).abs().max())
        self._scale = torch.where(gap.isfinite() & (gap > 0), gap, largest if largest > 0 else 1.0)

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return self.sign * ((u, z)[self.field] - self.limit[steps.index - self.begin - 1])

    def jvp(self, point: tuple[Tensor, Tensor, Steps], du: Tensor, dz: Tensor, dp: Tensor) -> Tensor:
        return self.sign * (du, dz)[self.field]

    def vjp(self, point: tuple[Tensor, Tensor, Steps], w: Tensor) -> Fields:
        out = [torch.zeros_like(point[0]), torch.zeros_like(point[1]), torch.zeros_like(point[2].p)]
        out[self.field] = self.sign * w
        return out[0], out[1], out[2]

    def blocks(self, sigma: Tensor, u: Tensor, z: Tensor) -> tuple[InnerProduct, InnerProduct]:
        """c' diag(sigma) c' as forms of states and of controls of a batch of steps, by (batch, k)."""
        own = InnerProduct.from_values(Sparsity(sp.eye(self.size)), sigma)
        other = InnerProduct.zero((z, u)[self.field].shape[1], len(sigma))
        return (own, other) if self.field == 0 else (other, own)

    def scale(self, c: Tensor) -> Tensor:
        return self._scale


class PathGroup(Group):
    """A `PathConstraint` at the steps of a problem, differentiated automatically.

    Args:
        problem: whose steps these are.
        path: the function.

    Raises:
        InputError: what it returns has no rows of float64 for the steps, or NaN; or weights that are not positive.
    """

    def __init__(self, problem: ControlProblem, path: PathConstraint) -> None:
        self.path, self.name, steps = path, path.name, problem.grid.steps
        steps = steps.with_parameters(torch.zeros(problem.param_dim, dtype=torch.float64))
        u = problem.initial_state(steps.p).expand(len(steps), -1)
        z = torch.zeros(len(steps), problem.m, dtype=torch.float64)
        c = path.function(u, z, steps)
        legal = f"a tensor of shape ({len(steps)}, k) and type float64, without NaN, by torch functions"
        if not isinstance(c, Tensor) or c.dtype != torch.float64 or c.ndim not in (1, 2) or len(c) != len(steps):
            got = f"shape {tuple(c.shape)}, {c.dtype}" if isinstance(c, Tensor) else type(c).__name__
            raise InputError(f"{self.name}(u, z, steps)", got, legal)
        if problem.grid.max(c.isnan().any().double()) > 0:
            raise InputError(f"{self.name}(u, z, steps)", "NaN where the state is u_0 and the control zero", legal)
        self.size = 1 if c.ndim == 1 else c.shape[1]
        self.weight = self._weight(problem, path.weight)
        self.sparsity = self._sparsity(problem, steps)

    def _weight(self, problem: ControlProblem, given: Any) -> Tensor:
        if given is None and self.size == problem.n:
            return RieszMetric(problem).state.row_sums().expand(problem.grid.n_local, -1)
        space = np.broadcast_to(real_array(1.0 if given is None else given, f"weight of {self.name}"), (self.size,))
        if not (space > 0).all() or not np.isfinite(space).all():
            raise InputError(f"weight of {self.name}", space.tolist(), "positive numbers")
        return problem.grid.steps.dt[:, None] * torch.from_numpy(space.copy())

    def _sparsity(self, problem: ControlProblem, steps: Steps) -> Sparsity:
        """Entries of c' that are not zero at a random point of some step. Collective."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(len(steps), problem.n + problem.m, generator=generator, dtype=torch.float64)
        point = x[:, : problem.n], x[:, problem.n :], steps
        entries = []
        for unit in torch.eye(self.size, dtype=torch.float64):
            g_u, g_z, _ = self.vjp(point, unit.expand(len(steps), -1))
            entries.append((torch.cat([g_u, g_z], dim=1) != 0).any(0))
        return Sparsity((problem.grid.sum(torch.stack(entries).double()) > 0).numpy())

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return self.path(u, z, steps)

    def _at(self, steps: Steps) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda u, z, p: self.path(u, z, steps.with_parameters(p))

    def jvp(self, point: tuple[Tensor, Tensor, Steps], du: Tensor, dz: Tensor, dp: Tensor) -> Tensor:
        u, z, steps = point
        return jvp(self._at(steps), (u, z, steps.p), (du, dz, dp))

    def vjp(self, point: tuple[Tensor, Tensor, Steps], w: Tensor) -> Fields:
        u, z, steps = point
        g_u, g_z, g_p = vjp(self._at(steps), (u, z, steps.p), w)
        return g_u, g_z, g_p

    def curvature(self, point: tuple[Tensor, Tensor, Steps], w: Tensor, du: Tensor, dz: Tensor, dp: Tensor) -> Fields:
        u, z, steps = point
        h_u, h_z, h_p = curvature(self._at(steps), (u, z, steps.p), w)(du, dz, dp)
        return h_u, h_z, h_p

    def scale(self, c: Tensor) -> Tensor:
        size = c[c.isfinite()].abs()
        return torch.tensor(float(size.mean()) if len(size) and size.mean() > 0 else 1.0, dtype=torch.float64)


class InequalityTerm(Objective):
    """The Hessian c' diag(sigma) c' + nu.c'' of one group, as a term of the objective: KKT solvers need no more.

    Args:
        group: c.
        begin: 0-based number of the first step of this rank.
        sigma: (n_local, k).
        weight: w nu, (n_local, k); None leaves c'' out.
    """

    def __init__(self, group: Group, begin: int, sigma: Tensor, weight: Tensor | None) -> None:
        self.group, self.begin, self.sigma, self.weight = group, begin, sigma, weight
        self.has_blocks = self.adds_up = isinstance(group, BoundGroup)

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """Zero: a quadratic model has its value at its own point."""
        return torch.zeros(len(steps), dtype=torch.float64)

    def hvp(self, u: Tensor, z: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor) -> Fields:
        rows, point = steps.index - self.begin - 1, (u, z, steps)
        h = self.group.vjp(point, self.sigma[rows] * self.group.jvp(point, du, dz, dp))
        if self.weight is None:
            return h
        bent = self.group.curvature(point, self.weight[rows], du, dz, dp)
        return h[0] + bent[0], h[1] + bent[1], h[2] + bent[2]

    def hessian_sparsity(self, n: int, m: int, steps: Steps) -> Sparsity:
        return Sparsity(self.group.sparsity.csr.T @ self.group.sparsity.csr)

    def hessian_blocks(self, u: Tensor, z: Tensor, steps: Steps) -> tuple[InnerProduct, InnerProduct]:
        if not isinstance(self.group, BoundGroup):
            return super().hessian_blocks(u, z, steps)
        return self.group.blocks(self.sigma[steps.index - self.begin - 1], u, z)


class Excess(Objective):
    """gamma/2 sum w max(c + a, 0)^2 of one group, the Moreau-Yosida penalty of c <= 0.

    gamma max(c + a, 0) are its multipliers.
    Its Hessian is that of the entries with c + a > 0, a derivative in the sense of semismooth Newton's method.
    (M. Hintermueller, K. Kunisch, Feasible and noninterior path-following in constrained minimization with low
    multiplier regularity, SIAM J. Control Optim. 45, 2006.)

    Args:
        group: c.
        begin: 0-based number of the first step of this rank.
        weight: gamma w, zero for entries that ask for nothing, (n_local, k).
        ahead: a, a multiplier that is known over gamma, (n_local, k); None for zero.
    """

    def __init__(self, group: Group, begin: int, weight: Tensor, ahead: Tensor | None = None) -> None:
        self.group, self.begin, self.weight = group, begin, weight
        self.is_convex = self.has_blocks = self.adds_up = isinstance(group, BoundGroup)
        self.ahead = torch.zeros_like(weight) if ahead is None else ahead

    def _excess(self, u: Tensor, z: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
        """max(c + a, 0), and its weights, for the steps of this rank; the initial node has none."""
        rows = steps.index - self.begin - 1
        weight = torch.where(steps.index[:, None] > 0, self.weight[rows], 0.0)
        return torch.relu(self.group.value(u, z, steps) + self.ahead[rows]), weight

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        excess, weight = self._excess(u, z, steps)
        return 0.5 * (weight * excess.square()).sum(1)

    def gradient(self, u: Tensor, z: Tensor, steps: Steps) -> Fields:
        excess, weight = self._excess(u, z, steps)
        return self.group.vjp((u, z, steps), weight * excess)

    def hvp(self, u: Tensor, z: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor) -> Fields:
        (excess, weight), point = self._excess(u, z, steps), (u, z, steps)
        square = self.group.vjp(point, weight * (excess > 0) * self.group.jvp(point, du, dz, dp))
        bent = self.group.curvature(point, weight * excess, du, dz, dp)
        return square[0] + bent[0], square[1] + bent[1], square[2] + bent[2]

    def hessian_sparsity(self, n: int, m: int, steps: Steps) -> Sparsity:
        return Sparsity(self.group.sparsity.csr.T @ self.group.sparsity.csr)

    def hessian_blocks(self, u: Tensor, z: Tensor, steps: Steps) -> tuple[InnerProduct, InnerProduct]:
        if not isinstance(self.group, BoundGroup):
            return super().hessian_blocks(u, z, steps)
        excess, weight = self._excess(u, z, steps)
        return self.group.blocks(weight * (excess > 0), u, z)
