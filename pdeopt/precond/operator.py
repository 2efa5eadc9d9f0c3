"""Matrices made of blocks, and the way from a PETSc matrix to the KKT operator or the blocks behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from petsc4py import PETSc

from pdeopt.control.verify import randomize
from pdeopt.core.arrays import assign
from pdeopt.core.errors import InputError
from pdeopt.core.ranks import freed
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.kkt.operator import KKTOperator


class BlockMatrix(ABC):
    """A symmetric matrix made of the blocks of the steps: the context of a PETSc shell matrix.

    Args:
        blocks: of the steps; None on a rank without steps, whose rows are none.
        comm: of the vectors; default that of the blocks.
    """

    def __init__(self, blocks: KKTBlocks | None, comm: PETSc.Comm | None = None) -> None:
        self.blocks = blocks
        self.comm = blocks.grid.comm if comm is None and blocks is not None else comm

    @property
    @abstractmethod
    def local_size(self) -> int:
        """Rows of this rank."""

    @abstractmethod
    def mult(self, matrix: PETSc.Mat | None, x: PETSc.Vec, out: PETSc.Vec) -> None:
        """out = the matrix times x; a verb of PETSc's. Collective."""

    def multTranspose(self, matrix: PETSc.Mat | None, x: PETSc.Vec, out: PETSc.Vec) -> None:
        """The same: it is symmetric. Collective."""
        self.mult(matrix, x, out)

    def shell(self) -> PETSc.Mat:
        """A new PETSc matrix; the caller destroys it. Collective."""
        sizes = (self.local_size, None)
        matrix = PETSc.Mat().createPython((sizes, sizes), context=self, comm=self.comm)
        matrix.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        matrix.setUp()
        return matrix


class BlockOperator(BlockMatrix):
    """The KKT matrix K = [W F'; F 0] over [u | z | p | lam]."""

    @property
    def local_size(self) -> int:
        return 0 if self.blocks is None else self.blocks.layout.kkt_size

    def mult(self, matrix: PETSc.Mat | None, x: PETSc.Vec, out: PETSc.Vec) -> None:
        if self.blocks is None:
            return leave(out)
        primal, lam = self.blocks.layout.kkt_fields(x)
        (u, z, p), (v, y, q) = self.blocks.multiply(primal), self.blocks.adjoint(lam)
        self.blocks.layout.pack(out, u + v, z + y, p + q, self.blocks.jacobian(primal))


class SchurOperator(BlockMatrix):
    """The Schur complement S = F W^-1 F' over rows of multipliers, (n_local, n)."""

    @property
    def local_size(self) -> int:
        return 0 if self.blocks is None else self.blocks.layout.state_size

    def mult(self, matrix: PETSc.Mat | None, x: PETSc.Vec, out: PETSc.Vec) -> None:
        if self.blocks is None:
            return leave(out)
        assign(out, self.blocks.schur(self.blocks.layout.rows(x)))


class GalerkinOperator(BlockMatrix):
    """The product P'KP, with the blocks of the rediscretized operator for its preconditioners.

    Args:
        blocks: of the coarse steps, see `BlockMatrix`.
        fine: K.
        P: the prolongation.
    """

    def __init__(self, blocks: KKTBlocks | None, fine: PETSc.Mat, P: PETSc.Mat) -> None:
        super().__init__(blocks, fine.getComm())
        self._fine, self._P = fine, P
        self._x, self._Kx = P.createVecLeft(), P.createVecLeft()

    @property
    def local_size(self) -> int:
        return int(self._P.getLocalSize()[1])

    def mult(self, matrix: PETSc.Mat | None, x: PETSc.Vec, out: PETSc.Vec) -> None:
        self._P.mult(x, self._x)
        self._fine.mult(self._x, self._Kx)
        self._P.multTranspose(self._Kx, out)


def leave(out: PETSc.Vec) -> None:
    """The result on a rank without steps, which has nothing to write: PETSc must forget the norm that it knows of it,
    as on the other ranks. A rank that kept it would miss the next sum over all."""
    out.stateIncrease()


def blocks_of(matrix: PETSc.Mat) -> KKTBlocks | None:
    """The blocks of the steps behind a matrix; None on a rank without steps. Collective.

    Args:
        matrix: that of a `KKTOperator`, shell or assembled, or of a `BlockMatrix`.

    Raises:
        InputError: a matrix of another kind, or an operator without blocks; see `KKTBlocks.of`.
        SolveFailure: a control without a price.
    """
    context = _context(matrix)
    return context.blocks if isinstance(context, BlockMatrix) else KKTBlocks.of(operator_of(matrix))


def is_whole(matrix: PETSc.Mat, blocks: KKTBlocks) -> bool:
    """Whether blocks have all of W of a KKT operator: a product with a random vector tells. Collective."""
    operator = _context(matrix)
    if not isinstance(operator, KKTOperator) or operator.fixed is not None or not blocks.is_exact:
        return False
    x = randomize(operator.problem.create_primal(), 0)
    fields = operator.problem.fields(x)
    whole, missed = x.duplicate(), x.duplicate()
    with freed(x, whole, missed):
        blocks.layout.pack(whole, *operator.hessian_fields(*fields))
        blocks.layout.pack(missed, *blocks.multiply(fields))
        missed.aypx(-1.0, whole)
        return bool(missed.norm() <= 1e-12 * whole.norm())


def operator_of(matrix: PETSc.Mat) -> KKTOperator:
    """The operator of a KKT matrix.

    Args:
        matrix: `KKTOperator.shell()` or `KKTOperator.assemble()`.

    Raises:
        InputError: a matrix of another kind.
    """
    context = _context(matrix)
    if not isinstance(context, KKTOperator):
        raise InputError(
            "matrix of a KKT preconditioner",
            f"one of type {matrix.getType()} without a KKT operator",
            "KKTOperator.shell() or KKTOperator.assemble()",
        )
    return context


def _context(matrix: PETSc.Mat) -> Any:
    return matrix.getPythonContext() if matrix.getType() == "python" else matrix.getAttr("kkt")
