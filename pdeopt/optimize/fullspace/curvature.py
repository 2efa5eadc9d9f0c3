"""Whether a stationary point is a minimum: does the Lagrangian curve down along a direction that keeps the equations?

The curvature there is that of the reduced Hessian Z'L''Z, Z a basis of the kernel of F'. Where the KKT matrix of
Newton's method was factored, its inertia tells (`KKTSolver.descents`). Elsewhere a few steps of Lanczos' method do:
they find a direction of negative curvature unless it is nearly orthogonal to a random start, or flat beside the others.
A convex objective with linear equations needs no test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import reduced_hessian
from pdeopt.control.verify import randomize
from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import SolveFailure
from pdeopt.core.ranks import freed
from pdeopt.steps.timegrid import TimeGrid

#: Hessian products, a sweep forward and one backward in time each, and the part of an eigenvalue that is rounding.
PRODUCTS, ROUNDING = 12, 1e-10

#: What a solver says that ends at such a point.
NO_MINIMUM = (
    "a stationary point, but no minimum: J curves down from it; start elsewhere, or let -sqp_type auto find a way down"
)

#: Products where factors have told that there is such a direction.
PRODUCTS_FOR_WAY = 40

#: The relative change of the curvature at which such a direction has settled.
SETTLED = 1e-3

#: Steps off a saddle, each a quarter of the last one, and the part of the model's decrease that one must reach.
TRIALS, DECREASE = 12, 1e-2


def curves_down(
    metric: RieszMetric, lin: Linearization, lam: PETSc.Vec, fixed: Tensor | None = None, products: int = PRODUCTS
) -> bool:
    """Whether Lanczos' method finds a negative eigenvalue of the reduced Hessian at a feasible point. Collective.

    See `way_down`.
    """
    return way_down(metric, lin, lam, fixed, products) is not None


def off_saddle(metric: RieszMetric, x: PETSc.Vec, lin: Linearization, lam: PETSc.Vec) -> PETSc.Vec | None:
    """A point with J below that of a stationary one: along a direction in which J curves down, with its state.

    The first length is where the quadratic model has lost |J|. Collective.

    Args:
        metric, lin, lam: see `way_down`.
        x: the point itself.

    Returns:
        a new vector; None where no direction is found, or J does not fall along it.
    """
    problem = metric.problem
    found = way_down(metric, lin, lam, products=PRODUCTS_FOR_WAY, settle=SETTLED)
    if found is None:
        return None
    direction, curvature = found
    start, size = copy(problem.split(x)[1]), math.sqrt(2.0 * max(abs(lin.value), 1e-8) / -curvature)
    for _ in range(TRIALS):
        for sign in (1.0, -1.0):
            design = problem.create_design()
            assign(design, start + sign * size * direction)
            with suppress(SolveFailure):
                point = problem.join(problem.solve_state(design), design)
                if problem.at(point).value < lin.value + 0.5 * DECREASE * curvature * size**2:
                    return point
        size *= 0.25
    return None


def way_down(
    metric: RieszMetric,
    lin: Linearization,
    lam: PETSc.Vec,
    fixed: Tensor | None = None,
    products: int = PRODUCTS,
    settle: float = math.inf,
) -> tuple[Tensor, float] | None:
    """A direction of the design along which J curves down, and its curvature, by Lanczos' method. Collective.

    Args:
        metric: scales the design variables.
        lin, lam: a feasible point and its multiplier.
        fixed: design variables of this rank that stay where they are, booleans, (design_size,); None for none.
        products: the most products with the Hessian.
        settle: see `negative_eigenvector`.

    Returns:
        the direction of this rank, (design_size,), whose length times `metric.root()` is one; None where none is
        found, or the state Jacobian is singular.
    """
    if products <= 0 or (metric.problem.objective.is_convex and not _has_curvature(lin, lam)):
        return None
    problem, D, rows = metric.problem, copy(metric.root()), metric.problem.layout.rows(lam)
    free = torch.ones_like(D) if fixed is None else (~fixed).double()

    def product(y: Tensor) -> Tensor:
        return free * reduced_hessian(problem, lin, rows, free * y / D) / D

    start = free * _scattered(problem)
    with suppress(SolveFailure):
        if (found := negative_eigenvector(product, start, problem.grid, products, settle)) is not None:
            return found[0] / D, found[1]
    return None


def _scattered(problem: ControlProblem) -> Tensor:
    """A design without a pattern, the same on any number of ranks, (design_size,): 1/2 - k^2 phi mod 1. Collective."""
    before = problem.grid.mpi.exscan(problem.layout.control_size) or 0
    k = torch.cat([before + torch.arange(problem.layout.control_size), -1 - torch.arange(problem.layout.param_size)])
    return 0.5 - (k.remainder(1_000_003).double() ** 2 * 0.5 * (1 + math.sqrt(5))).remainder(1.0)


def is_linear_quadratic(lin: Linearization) -> bool:
    """Whether F looks affine here and J is known to be quadratic, so that one KKT system is the whole problem.

    The curvature of lam.F is looked at here alone, for a random multiplier. Collective.
    """
    return lin.objective.is_quadratic and not _has_curvature(lin, randomize(lin.layout.create_multiplier(), 1))


def _has_curvature(lin: Linearization, lam: PETSc.Vec) -> bool:
    """Whether the Hessian of lam.F is not zero: a product with a random vector sees it. Collective."""
    x = randomize(lin.layout.create_primal(), 0)
    own, both = x.duplicate(), x.duplicate()
    with freed(x, own, both):
        size = lin.hvp(None, x, own).norm()
        own.axpy(-1.0, lin.hvp(lam, x, both))
        return bool(own.norm() > ROUNDING**2 * size)


def negative_eigenvector(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    grid: TimeGrid,
    products: int = PRODUCTS,
    settle: float = math.inf,
) -> tuple[Tensor, float] | None:
    """A direction in which a symmetric operator is negative, if Lanczos' method sees one. Collective.

    Args:
        product: the operator on the entries of this rank.
        start: where its Krylov space begins, (size,).
        grid: of the ranks.
        products: the most products.
        settle: the relative change of the value by the last product at which the direction is good enough; by default
            the first negative value serves.

    Returns:
        a Ritz vector of length one, (size,), that does not point away from the start, and its negative value.
    """
    w, basis, rows, largest, before = start, list[Tensor](), list[Tensor](), 0.0, 0.0
    found: tuple[Tensor, float] | None = None
    while len(basis) < products and (size := math.sqrt(grid.sum(w @ w))) > 1e-12 * largest:
        basis.append(w / size)
        w, Q = product(basis[-1]), torch.stack(basis)
        rows.append(grid.sum(Q @ w))
        for _ in range(2):  # once leaves rounding behind
            w = w - grid.sum(Q @ w) @ Q
        T = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for k, row in enumerate(rows):
            T[k, : k + 1] = T[: k + 1, k] = row
        eigenvalues, vectors = torch.linalg.eigh(T)
        largest, least = float(eigenvalues.abs().max()), float(eigenvalues[0])
        if least < -ROUNDING * largest:
            y = vectors[:, 0] * torch.sign(vectors[0, 0])  # LAPACK may have either
            found = y @ Q, least
            if before - least <= settle * -least:
                break
        before = least
    return found
