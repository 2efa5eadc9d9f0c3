"""Objectives J = sum_{i=0}^N J_i(u_i, z_i; p), written for a batch of steps.

The initial node is a step of length 0 with a zero control, so that one function gives every J_i.
`Objective` derives gradient and Hessian products from `value`; the quadratic terms state theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.core.arrays import Array, real_number
from pdeopt.core.autodiff import columns, curvature, vjp
from pdeopt.core.errors import InputError
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.observation import Measurements, Observation, SeenForm
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import Sparsity, at_columns
from pdeopt.steps.timegrid import Steps, TimeGrid

Rows = tuple[Tensor, Tensor, Tensor]  # (batch, n) for u, (batch, m) for z, (param_dim,) for p
#: A `StepMatrix`, a scipy or dense matrix, or None for the identity.
Mass = Any
Target = Tensor | Array | Callable[[Tensor], Any]


class Objective(ABC):
    """J = sum_{i=0}^N J_i(u_i, z_i; p): a sum of functions of one step's state and control, and of `steps.p`.

    A subclass writes `value`, by torch functions; gradient and Hessian products are derived from it. Objectives are
    added with +. Terms carry their weight in time themselves: `steps.weight` of the trapezoidal rule for a function of
    the state at t_i, `steps.dt` for one of the control on step i. The node t_0 comes as a step of length 0, number 0,
    with a zero control. No method talks to other ranks, and rows do not interact.

    Example:
        >>> class Kinetic(Objective):
        ...     def value(self, u, z, steps):
        ...         return 0.5 * steps.weight * u.square().sum(1)
        ...
        >>> objective = Kinetic() + ControlCost(1e-2)

    Attributes:
        is_convex: whether it is known to be convex in states and controls; a subclass may say so.
        is_quadratic: whether the Hessian is known to be that of `hessian_blocks`, the same at all points. A class that
            derives from one of these and overrides `value` or `hvp` says so anew.
        has_blocks: whether the Hessian is known to be that of `hessian_blocks`, another one at each point.
        adds_up: whether values that ranks find for their own unknowns of a step add up to that of all of them.
    """

    is_convex: bool = False
    is_quadratic: bool = False
    has_blocks: bool = False
    adds_up: bool = False

    def __init_subclass__(cls) -> None:
        if {"value", "hvp"} & vars(cls).keys() and "is_quadratic" not in vars(cls):
            cls.is_quadratic = False

    @abstractmethod
    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """J_i(u_i, z_i; p) for a batch of steps.

        Args:
            u: states at the ends of the steps, (batch, n), float64.
            z: controls, (batch, m).
            steps: numbers, times, weights and lengths of the steps, (batch,) each, and the global parameters p.

        Returns:
            (batch,), float64. It may be infinite or NaN: solvers back away from such points.
        """

    def gradient(self, u: Tensor, z: Tensor, steps: Steps) -> Rows:
        """dJ_i/du_i and dJ_i/dz_i by rows, and dJ/dp summed over the batch.

        Args:
            u, z, steps: as in `value`.

        Returns:
            (batch, n), (batch, m), (param_dim,).
        """

        def value(u: Tensor, z: Tensor, p: Tensor) -> Tensor:
            return self.value(u, z, steps.with_parameters(p))

        du, dz, dp = vjp(value, (u, z, steps.p), torch.ones(len(steps), dtype=u.dtype))
        return du, dz, dp

    def hvp(self, u: Tensor, z: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor) -> Rows:
        """The Hessian times a direction, in the shapes of `gradient`.

        Args:
            u, z, steps: as in `value`.
            du, dz, dp: the direction, (batch, n), (batch, m), (param_dim,).
        """

        def value(u: Tensor, z: Tensor, p: Tensor) -> Tensor:
            return self.value(u, z, steps.with_parameters(p))

        hu, hz, hp = curvature(value, (u, z, steps.p), torch.ones(len(steps), dtype=u.dtype))(du, dz, dp)
        return hu, hz, hp

    def hessian_sparsity(self, n: int, m: int, steps: Steps) -> Sparsity:
        """Sparsity of a step's Hessian over [u | z], by differentiating at random points.

        Args:
            n, m: unknowns of a state, controls of a step.
            steps: samples, at least the first, a middle and the last step.

        Returns:
            An (n + m, n + m) pattern that covers the Hessian of every step.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(len(steps), n + m, generator=generator, dtype=torch.float64)
        u, z, zero_p = x[:, :n], x[:, n:], torch.zeros_like(steps.p)

        def product(d: Tensor) -> Tensor:
            d = d.expand_as(x)
            return torch.cat(self.hvp(u, z, steps, d[:, :n], d[:, n:], zero_p)[:2], dim=1)

        products = columns(product, torch.eye(n + m, dtype=x.dtype), chunk_size=256)
        return Sparsity((products != 0).any(1).numpy())

    def hessian_blocks(self, u: Tensor, z: Tensor, steps: Steps) -> tuple[InnerProduct, InnerProduct]:
        """The state and the control block of each step's Hessian, by colored products.

        What couples states to controls is left out; preconditioners need no more.

        Args:
            u, z, steps: as in `value`.

        Returns:
            Forms of (batch, n) and of (batch, m).
        """
        n, m = u.shape[1], z.shape[1]
        pattern = self.hessian_sparsity(n, m, steps)
        no_p = torch.zeros_like(steps.p)

        def product(d: Tensor) -> Tensor:
            d = d.expand(len(steps), -1)
            return torch.cat(self.hvp(u, z, steps, d[:, :n], d[:, n:], no_p)[:2], dim=1)

        values, _ = pattern.fill(product)
        row, col = torch.from_numpy(pattern.rows), torch.from_numpy(pattern.cols)
        state, control = (row < n) & (col < n), (row >= n) & (col >= n)
        blocks = pattern.csr[:n, :n], pattern.csr[n:, n:]
        return (
            InnerProduct.from_values(Sparsity(blocks[0]), values[:, state]),
            InnerProduct.from_values(Sparsity(blocks[1]), values[:, control]),
        )

    def check(self, n: int, m: int, grid: TimeGrid) -> None:  # noqa: B027 (most terms have nothing to check)
        """Raise `InputError` where this does not fit a problem; a term without arrays of its own has nothing to check.

        Args:
            n, m: unknowns of a state, controls of a step.
            grid: the time steps.
        """

    def __add__(self, other: Objective) -> Objective:
        return Sum(self, other) if isinstance(other, Objective) else NotImplemented

    def __radd__(self, other: object) -> Objective:
        """So that the built-in sum(), which starts from 0, adds objectives."""
        return self if other == 0 else NotImplemented


