"""A solution of K s = r that corrections improve, in as few vectors as that takes: they are what large steps cost."""

from __future__ import annotations

import math
from collections.abc import Callable

from petsc4py import PETSc


class Refinement:
    """s and r - K s, from s = 0. Every verb is collective.

    While s is zero, r - K s is r itself, and the correction is s: no vectors but these two are there during the first
    solve, which mostly is the only one.

    Args:
        rhs: r; it stays as it is.
        size: |r|.
        norm: of residuals.

    Attributes:
        solution: s, a new vector, which the caller destroys.
        size: |r - K s|, as far as it is known.

    Example:
        >>> solve(refinement.remainder, refinement.room)               # K room = remainder, roughly
        >>> refinement.add(K)
    """

    def __init__(self, rhs: PETSc.Vec, size: float, norm: Callable[[PETSc.Vec], float]) -> None:
        self.rhs, self.size, self._norm, self._first = rhs, size, norm, size
        self.solution = rhs.duplicate()
        self.solution.set(0.0)
        self._remainder: PETSc.Vec | None = None  # while the solution is zero
        self._correction: PETSc.Vec | None = None

    @property
    def remainder(self) -> PETSc.Vec:
        """r - K s."""
        return self.rhs if self._remainder is None else self._remainder

    @property
    def room(self) -> PETSc.Vec:
        """Where the next correction is written."""
        if self._remainder is None:
            return self.solution
        if self._correction is None:
            self._correction = self.rhs.duplicate()
        return self._correction

    def add(self, matrix: PETSc.Mat, known: float | None = None) -> None:
        """Take what stands in `room`; `known` is what that leaves, where it is enough and nothing follows."""
        if self._remainder is not None:
            self.solution.axpy(1.0, self.room)
        if known is None:
            self._measure(matrix)
        else:
            self.size = known

    def take_back(self, matrix: PETSc.Mat, was_first: bool) -> None:
        """Undo `add`, of the first correction or of another one; of one that is not finite begin again at zero."""
        if was_first or not math.isfinite(self.size):
            self.free()
            self.solution.set(0.0)
            self.size = self._first
        else:
            self.solution.axpy(-1.0, self.room)
            self._measure(matrix)

    def leave(self) -> None:
        """Forget what stands in `room`."""
        if self._remainder is None:
            self.solution.set(0.0)

    def _measure(self, matrix: PETSc.Mat) -> None:
        if self._remainder is None:
            self._remainder = self.rhs.duplicate()
        matrix.mult(self.solution, self._remainder)
        self._remainder.aypx(-1.0, self.rhs)
        self.size = self._norm(self._remainder)

    def free(self) -> None:
        """Free all but the solution."""
        for each in (self._remainder, self._correction):
            if each is not None:
                each.destroy()
        self._remainder = self._correction = None
