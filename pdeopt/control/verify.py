"""Checks of derivatives that a user runs on an own constraint, objective or problem: they fail, not print.

Each returns numbers (rates, relative errors); `assert_consistent` raises where one of them is wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from petsc4py import PETSc

from pdeopt.control.linearization import Linearization
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import writable
from pdeopt.core.autodiff import plainly
from pdeopt.core.errors import DerivativeError as DerivativeError
from pdeopt.functions.petsc import PetscFunction
from pdeopt.functions.smooth import SmoothFunction


def taylor_rates(errors: list[float], factor: float = 0.5) -> list[float]:
    """Orders of convergence log(e_k / e_{k+1}) / log(1 / factor).

    Args:
        errors: e_k at the steps h, factor h, factor^2 h, ...
        factor: of one step to the next.

    Returns:
        One rate fewer than errors; infinite where an error is zero.
    """
    return [
        math.log(a / b) / math.log(1.0 / factor) if a > 0 and b > 0 else math.inf for a, b in itertools.pairwise(errors)
    ]


def taylor_remainders(
    function: SmoothFunction, z: PETSc.Vec, dz: PETSc.Vec, start: float = 1e-1, number: int = 5
) -> dict[str, list[float]]:
    """|f(z + h dz) - its Taylor polynomial at z| of degree 0, 1 and 2 for h = start, start/2, ... Collective.

    The rates (`taylor_rates`) are 1, 2 and 3 where gradient and Hessian are right.

    Args:
        function: f, for instance `ReducedObjective(problem)`.
        z, dz: point and direction, in the layout of its unknowns.
        start: the first h.
        number: of steps h.

    Returns:
        Lists of remainders under "value", "gradient" and "hessian", the degrees 0, 1 and 2.
    """
    objective = PetscFunction(function)
    g, H_dz, work = z.duplicate(), z.duplicate(), z.duplicate()
    value = objective.value_and_gradient(z, g)
    objective.hvp(z, dz, H_dz)
    slope, curvature = g.dot(dz), dz.dot(H_dz)
    remainders: dict[str, list[float]] = {"value": [], "gradient": [], "hessian": []}
    for k in range(number):
        h, point = start * 0.5**k, z.copy()
        point.axpy(h, dz)
        remainder = objective.value_and_gradient(point, work) - value
        for name, term in (("value", 0.0), ("gradient", h * slope), ("hessian", 0.5 * h * h * curvature)):
            remainder -= term
            remainders[name].append(abs(remainder))
    return remainders


def adjoint_error(
    apply: Callable[[PETSc.Vec, PETSc.Vec], object],
    apply_adjoint: Callable[[PETSc.Vec, PETSc.Vec], object],
    x: PETSc.Vec,
    w: PETSc.Vec,
) -> float:
    """|w.Ax - A'w.x| / (|Ax| |w| + |A'w| |x|) for random x and w. Collective.

    Args:
        apply: (x, out) -> out = A x.
        apply_adjoint: (w, out) -> out = A'w.
        x, w: vectors in the layouts of domain and range; their entries are overwritten.

    Returns:
        About 1e-16 where the adjoint is right; 0 where A x and A'w vanish.
    """
    randomize(x, 1)
    randomize(w, 2)
    Ax, ATw = w.duplicate(), x.duplicate()
    apply(x, Ax)
    apply_adjoint(w, ATw)
    size = Ax.norm() * w.norm() + ATw.norm() * x.norm()
    return abs(w.dot(Ax) - ATw.dot(x)) / size if size > 0 else 0.0


def symmetry_error(matrix: PETSc.Mat) -> float:
    """|y.Kx - x.Ky| / (|Kx| |y| + |Ky| |x|) for random x and y. Collective.

    Args:
        matrix: a square matrix K, assembled or a shell.

    Returns:
        About 1e-16 where K is symmetric.
    """
    x, y = matrix.createVecs()
    return adjoint_error(matrix.mult, matrix.mult, x, y)


def randomize(vec: PETSc.Vec, seed: int) -> PETSc.Vec:
    """Fill a vector with standard normal entries, which depend on seed and global number alone, not on the ranks.

    Args:
        vec: is overwritten.
        seed: of the random numbers.

    Returns:
        The vector.
    """
    start, end = vec.getOwnershipRange()
    generator = torch.Generator().manual_seed(seed)
    with writable(vec) as entries:
        entries.copy_(torch.randn(end, generator=generator, dtype=torch.float64)[start:])
    return vec


def prices_controls(problem: ControlProblem) -> bool:
    """Whether the objective has curvature in every control itself, as `ControlCost` gives it. Collective.

    Args:
        problem: whose objective is asked for a Hessian product at random controls.

    Returns:
        False where some control has none; its best value then hangs on the states alone, or is not there at all.
    """
    draw, rows = torch.Generator().manual_seed(0), problem.grid.n_local
    z, dz = torch.randn(2, rows, problem.m, generator=draw, dtype=torch.float64)
    p = torch.zeros(problem.param_dim, dtype=torch.float64)
    u, steps = problem.initial_state(p).expand(rows, -1).clone(), problem.grid.steps.with_parameters(p)
    _, h_z, _ = problem.objective.hvp(u, z, steps, torch.zeros_like(u), dz, p)
    return float(problem.grid.max((problem.controls.adjoint(h_z) == 0).any().double())) == 0


@plainly
def assert_consistent(problem: ControlProblem, seed: int = 0) -> dict[str, float]:
    """Check F', its adjoint, J' and L'' of a problem at a random point by central differences. Collective.

    Args:
        problem: with constraint and objective as their user wrote them.
        seed: of the random point, multiplier and direction.

    Returns:
        Relative errors by the names "adjoint", "jacobian", "gradient", "hessian".

    Raises:
        DerivativeError: an error above 1e-6 (1e-12 for the adjoint).
    """
    x, lam, dx = (
        randomize(v, seed + k)
        for k, v in enumerate((problem.create_primal(), problem.create_multiplier(), problem.create_primal()))
    )
    lin = problem.at(x)

    def near(h: float) -> Linearization:
        point = x.copy()
        point.axpy(h, dx)
        return problem.at(point)

    h = 1e-5
    forward, backward = near(h), near(-h)

    def difference(plus: PETSc.Vec, minus: PETSc.Vec) -> PETSc.Vec:
        plus = plus.copy()
        plus.axpy(-1.0, minus)
        plus.scale(0.5 / h)
        return plus

    def relative(found: PETSc.Vec, expected: PETSc.Vec) -> float:
        size = expected.norm()
        found = found.copy()
        found.axpy(-1.0, expected)
        return float(found.norm() / size) if size > 0 else float(found.norm())

    slope = (forward.value - backward.value) / (2 * h)
    lagrangian_slope = difference(forward.lagrangian_gradient(lam), backward.lagrangian_gradient(lam))
    errors = {
        "adjoint": adjoint_error(lin.jvp, lin.vjp, x.duplicate(), lam.duplicate()),
        "jacobian": relative(lin.jvp(dx, lam.duplicate()), difference(forward.residual, backward.residual)),
        "gradient": abs(lin.gradient.dot(dx) - slope) / max(abs(slope), 1e-300),
        "hessian": relative(lin.hvp(lam, dx, x.duplicate()), lagrangian_slope),
    }
    for name, error in errors.items():
        if not error <= (1e-12 if name == "adjoint" else 1e-6):
            raise DerivativeError(
                f"{name}: relative error {error:.1e}; check `linearize`, `hvp` or `gradient` overrides"
            )
    return errors