class Sum(Objective):
    """The sum of objectives.

    Args:
        *terms: the objectives; sums among them are taken apart.
    """

    def __init__(self, *terms: Objective) -> None:
        self.terms: list[Objective] = []
        for term in terms:
            self.terms += term.terms if isinstance(term, Sum) else [term]
        self.is_convex = all(term.is_convex for term in self.terms)
        self.is_quadratic = all(term.is_quadratic for term in self.terms)
        self.has_blocks = all(term.is_quadratic or term.has_blocks for term in self.terms)
        self.adds_up = all(term.adds_up for term in self.terms)
        self._last: tuple[Tensor, tuple[InnerProduct, InnerProduct]] | None = None  # blocks of these steps

    def check(self, n: int, m: int, grid: TimeGrid) -> None:
        for term in self.terms:
            term.check(n, m, grid)

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return torch.stack([term.value(u, z, steps) for term in self.terms]).sum(0)

    def gradient(self, u: Tensor, z: Tensor, steps: Steps) -> Rows:
        return _add(term.gradient(u, z, steps) for term in self.terms)

    def hvp(self, u: Tensor, z: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor) -> Rows:
        return _add(term.hvp(u, z, steps, du, dz, dp) for term in self.terms)

    def hessian_blocks(self, u: Tensor, z: Tensor, steps: Steps) -> tuple[InnerProduct, InnerProduct]:
        if self.is_quadratic and self._last is not None and self._last[0] is steps.index:
            return self._last[1]
        states, controls = zip(*(term.hessian_blocks(u, z, steps) for term in self.terms))
        found = sum(states[1:], states[0]), sum(controls[1:], controls[0])
        self._last = steps.index, found
        return found

    def hessian_sparsity(self, n: int, m: int, steps: Steps) -> Sparsity:
        total = Sparsity.empty(n + m, n + m)
        for term in self.terms:
            total = total | term.hessian_sparsity(n, m, steps)
        return total


def _add(parts: Iterable[Rows]) -> Rows:
    u, z, p = (reduce(torch.add, part) for part in zip(*parts))
    return u, z, p


