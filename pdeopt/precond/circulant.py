"""KKT systems whose coefficients hardly change in time, taken apart into frequencies, as a PETSc Python PC.

Without the design, K is [W T'; T -G] with G = C Wzz^-1 C', and T has blocks A on the diagonal and B below it. With the
means of A, B, C and W over all steps, and with time closed to a circle on which the sign changes once, the Fourier
transform over the steps makes of this one small system a frequency theta,

    [W  A' + exp(i theta) B';  A + exp(-i theta) B  -G].

What is left out at both ends of time has the rank of two states, and is felt as far from there as the optimal control
lets a state persist. Neither W nor G need be regular: a part of the states may be observed and a part controlled, of
waves, too, where no matched Schur complement fits.

(E. McDonald, J. Pestana, A. J. Wathen, Preconditioning and iterative solution of all-at-once systems for evolutionary
partial differential equations, SIAM J. Sci. Comput. 40, 2018; for optimality systems S.-L. Wu, T. Zhou,
Diagonalization-based parallel-in-time algorithms for parabolic PDE-constrained optimization problems, ESAIM: COCV 26,
2020.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from scipy.sparse.linalg import SuperLU, splu
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.errors import SolveFailure
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.kkt.operator import KKTOperator
from pdeopt.precond.base import Preconditioner
from pdeopt.precond.frequencies import Frequencies, mean
from pdeopt.precond.operator import blocks_of, operator_of

#: Bytes of factors on a rank above which there are none, and of a complex entry with its index.
MEMORY, ENTRY = 2 << 30, 20


class CirculantPC(Preconditioner):
    """A KKT matrix with means over time for its blocks, on a circle of time.

    Iterations depend neither on mesh nor on steps nor on the regularization, where steps are of one length and
    coefficients change little, with observation and control on parts of a domain, too. Costs: sparse complex factors of
    half as many systems as there are steps, which ranks share; for each application a solve with each of them, and two
    Fourier transforms, for which all ranks exchange all rows.

    Raises:
        SolveFailure: the system of a frequency is singular, or the factors would take more than 2 GiB of a rank.
    """

    def update(self, pc: PETSc.PC) -> None:
        operator = operator_of(pc.getOperators()[1])
        blocks = blocks_of(pc.getOperators()[1])
        assert blocks is not None  # an operator has steps on all ranks
        self.blocks, self._frequencies = blocks, Frequencies(blocks.grid)
        parts = _parts(operator, blocks)
        if not self._is_same(parts):  # else the factors of the last point serve on
            self._factors = list(self._factor(*parts))
            self._last = parts

    _last: tuple[sp.csc_matrix, sp.csc_matrix] | None = None

    def _is_same(self, parts: tuple[sp.csc_matrix, sp.csc_matrix]) -> bool:
        return self._last is not None and all(
            one.nnz == other.nnz and bool(np.array_equal(one.data, other.data)) for one, other in zip(self._last, parts)
        )

    def _factor(self, middle: sp.csc_matrix, lower: sp.csc_matrix) -> Iterator[SuperLU]:
        count, parts = len(self._frequencies.angles), (middle, lower, lower.T.tocsc())
        pattern = sum(abs(part).sign() for part in parts).tocsc()
        constant, before, after = (_spread(part, pattern) for part in parts)
        for theta in self._frequencies.angles:
            shift = np.exp(-1j * theta)
            values = constant + shift * before + np.conj(shift) * after
            try:
                factor = splu(sp.csc_matrix((values, pattern.indices, pattern.indptr), shape=pattern.shape))
            except RuntimeError as error:
                raise SolveFailure(
                    f"the KKT system of the frequency {theta:.4f} of a step is singular", "solve it by other means"
                ) from error
            if factor.nnz * count * ENTRY > MEMORY:
                raise SolveFailure(
                    f"{count} factors of {factor.nnz} entries take more than {MEMORY >> 20} MiB", "use more ranks"
                )
            yield factor

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        blocks = self.blocks
        (u, z, p), c = blocks.layout.kkt_fields(x)
        none = torch.zeros_like(u)
        _, z0, p0 = blocks.inverse((none, z, p))
        v, lam = self._solve(u, c - blocks.jacobian((none, z0, p0)))
        _, w, q = blocks.adjoint(lam)
        _, dz, dp = blocks.inverse((none, z - w, p - q))
        blocks.layout.pack(y, v, dz, dp, lam)

    def _solve(self, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """u and lam of [W T'; T -G] (u, lam) = (g, c) on the circle."""
        n, m = self.blocks.n, self.blocks.C.shape[1]
        given = self._frequencies.forward(torch.cat([g, c], dim=1))
        found, right = np.empty_like(given), np.zeros(2 * n + m, dtype=complex)
        for j, factor in enumerate(self._factors):
            right[:n], right[n + m :] = given[j, :n], given[j, n:]
            left = factor.solve(right)
            found[j, :n], found[j, n:] = left[:n], left[n + m :]
        rows = self._frequencies.backward(found)
        return rows[:, :n], rows[:, n:]

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        self.tell(pc, viewer, f"means over time, by frequency: {(self.blocks.grid.num_steps + 1) // 2} systems")


def _parts(operator: KKTOperator, blocks: KKTBlocks) -> tuple[sp.csc_matrix, sp.csc_matrix]:
    """[W 0 A'; 0 Wzz C'; A C 0] and [0 0 0; 0 0 0; B 0 0], means over all steps. Collective."""
    grid, lin = blocks.grid, operator.lin
    state = operator.metric.state
    if not operator.is_metric:  # without the small weights of what is not observed
        state, _ = lin.objective_blocks
        state = state.agreed(grid)
    A, B, C, W, Q = (
        mean(grid, part) for part in (blocks.A, blocks.B, blocks.C, state.spread(), blocks.control.spread())
    )
    if operator.hessian == "design":
        W = 0.0 * W
    n, m = C.shape
    zero = sp.csc_matrix((n + m, n + m))
    middle = sp.bmat([[W, None, A.T], [None, Q, C.T], [A, C, None]], format="csc")
    lower = sp.bmat([[zero, None], [sp.hstack([B, sp.csr_matrix((n, m))]), sp.csc_matrix((n, n))]], format="csc")
    return middle, lower


def _spread(part: sp.csc_matrix, pattern: sp.csc_matrix) -> Array:
    """The values of a matrix at the places of a pattern that holds it."""
    every, own = (sp.csc_matrix(each).tocoo() for each in (pattern, part))
    keys, size = every.col.astype(np.int64) * pattern.shape[0] + every.row, pattern.shape[0]
    order, values = np.argsort(keys), np.zeros(pattern.nnz)
    values[order[np.searchsorted(keys, own.col.astype(np.int64) * size + own.row, sorter=order)]] = own.data
    return values
