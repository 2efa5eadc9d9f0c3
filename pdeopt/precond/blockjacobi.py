"""Block Jacobi in time: the KKT systems of windows of steps, solved independently of each other.

What enters a window from the step before, and what leaves it in the adjoint, is dropped. All windows are solved
at once; each rank needs only its own where no window reaches over its borders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from petsc4py import PETSc
from scipy.sparse.linalg import SuperLU, splu

from pdeopt.core.arrays import copy
from pdeopt.core.errors import InputError, SolveFailure, together
from pdeopt.core.settings import Settings, read_inner, setting
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.precond.base import Preconditioner
from pdeopt.precond.operator import BlockOperator, blocks_of, leave
from pdeopt.precond.wathen import WathenPC, WathenSettings
from pdeopt.steps.sparse import block_diagonal
from pdeopt.steps.timegrid import require_whole_steps
from pdeopt.steps.windows import Windows


@dataclass(frozen=True)
class BlockJacobiSettings(Settings, prefix="block_jacobi_"):
    """Block Jacobi in time, on KKT systems of windows of steps.

    A PC's own prefix may stand before the options.
    """

    window: int = setting(16, "time steps of a window of block Jacobi", at_least=1)
    local: str = setting(
        "wathen",
        "how block Jacobi solves the KKT system of a window: by LU, by block factorization (wathen), or by Krylov "
        "iterations that it preconditions",
        choices=("exact", "wathen", "krylov"),
        reads={"wathen": (WathenSettings,), "krylov": (WathenSettings,)},
    )
    iterations: int = setting(5, "Krylov iterations in a window of block Jacobi, where it takes them", at_least=1)
    damping: float = setting(1.0, "damping factor of the correction by block Jacobi", above=0)


class TimeBlockJacobi(Preconditioner):
    """Block Jacobi in time. Krylov iterations and block factorization have the prefix `{prefix}sub_`.

    With LU or the block factorization it is symmetric, unless that iterates itself.

    Attributes:
        settings: as they are read.
    """

    reads = (BlockJacobiSettings,)
    _ksp: PETSc.KSP | None = None
    _factors: WindowFactors | None = None

    def initialize(self, pc: PETSc.PC) -> None:
        super().initialize(pc)
        self.settings = read_inner(BlockJacobiSettings, self.prefix)

    def update(self, pc: PETSc.PC) -> None:
        blocks = blocks_of(pc.getOperators()[1])
        self._ksp = self._factors = None
        if blocks is None:
            return
        require_whole_steps(blocks.grid, "block Jacobi", "-kkt_precond reduced | wathen | direct, or space_ranks 1")
        blocks = blocks.cut(self.settings.window)
        if self.settings.local == "exact":
            self._factors = WindowFactors(blocks)
        else:
            self._ksp = self._local_solver(blocks)

    def _local_solver(self, blocks: KKTBlocks) -> PETSc.KSP:
        K, ksp = BlockOperator(blocks).shell(), PETSc.KSP().create(blocks.grid.comm)
        self.own(K.destroy, ksp.destroy)
        ksp.setOptionsPrefix(self.prefix + "sub_")
        ksp.setOperators(K)
        if self.settings.local == "krylov":
            ksp.setType("fgmres")
            ksp.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
            ksp.setTolerances(rtol=1e-12, max_it=self.settings.iterations)
        else:
            ksp.setType("preonly")
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(WathenPC())
        ksp.setFromOptions()
        ksp.setUp()  # now, where a failure reaches all ranks
        self._right, self._left = K.createVecs()
        return ksp

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        if self._factors is not None:
            self._factors.apply(x, y)
        elif self._ksp is not None:
            self._right.setArray(x.getArray(readonly=True))
            self._ksp.solve(self._right, self._left)
            y.setArray(self._left.getArray(readonly=True))
        else:
            leave(y)
        y.scale(self.settings.damping)

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        settings = self.settings
        solver = "LU" if settings.local == "exact" else settings.local
        self.tell(pc, viewer, f"windows of {settings.window} steps, by {solver}, damping {settings.damping:g}")
        if settings.local != "exact":
            self.view_inner(pc, viewer, self._ksp)


class WindowFactors:
    """LU of the KKT matrices of the windows of this rank, as one block diagonal matrix. Made on all ranks together.

    Args:
        blocks: of the steps, cut into windows (`KKTBlocks.cut`), with one control a step and no global parameters.

    Raises:
        InputError: a window reaches over the border of a rank.
        SolveFailure: a window's matrix is singular or not finite; on all ranks.
    """

    def __init__(self, blocks: KKTBlocks) -> None:
        self.blocks, size = blocks, blocks.window
        assert size is not None  # the blocks are cut
        windows = Windows(blocks.grid, size)
        if any(blocks.grid.mpi.allgather(windows.enters)) or blocks.design is not None or blocks.F_p is not None:
            raise InputError(
                "-block_jacobi_local exact",
                f"windows of {size} steps over the borders of ranks, a control map, or global parameters",
                "windows that divide the steps of every rank, one control a step; or local wathen",
            )
        self._lu = together(blocks.grid.mpi, lambda: self._factor(windows))

    def _factor(self, windows: Windows) -> SuperLU:
        matrix = self._matrix()
        factors = _lu(matrix)
        if factors is None:
            raise SolveFailure(
                f"the KKT matrix of {self._culprit(matrix, windows)} is singular or not finite",
                "check the residual there for NaN, and that each step has a unique solution",
            )
        return factors

    def _matrix(self) -> sp.csr_matrix:
        """[W F'; F 0] over [u | z | lam] of this rank."""
        b, N = self.blocks, self.blocks.grid.n_local
        J = block_diagonal(b.A, N) + block_diagonal(b.cut_coupling(), N, lag=1)
        C, forms = block_diagonal(b.C, N), [block_diagonal(form.spread(), N) for form in (b.state, b.control)]
        return sp.csr_matrix(sp.bmat([[forms[0], None, J.T], [None, forms[1], C.T], [J, C, None]]))

    def _culprit(self, matrix: sp.csr_matrix, windows: Windows) -> str:
        """The first window that cannot be factored alone."""
        b, grid = self.blocks, self.blocks.grid
        n, m, N = b.n, b.C.shape[1], grid.n_local
        for begin, end in zip(windows.starts, np.r_[windows.starts[1:], N]):
            steps = np.arange(begin, end)[:, None]
            own = np.concatenate(
                [
                    (steps * n + np.arange(n)).ravel(),
                    (N * n + steps * m + np.arange(m)).ravel(),
                    (N * (n + m) + steps * n + np.arange(n)).ravel(),
                ]
            )
            if _lu(matrix[own][:, own]) is None:
                first = grid.begin + int(begin) + 1
                return f"window {(first - 1) // windows.size + 1} (steps {first} to {grid.begin + int(end)})"
        return "a window"

    def apply(self, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = the inverse times x, vectors [u | z | lam]. Not collective."""
        y.setArray(self._lu.solve(copy(x).numpy()))


def _lu(matrix: sp.csr_matrix) -> SuperLU | None:
    """None where the matrix is singular or not finite."""
    if not np.isfinite(matrix.data).all():
        return None
    try:
        return splu(matrix.tocsc())
    except RuntimeError:
        return None
