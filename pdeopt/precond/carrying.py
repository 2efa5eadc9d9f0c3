"""Conjugate gradients that carry along what follows the solution: states and multipliers of a design."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Eliminated
from pdeopt.core.arrays import assign, copy


class Symmetric(Protocol):
    """A symmetric matrix that knows what follows a vector, as `ReducedHessian` does."""

    curvature: float

    def product(self, design: Tensor) -> Eliminated:
        """What follows d, in `state` and `multiplier`, and -H d in `rest`; sets `curvature` to d'H d."""

    def sum(self, own: Tensor) -> Tensor:
        """Over the ranks."""


def carrying_cg(
    matrix: Symmetric,
    inverse: Callable[[Tensor], Tensor],
    r: Tensor,
    stop: Callable[[int, float], int],
    first: Tensor | None = None,
) -> tuple[Tensor, Eliminated | None, int]:
    """d with H d = r by conjugate gradients from zero, with what follows d. Collective.

    Where the matrix curves down along a search direction, that is not followed (T. Steihaug, The conjugate gradient
    method and trust regions in large scale optimization, SIAM J. Numer. Anal. 20, 1983; without a radius).

    Args:
        matrix: H.
        inverse: the preconditioner.
        r: right-hand side, flat, which becomes the residual.
        stop: of the iteration and the square of the residual's norm in the preconditioner: a reason of a KSP to stop,
            or 0.
        first: the preconditioned right-hand side, where it is known.

    Returns:
        d; state and multiplier of it, and r - H d, None where d is zero; the reason.
    """
    p = inverse(r) if first is None else first
    natural, d, found, iteration = float(matrix.sum(r @ p)), torch.zeros_like(r), None, 0
    while not (reason := stop(iteration, natural)):
        step = matrix.product(p)
        if not matrix.curvature > 0:
            return d, found, int(PETSc.KSP.ConvergedReason.DIVERGED_INDEFINITE_MAT)
        length = natural / matrix.curvature
        if found is None:
            found = Eliminated(length * step.state, length * step.multiplier, r)
        else:
            found.state.add_(step.state, alpha=length)
            found.multiplier.add_(step.multiplier, alpha=length)
        d.add_(p, alpha=length)
        z, last, iteration = inverse(r.add_(step.rest, alpha=length)), natural, iteration + 1
        natural = float(matrix.sum(r @ z))
        p = z.add_(p, alpha=natural / last)
    return d, found, reason


class CarryingCG:
    """Conjugate gradients that carry states and multipliers of the design along, a KSP of type python.

    They need no sweep of their own in the end; see `carrying_cg`.

    Attributes:
        first: the preconditioned right-hand side of the solve to come, where it is known.
        found: state and multiplier of the last solution x that is not zero, and b - H x.
    """

    first: Tensor | None = None
    found: Eliminated

    def solve(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        """x with H x = b, from zero; the verb of a KSP of type python."""
        hessian: Symmetric = ksp.getOperators()[0].getPythonContext()
        residual, image = (b.duplicate() for _ in range(2))

        def inverse(r: Tensor) -> Tensor:
            assign(residual, r)
            ksp.getPC().apply(residual, image)
            return copy(image)

        d, found, reason = carrying_cg(hessian, inverse, copy(b), lambda *at: self._reason(ksp, *at), self.first)
        self.first = None
        if found is not None:
            self.found = found
        ksp.setConvergedReason(reason)
        assign(x, d)
        for each in (residual, image):
            each.destroy()

    def _reason(self, ksp: PETSc.KSP, iteration: int, natural: float) -> int:
        """Why to stop, 0 to go on."""
        norm = math.sqrt(max(natural, 0.0)) if natural == natural else math.nan
        ksp.setIterationNumber(iteration)
        ksp.monitor(iteration, norm)
        reason = int(ksp.callConvergenceTest(iteration, norm))
        is_last = iteration >= ksp.getTolerances()[3]
        return reason if reason or not is_last else int(PETSc.KSP.ConvergedReason.DIVERGED_MAX_IT)
