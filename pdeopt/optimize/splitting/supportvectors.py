"""Support vector machines with kernels by ADMM: one factorization, and one solve with it an iteration."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import torch

from pdeopt.core.errors import SolveFailure
from pdeopt.lowrank.hierarchical import KernelMatrix
from pdeopt.lowrank.kernels import Array, require_positive
from pdeopt.lowrank.symmetric import SymmetricFactor
from pdeopt.optimize.descent.supportnewton import labels_of
from pdeopt.optimize.splitting.splitconstraint import SplitConstraint, SplitWork

#: Over-relaxation; 1.5 to 1.8 in Boyd et al. 2011, section 3.4.3.
RELAXATION = 1.7


class SupportVectors(SplitConstraint):
    """The dual of a support vector machine: min a'Ka/2 - y'a with sum a = 0 and 0 <= y_s a_s <= C.

    a is split from a copy z in the box, with the constraint r = a - z. The minimum over a is one solve with K + shift
    and the sum by a Lagrange multiplier, which is the offset of the decision function; that over z cuts off what is
    beyond the box (S. Cipolla, J. Gondzio, Training very large scale nonlinear SVMs using alternating direction method
    of multipliers coupled with the hierarchically semi-separable kernel approximations, EURO J. Comput. Optim. 10,
    2022). The penalty is the shift of the matrix, beta = shift / 2. A shift of 1 suits kernels with k(x, x) = 1 and C
    from 1 to 10.

    Args:
        matrix: K + shift.
        labels: y, (n,), -1 or 1, on each rank.
        bound: C.

    Attributes:
        offset: b of the decision function sum_s k(x, x_s) z_s + b.

    Raises:
        InputError: labels other than -1 and 1, of one class only, or of another number; a bound that is not positive.
        SolveFailure: K by blocks is too coarse for the shift.

    Example:
        >>> machine = SupportVectors(KernelMatrix(Gaussian(0.2), x, shift=1.0), y, bound=1.0)
        >>> ADMM(machine, rtol=1e-6).solve().design            # z by points, (n,)
    """

    def __init__(self, matrix: KernelMatrix, labels: Any, bound: float) -> None:
        self.matrix, self.bound = matrix, require_positive("bound of support vectors", bound)
        self.tree = matrix.hierarchy.tree
        y = labels_of(labels, self.tree.n)
        self.work = SplitWork()
        self._factor = SymmetricFactor(matrix.hierarchy, matrix.shift)
        self._y = matrix.hierarchy.from_points(y)  # 0 in empty slots, whose a is then 0
        self._lower, self._upper = np.minimum(0.0, self.bound * self._y), np.maximum(0.0, self.bound * self._y)
        self._of_ones = self._solve(self.tree.real)
        self._ones = self._sum(self._of_ones)
        self._a, self._z, self._lam, self._before = (np.zeros_like(self._y) for _ in range(4))
        self._relaxed, self._kernel_a, self.offset = self._a, self._a, 0.0

    def sweep(self, iteration: int) -> Iterable[Hashable]:
        """a, then z."""
        return ("a", "z")

    def update(self, block: Hashable) -> None:
        """The minimum over a, or over z."""
        shift = self.matrix.shift
        if block == "a":
            right = self._y + shift * self._z - self._lam
            found = self._solve(right)
            self.offset = self._sum(found) / self._ones
            if not np.isfinite(self.offset):
                raise SolveFailure("support vectors: numbers that are not finite", "scaled samples")
            self._a = found - self.offset * self._of_ones
            self._kernel_a = right - self.offset * self.tree.real - shift * self._a  # K a, from the equation of a
            self._relaxed = RELAXATION * self._a + (1.0 - RELAXATION) * self._z
        else:
            self._before = self._z
            self._z = np.clip(self._relaxed + self._lam / shift, self._lower, self._upper)

    def ascend(self) -> None:
        """lambda moves along the relaxed residual."""
        self._lam = self._lam + self.matrix.shift * (self._relaxed - self._z)

    def lagrangian(self) -> float:
        """Of a and z."""
        r = self._a - self._z
        return self.objective() + self._dot(self._lam, r) + 0.5 * self.matrix.shift * self._dot(r, r)

    def objective(self) -> float:
        """a'Ka/2 - y'a, without a product with K; at the end, a is in the box."""
        return self._dot(self._a, 0.5 * self._kernel_a - self._y)

    def dual(self) -> float:
        """The same of z, which is in the box from the first iteration on. Collective."""
        product = self.matrix.hierarchy.product(self._z)
        return self._dot(self._z, 0.5 * product - self._y)

    def residuals(self) -> tuple[float, float]:
        """|a - z| and |z - z before|."""
        r, moved = self._a - self._z, self._z - self._before
        return self._dot(r, r) ** 0.5, self._dot(moved, moved) ** 0.5

    def design(self) -> Array:
        """z by points, (n,); 0 of those that are no support vectors."""
        return self.matrix.hierarchy.to_points(self._z)

    def memory(self) -> dict[str, Any]:
        """a, z and lambda of this rank."""
        names = ("a", "z", "lam", "before", "kernel_a")
        found = {name: torch.from_numpy(getattr(self, f"_{name}").copy()) for name in names}
        return found | {"offset": self.offset, "solves": self.work.solves}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        for name in ("a", "z", "lam", "before", "kernel_a"):
            setattr(self, f"_{name}", memory[name].numpy().copy())
        self.offset, self.work.solves = float(memory["offset"]), float(memory["solves"])

    def _solve(self, right: Array) -> Array:
        self.work.solves += 2.0 * self._factor.numbers
        return self._factor.solve(right)

    def _sum(self, x: Array) -> float:
        return float(self.tree.sum(float(x.sum())))

    def _dot(self, x: Array, y: Array) -> float:
        return float(self.tree.sum(float(x @ y)))
