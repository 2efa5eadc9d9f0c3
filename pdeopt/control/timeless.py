"""Problems without time, F(u, z; p) = 0: one step that does not look back, whose node alone counts, with weight 1.

So a stationary problem is a `ControlProblem`, and every solver, bound, check and preconditioner serves it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.objective import Mass, Objective
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import Array, real_array
from pdeopt.core.errors import InputError
from pdeopt.steps.sparse import StepPattern
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import Steps, TimeGrid, require_whole_steps

#: A function of u, (batch, n), and z, (batch, m), and where there are parameters of p, (param_dim,).
Pointwise = Callable[..., Tensor]


class SingleNode(TimeGrid):
    """The grid of a problem without time: one step of length 1, to a node of weight 1; u_0 does not count.

    Args:
        comm: a communicator; default PETSc's.
        space_ranks: as many as it has ranks, which share the step; then the constraint is one whose unknowns are
            spread, as `SpreadConstraint`.

    Raises:
        InputError: another number of ranks.

    Example:
        >>> grid = SingleNode(space_ranks=2)
        >>> constraint = SpreadConstraint(StationaryConstraint(residual, n, m, pattern=(A, B)), grid)
    """

    def __init__(self, comm: Any = None, space_ranks: int = 1) -> None:
        size = (PETSc.COMM_WORLD if comm is None else comm).size
        if size != space_ranks:
            got = f"{space_ranks} with {size} ranks, for a problem without time"
            raise InputError("space_ranks", got, f"{size}: all ranks share its one step")
        super().__init__([0.0, 1.0], comm, space_ranks=space_ranks)
        self.node_zero = self._steps(np.array([], dtype=np.int64))

    def _steps(self, index: Array) -> Steps:
        return replace(super()._steps(index), weight=torch.ones(len(index), dtype=torch.float64))

    def coarsen(self, factor: int, counts: Array | None = None) -> TimeGrid | None:
        """Itself: there is no coarser one."""
        return self

    def window(self, begin: int, end: int) -> TimeGrid:
        """Itself: there are no parts."""
        require_whole_steps(self, "windows of a rank alone")
        return self


class StationaryConstraint(TimeDependentConstraint):
    """F(u, z; p) = 0 as a step that does not depend on the state before it.

    Args:
        equation: F, (batch, n), (batch, m), and p where there are parameters, -> (batch, n).
        state_dim, control_dim, param_dim: n, m, and the length of p.
        start, pattern, state_mass, control_mass, param_mass: as of `stationary`.

    Raises:
        InputError: no function; shapes that do not belong together.
    """

    def __init__(
        self,
        equation: Pointwise,
        state_dim: int,
        control_dim: int,
        param_dim: int = 0,
        *,
        start: Any = None,
        pattern: tuple[Any, ...] | None = None,
        state_mass: Mass = None,
        control_mass: Mass = None,
        param_mass: Mass = None,
    ) -> None:
        if not callable(equation):
            raise InputError("residual", type(equation).__name__, "a function of u and z")
        self.equation = equation
        self.state_dim, self.control_dim, self.param_dim = state_dim, control_dim, param_dim
        self.start = torch.zeros(state_dim, dtype=torch.float64) if start is None else torch.from_numpy(_start(start))
        self.state_mass, self.control_mass, self.param_mass = state_mass, control_mass, param_mass
        if pattern is not None:
            self.pattern = _step_pattern(pattern, state_dim, control_dim)

    def initial_state(self, p: Tensor) -> Tensor:
        return self.start

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return self.equation(u_new, z, *_parameters(steps))


class StationaryCost(Objective):
    """J(u, z; p), a user's function.

    Args:
        cost: J, (batch, n), (batch, m), and p where there are parameters, -> (batch,).
    """

    def __init__(self, cost: Pointwise) -> None:
        self.cost = cost

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return self.cost(u, z, *_parameters(steps))


def _parameters(steps: Steps) -> tuple[Tensor, ...]:
    return (steps.p,) if len(steps.p) else ()


def stationary(
    residual: Pointwise,
    objective: Objective | Pointwise,
    state_dim: int,
    control_dim: int,
    *,
    param_dim: int = 0,
    start: Any = None,
    pattern: tuple[Any, ...] | None = None,
    state_mass: Mass = None,
    control_mass: Mass = None,
    param_mass: Mass = None,
    comm: Any = None,
) -> ControlProblem:
    """min J(u, z; p) subject to F(u, z; p) = 0, without time.

    Weights are natural: `Tracking(d, M)` is 1/2 |u - d|_M^2 and `ControlCost(alpha, Q)` is alpha/2 |z|_Q^2. (The same
    equation as one step of a `TimeGrid` would halve the first, as the trapezoidal rule does, and count u_0.)

    Args:
        residual: F(u, z), or F(u, z, p) where there are parameters: (batch, n), (batch, m), (param_dim,) -> (batch, n),
            by torch functions; rows do not interact, and solvers have one. dF/du is regular.
        objective: a sum of `Tracking`, `ControlCost` and others, or a function J(u, z) or J(u, z, p) -> (batch,).
        state_dim, control_dim, param_dim: n, m, and the length of p.
        start: where a solve for the state begins, (n,); default 0.
        pattern: the sparsities of dF/du, (n, n), of dF/dz, (n, m), and, where F is not linear, of the second
            derivatives of lam.F over [u | z], (n + m, n + m), as sparse matrices or `Sparsity`. Default: found, up to
            the unknowns that a `TimeDependentConstraint` finds them for.
        state_mass, control_mass, param_mass: inner products of u, z and p; None for the Euclidean one. Norms of
            residuals are dual to the first, so F is best scaled as an integral, M times the strong form.
        comm: a communicator of one rank; default PETSc's. For several see `SingleNode`.

    Returns:
        A problem for `solve`; `problem.unpack(result)` has the state as (1, n), the flat controls, and p.

    Raises:
        InputError: no functions; shapes that do not belong together; more than one rank.

    Example:
        >>> problem = stationary(lambda u, z: K(u) + u**3 - M(z), Tracking(d, mass) + ControlCost(1e-4, mass), n, n)
        >>> result = solve(problem, lower=-1.0)
    """
    constraint = StationaryConstraint(
        residual,
        state_dim,
        control_dim,
        param_dim,
        start=start,
        pattern=pattern,
        state_mass=state_mass,
        control_mass=control_mass,
        param_mass=param_mass,
    )
    if not isinstance(objective, Objective):
        if not callable(objective):
            raise InputError("objective", type(objective).__name__, "an Objective, or a function of u and z")
        objective = StationaryCost(objective)
    return ControlProblem(constraint, objective, SingleNode(comm))


def _start(start: Any) -> Array:
    return np.array(real_array(start, "start"), dtype=np.float64)


def _step_pattern(parts: tuple[Any, ...], n: int, m: int) -> StepPattern:
    """The pattern of a step that does not see the state before it."""
    if len(parts) not in (2, 3):
        raise InputError("pattern", f"{len(parts)} sparsities", "those of dF/du and dF/dz, and of second derivatives")
    curvature = Sparsity.empty(n + m, n + m) if len(parts) == 2 else parts[2]
    curvature = curvature if isinstance(curvature, Sparsity) else Sparsity(curvature)
    W = sp.block_diag([sp.csr_matrix((n, n)), curvature.csr])
    return StepPattern(parts[0], Sparsity.empty(n, n), parts[1], W)
