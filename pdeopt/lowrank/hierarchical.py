"""Kernel matrices as PETSc sees them: a Mat of hierarchical blocks, and a PC that stays positive definite.

The Mat is in the order of the points, distributed by rows as PETSc does it; inside, its vectors are scattered to the
order of the tree, whose leaves each rank owns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from petsc4py import PETSc

from pdeopt.core.arrays import index_array
from pdeopt.core.errors import InputError
from pdeopt.core.settings import Settings, read, read_inner, setting
from pdeopt.lowrank.centers import CenterFactor
from pdeopt.lowrank.hodlr import HierarchicalKernel
from pdeopt.lowrank.kernels import Array, Kernel, require_positive
from pdeopt.lowrank.symmetric import SymmetricFactor
from pdeopt.precond.base import Preconditioner


@dataclass(frozen=True)
class HierarchicalSettings(Settings, prefix="hier_"):
    """Hierarchical matrices of kernels."""

    rtol: float = setting(1e-6, "error of a block, relative to it and its diagonal", above=0, at_most=0.1)
    leaf: int = setting(128, "most points of a leaf", at_least=2)
    rank: int = setting(0, "of the blocks of the factor that preconditions, at most; 0: no limit", at_least=0)
    centers: int = setting(0, "points that precondition instead, by their columns of the whole matrix", at_least=0)
    cut: float = setting(0.0, "singular values of its scaled blocks that it leaves out", at_least=0, at_most=1)


class KernelMatrix:
    """K + shift of all points as the context of a PETSc Mat, K by hierarchical blocks.

    Args:
        kernel: k.
        points: (n, d), all of them on each rank.
        shift: lambda > 0, the variance of the noise or the ridge.
        settings: default from -hier_*.
        comm: PETSc communicator; default PETSc.COMM_WORLD.

    Attributes:
        hierarchy: the `HierarchicalKernel`, K alone.
        shift: lambda.

    Raises:
        InputError: points that are no table of finite numbers, or a shift that is not positive.

    Example:
        >>> A = KernelMatrix(Gaussian(0.2), x, shift=0.1).shell()
        >>> ksp.setOperators(A); ksp.setType("cg")
        >>> ksp.getPC().setType("python"); ksp.getPC().setPythonContext(HierarchicalPC())
    """

    def __init__(
        self, kernel: Kernel, points: Any, shift: float, settings: HierarchicalSettings | None = None, comm: Any = None
    ) -> None:
        own = read(HierarchicalSettings) if settings is None else settings
        self.shift = require_positive("shift of a kernel matrix", shift)
        self.comm = PETSc.COMM_WORLD if comm is None else comm
        self.hierarchy = HierarchicalKernel(kernel, points, own.leaf, own.rtol, comm=self.comm.tompi4py())
        tree = self.hierarchy.tree
        self._rows = PETSc.Vec().createMPI(tree.n, comm=self.comm)
        self._slots = PETSc.Vec().createSeq(len(tree.order))
        self._filled = np.flatnonzero(tree.order >= 0)
        there = PETSc.IS().createGeneral(index_array(tree.order[self._filled]), comm=PETSc.COMM_SELF)
        here = PETSc.IS().createGeneral(index_array(self._filled), comm=PETSc.COMM_SELF)
        self._scatter = PETSc.Scatter().create(self._rows, there, self._slots, here)

    def shell(self) -> PETSc.Mat:
        """A new Mat with this context; `destroy()` it before the program ends, as PETSc then no longer has Python."""
        size = self._rows.getSizes()
        matrix = PETSc.Mat().createPython((size, size), self, comm=self.comm)
        matrix.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        matrix.setOption(PETSc.Mat.Option.SPD, True)
        matrix.setUp()
        return matrix

    def by_slots(self, function: Callable[[Array], Array], x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = function(x) for a function of values by the slots of the tree, see `HierarchicalKernel`. Collective."""
        self._scatter.scatter(x, self._slots, mode=PETSc.ScatterMode.FORWARD)
        self._slots.setArray(function(self._slots.getArray(readonly=True) * self.hierarchy.tree.real))
        self._scatter.scatter(self._slots, y, mode=PETSc.ScatterMode.REVERSE)

    def mult(self, matrix: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = (K + shift) x."""
        self.by_slots(self.product, x, y)

    multTranspose = mult

    def product(self, x: Array) -> Array:
        """(K + shift) x by slots. Collective."""
        return self.hierarchy.product(x) + self.shift * x

    def getDiagonal(self, matrix: PETSc.Mat, diagonal: PETSc.Vec) -> None:
        """The diagonal of K + shift."""
        self.by_slots(lambda _: self.hierarchy.diagonal() + self.shift, diagonal, diagonal)


class HierarchicalPC(Preconditioner):
    """(S S')^-1 with S S' near K + shift: the symmetric factor of hierarchical blocks, exact or of small rank.

    Options: -hier_rank and -hier_cut, also with the prefix of the PC. Positive definite whatever they are, see
    `SymmetricFactor`. With neither, a direct solve. With -hier_centers instead, see `CenterFactor`. By options alone it
    is chosen by `-pc_type python -pc_python_type pdeopt.lowrank.HierarchicalPC`.

    Attributes:
        factor: S.

    Raises:
        InputError: centers together with a rank or cut of blocks.
    """

    reads = (HierarchicalSettings,)
    factor: SymmetricFactor | CenterFactor
    _settings: HierarchicalSettings

    def initialize(self, pc: PETSc.PC) -> None:
        """Read the rank."""
        super().initialize(pc)
        self._settings = read_inner(HierarchicalSettings, self.prefix)

    def update(self, pc: PETSc.PC) -> None:
        """Factor."""
        matrix, own = self._context(pc), self._settings
        if own.centers and (own.rank or own.cut):
            raise InputError("-hier_centers with -hier_rank or -hier_cut", own.centers, "one of them")
        self.factor = (
            CenterFactor(matrix.hierarchy, matrix.shift, own.centers)
            if own.centers
            else SymmetricFactor(matrix.hierarchy, matrix.shift, own.rank, own.cut)
        )

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = (S S')^-1 x."""
        self._context(pc).by_slots(self.factor.solve, x, y)

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        """Ranks of the blocks, and of the factor."""
        kept, ranks = (", ".join(map(str, each)) for each in (self.factor.ranks, self._context(pc).hierarchy.ranks))
        self.tell(pc, viewer, f"hierarchical: factor of ranks {kept}, by levels, of blocks of ranks {ranks}")

    def _context(self, pc: PETSc.PC) -> KernelMatrix:
        matrix = pc.getOperators()[1]
        found = matrix.getPythonContext() if matrix.getType() == PETSc.Mat.Type.PYTHON else None
        if not isinstance(found, KernelMatrix):
            raise InputError("matrix of a hierarchical preconditioner", matrix.getType(), "KernelMatrix(...).shell()")
        return found
