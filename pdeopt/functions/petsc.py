"""The bridge between PETSc vectors and the flat tensors of smooth functions."""

from __future__ import annotations

from petsc4py import PETSc

from pdeopt.core.arrays import assign, copy
from pdeopt.functions.smooth import SmoothFunction


class PetscFunction:
    """A smooth function on PETSc vectors, for TAO and for users whose unknowns are a `Vec`.

    The vectors are distributed as the function's unknowns: `function.size` entries on each rank. All calls are
    collective, and are counted in the function's tally.

    Args:
        function: any smooth function.

    Example:
        >>> f = PetscFunction(ReducedObjective(problem))
        >>> z, g = problem.create_design(), problem.create_design()
        >>> value = f.value_and_gradient(z, g)
    """

    def __init__(self, function: SmoothFunction) -> None:
        self.function = function

    def value(self, x: PETSc.Vec) -> float:
        """f(x)."""
        return self.function.value(copy(x))

    def value_and_gradient(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """f(x); writes f'(x) into g."""
        value, gradient = self.function.value_and_gradient(copy(x))
        assign(g, gradient)
        return value

    def hvp(self, x: PETSc.Vec, d: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = f''(x) d, and returns it."""
        assign(out, self.function.hvp(copy(x), copy(d)))
        return out