class Tracking(Objective):
    """sum_i w_i/2 |B u_i - d_i|_M^2 over the nodes t_i of the grid, or over those where there are measurements.

    Args:
        target: d for all nodes 0..N, shape (N + 1, k); or for all times alike, shape (k,); or a function of the times,
            (batch,) -> (batch, k), which also serves coarser grids. Masked entries (of numpy.ma) were not measured:
            they and their rows and columns of M are left out. A tensor that requires gradients is not copied: it is a
            parameter of `Sensitivity`.
        mass: M, (k, k), sparse or dense, symmetric positive semidefinite; None for the identity.
        observe: B: the numbers of the k components of u that are tracked, a mask or a slice of them, or a matrix
            (k, n), sparse or dense, a row a sensor; None for all components, k = n.
        times: nodes of the grid, in any order, at which there are measurements; the target then has a row for each of
            them, or one for all. None for all nodes.
        weight: w_i: a number, or one for each row of the target; None for the trapezoidal weights of the grid, by
            which the sum is an integral. Least squares of measurements that count alike have weight 1.

    Raises:
        InputError: shapes that do not belong together; no finite real numbers; a mass that is no form; components or
            times that there are not. What depends on the problem is checked when that is made, and a function when it
            is evaluated.

    Example:
        >>> B = sp.csr_matrix(([0.3, 0.7], ([0, 0], [4, 5])), shape=(1, n))     # one sensor between two nodes
        >>> misfit = Tracking(np.ma.masked_invalid(data), observe=B, times=[0.1, 0.2, 0.5], weight=1.0)
    """

    is_convex = is_quadratic = adds_up = True

    def __init__(
        self, target: Target, mass: Mass = None, observe: Any = None, times: Any = None, weight: Any = None
    ) -> None:
        self.measurements = Measurements(target, times, weight)
        self._observation = None if observe is None else Observation(observe)
        self.mass = None if mass is None else StepMatrix.form(mass, None, "mass of Tracking", semidefinite=True)
        self._forms: dict[int, SeenForm] = {}

    @property
    def target(self) -> Tensor | Callable[[Tensor], Any]:
        """d, with zeros where nothing was measured, or the function."""
        return self.measurements.target

    @property
    def observe(self) -> Tensor | slice | StepMatrix | None:
        """The numbers of components that are tracked, the slice of them, or B; None for all components."""
        return None if self._observation is None else self._observation.given

    def check(self, n: int, m: int, grid: TimeGrid) -> None:
        if self._observation is not None:
            self._observation.check(n)
        if self._observation is not None and self.mass is not None and self.mass.sparsity.columns is not None:
            got = "a mass whose rows are spread over ranks, with observe"
            raise InputError("mass of Tracking", got, "observe=None, or a mass of own numbers")
        k = n if self._observation is None else self._observation.matrix(n).shape[0]
        StepMatrix.form(self.mass, k, "mass of Tracking", semidefinite=True)
        self.measurements.check(grid.times, k)

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        e, _ = self._error(u, steps)
        return 0.5 * self.measurements.weight(steps) * (e * self._mass(e)).sum(-1)

    def gradient(self, u: Tensor, z: Tensor, steps: Steps) -> Rows:
        return self._back(*self._error(u, steps), u.shape[-1], steps), torch.zeros_like(z), torch.zeros_like(steps.p)

    def hvp(self, u: Tensor, z: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor) -> Rows:
        seen = self._seen(du)
        kept = self.measurements.kept_at(steps, seen.shape[-1])
        seen = seen if kept is None else kept * seen
        return self._back(seen, kept, du.shape[-1], steps), torch.zeros_like(dz), torch.zeros_like(dp)

    def hessian_sparsity(self, n: int, m: int, steps: Steps) -> Sparsity:
        return Sparsity(sp.block_diag([self._form(n).sparsity.csr, sp.csr_matrix((m, m))]))

    def hessian_blocks(self, u: Tensor, z: Tensor, steps: Steps) -> tuple[InnerProduct, InnerProduct]:
        weight, none = self.measurements.weight(steps), InnerProduct.zero(z.shape[1], len(steps))
        kept = self.measurements.kept_at(steps, self._seen(u).shape[1])
        if self._observation is not None:
            return InnerProduct(weight, self._form(u.shape[1])(kept)), none
        matrix = StepMatrix.form(self.mass, u.shape[1], "mass of Tracking", semidefinite=True)
        if kept is not None:
            pattern = matrix.sparsity
            matrix = StepMatrix(pattern, kept[:, pattern.rows] * at_columns(pattern, kept) * matrix.values)
        return InnerProduct(weight, matrix), none

    def _form(self, n: int) -> SeenForm:
        """The form of a step over all n unknowns, with zeros at those not observed."""
        if n not in self._forms:
            B = sp.eye(n, format="csr") if self._observation is None else self._observation.matrix(n)
            mass = StepMatrix.form(self.mass, B.shape[0], "mass of Tracking", semidefinite=True)
            self._forms[n] = SeenForm(B, mass)
        return self._forms[n]

    def _seen(self, u: Tensor) -> Tensor:
        return u if self._observation is None else self._observation(u)

    def _mass(self, e: Tensor) -> Tensor:
        return e if self.mass is None else self.mass(e)

    def _error(self, u: Tensor, steps: Steps) -> tuple[Tensor, Tensor | None]:
        """B u - d where there are measurements, 0 elsewhere; and 1 where there are, None for ones."""
        u = self._seen(u)
        target, kept = self.measurements(steps, u.shape[-1])
        return u - target if kept is None else kept * (u - target), kept

    def _back(self, e: Tensor, kept: Tensor | None, n: int, steps: Steps) -> Tensor:
        """w B' P M e, (batch, n), where P is zero at what was not measured."""
        e = self.measurements.weight(steps)[:, None] * self._mass(e)
        e = e if kept is None else kept * e
        return e if self._observation is None else self._observation.transpose(e, n)


