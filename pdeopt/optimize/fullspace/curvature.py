"""Whether a stationary point is a minimum: does the Lagrangian curve down along a direction that keeps the equations?

The curvature there is that of the reduced Hessian Z'L''Z, Z a basis of the kernel of F'. Where the KKT matrix of
Newton's method was factored, its inertia tells (`KKTSolver.descents`). Elsewhere a few steps of Lanczos' method do:
they find a direction of negative curvature unless it is nearly orthogonal to a random start, or flat beside the others.
A convex objective with linear equations needs no test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.control.reduced import reduced_hessian
from pdeopt.control.verify import randomize
from pdeopt.core.arrays import copy
from pdeopt.core.errors import SolveFailure
from pdeopt.steps.timegrid import TimeGrid

#: Hessian products, a sweep forward and one backward in time each, and the part of an eigenvalue that is rounding.
PRODUCTS, ROUNDING = 12, 1e-10

#: Products after conjugate gradients, which are Lanczos' method, took so many iterations from the gradient and met no
#: such direction: a few from a random start look where a symmetric gradient does not point.
PRODUCTS_AFTER, ITERATIONS_BEFORE = 4, 8

#: What a solver says that ends at such a point.
NO_MINIMUM = (
    "a stationary point, but no minimum: J curves down from it; start elsewhere (-sqp_type composite follows curvature)"
)


def curves_down(
    metric: RieszMetric, lin: Linearization, lam: PETSc.Vec, fixed: Tensor | None = None, products: int = PRODUCTS
) -> bool:
    """Whether Lanczos' method finds a negative eigenvalue of the reduced Hessian at a feasible point. Collective.

    Args:
        metric: scales the design variables.
        lin, lam: the point and its multiplier.
        fixed: design variables of this rank that stay where they are, booleans, (design_size,); None for none.
        products: the most products with the Hessian.

    Returns:
        False also where the state Jacobian is singular.
    """
    if metric.problem.objective.is_convex and not _has_curvature(lin, lam):
        return False
    problem, D, rows = metric.problem, copy(metric.root()), metric.problem.layout.rows(lam)
    free = torch.ones_like(D) if fixed is None else (~fixed).double()

    def product(y: Tensor) -> Tensor:
        return free * reduced_hessian(problem, lin, rows, free * y / D) / D

    start = free * copy(randomize(problem.create_design(), 0))
    try:
        return has_negative_eigenvalue(product, start, problem.grid, products)
    except SolveFailure:
        return False


def _has_curvature(lin: Linearization, lam: PETSc.Vec) -> bool:
    """Whether the Hessian of lam.F is not zero: a product with a random vector sees it. Collective."""
    x = randomize(lin.layout.create_primal(), 0)
    both, own = (lin.hvp(each, x, x.duplicate()) for each in (lam, None))
    size = own.norm()
    own.axpy(-1.0, both)
    return bool(own.norm() > ROUNDING**2 * size)


def has_negative_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, grid: TimeGrid, products: int = PRODUCTS
) -> bool:
    """Whether Lanczos' method sees one of a symmetric operator within so many products. Collective.

    Args:
        product: the operator on the entries of this rank.
        start: where its Krylov space begins, (size,).
        grid: of the ranks.
    """
    w, basis, rows, largest = start, list[Tensor](), list[Tensor](), 0.0
    while len(basis) < products and (size := math.sqrt(grid.sum(w @ w))) > 1e-12 * largest:
        basis.append(w / size)
        w, Q = product(basis[-1]), torch.stack(basis)
        rows.append(grid.sum(Q @ w))
        for _ in range(2):  # once leaves rounding behind
            w = w - grid.sum(Q @ w) @ Q
        T = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for k, row in enumerate(rows):
            T[k, : k + 1] = T[: k + 1, k] = row
        eigenvalues = torch.linalg.eigvalsh(T)
        largest = float(eigenvalues.abs().max())
        if float(eigenvalues[0]) < -ROUNDING * largest:
            return True
    return False