class ControlCost(Objective):
    """sum_k dt_k alpha/2 |z_k|_Q^2: the price of control, constant on each step.

    Args:
        control_weight: alpha > 0; a tensor that requires gradients is a parameter of `Sensitivity`.
        mass: Q, (m, m), sparse or dense, symmetric positive definite; None for the identity.

    Raises:
        InputError: a weight that is not a finite number > 0; a mass that is no form.
    """

    is_convex = is_quadratic = adds_up = True

    def __init__(self, control_weight: float | Tensor, mass: Mass = None) -> None:
        self.control_weight = real_number(control_weight, "control_weight", "a finite number > 0", above=0.0)
        self._price = control_weight if isinstance(control_weight, Tensor) else self.control_weight
        self.mass = None if mass is None else StepMatrix.form(mass, None, "mass of ControlCost")

    def check(self, n: int, m: int, grid: TimeGrid) -> None:
        StepMatrix.form(self.mass, m, "mass of ControlCost")

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return 0.5 * self._price * steps.dt * (z * self._mass(z)).sum(-1)

    def gradient(self, u: Tensor, z: Tensor, steps: Steps) -> Rows:
        return (torch.zeros_like(u), self.control_weight * steps.dt[:, None] * self._mass(z), torch.zeros_like(steps.p))

    def hvp(self, u: Tensor, z: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor) -> Rows:
        return (torch.zeros_like(du), self.control_weight * steps.dt[:, None] * self._mass(dz), torch.zeros_like(dp))

    def hessian_blocks(self, u: Tensor, z: Tensor, steps: Steps) -> tuple[InnerProduct, InnerProduct]:
        mass = StepMatrix.form(self.mass, z.shape[1], "mass of ControlCost")
        return InnerProduct.zero(u.shape[1], len(steps)), InnerProduct(self.control_weight * steps.dt, mass)

    def hessian_sparsity(self, n: int, m: int, steps: Steps) -> Sparsity:
        mass = sp.eye(m) if self.mass is None else self.mass.sparsity.csr
        return Sparsity(sp.block_diag([sp.csr_matrix((n, n)), mass]))

    def _mass(self, z: Tensor) -> Tensor:
        return z if self.mass is None else self.mass(z)


class TerminalLoss(Objective):
    """l(u_N, p): a loss on the last state and the global parameters.

    Args:
        loss: function of u_N, shape (n,), and p, shape (param_dim,), to a scalar, by torch functions.
            One that ignores u_N is a cost of the parameters alone.

    Raises:
        InputError: no function; when it is evaluated, no number of torch.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        if not callable(loss):
            raise InputError("loss", type(loss).__name__, "a function of u_N and p")
        self.loss = loss

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        values = u.new_zeros(len(steps))
        if not steps.has_last:
            return values
        found = self.loss(u[-1], steps.p)
        if not isinstance(found, Tensor) or found.numel() != 1 or found.is_complex():
            got = f"shape {tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise InputError("loss(u_N, p)", got, "a real number, by torch functions, which can be differentiated")
        return torch.cat([values[:-1], found.reshape(1)])
