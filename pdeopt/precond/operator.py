"""Matrices made of blocks, and the way from a PETSc matrix to the KKT operator or the blocks behind it."""

from __future__ import annotations

from typing import Any

from petsc4py import PETSc

from pdeopt.core.errors import InputError
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.kkt.operator import KKTOperator


class BlockOperator:
    """[W F'; F 0] of blocks, as a PETSc shell matrix; on ranks without steps, where blocks are None, empty.

    Args:
        blocks: of the steps.
        comm: of the vectors; default that of the blocks.
    """

    def __init__(self, blocks: KKTBlocks | None, comm: PETSc.Comm | None = None) -> None:
        self.blocks = blocks
        self.comm = blocks.grid.comm if comm is None and blocks is not None else comm

    def mult(self, matrix: PETSc.Mat, k: PETSc.Vec, out: PETSc.Vec) -> None:
        """out = K k."""
        if self.blocks is None:
            leave(out)
        else:
            self.blocks.apply(k, out)

    multTranspose = mult

    def shell(self) -> PETSc.Mat:
        """A new matrix; the caller destroys it."""
        return shell(self, self.comm, 0 if self.blocks is None else self.blocks.local_size)


class SchurOperator(BlockOperator):
    """S = F W^-1 F' over rows of multipliers."""

    def mult(self, matrix: PETSc.Mat, k: PETSc.Vec, out: PETSc.Vec) -> None:
        if self.blocks is None:
            leave(out)
        else:
            self.blocks.apply_schur(k, out)

    multTranspose = mult

    def shell(self) -> PETSc.Mat:
        return shell(self, self.comm, 0 if self.blocks is None else self.blocks.grid.n_local * self.blocks.n)


def leave(out: PETSc.Vec) -> None:
    """The result on a rank without steps, which has nothing to write: PETSc must forget the norm that it knows of it,
    as on the other ranks. A rank that kept it would miss the next sum over all."""
    out.stateIncrease()


def shell(context: Any, comm: Any, local: int) -> PETSc.Mat:
    """A symmetric Python matrix with `local` rows on this rank."""
    matrix = PETSc.Mat().createPython(((local, None), (local, None)), context=context, comm=comm)
    matrix.setOption(PETSc.Mat.Option.SYMMETRIC, True)
    matrix.setUp()
    return matrix


def blocks_of(matrix: PETSc.Mat) -> KKTBlocks | None:
    """The blocks of the steps of a KKT matrix; None on a rank without steps. Collective."""
    context = _context(matrix)
    return context.blocks if isinstance(context, BlockOperator) else KKTBlocks.of(operator_of(matrix))


def operator_of(matrix: PETSc.Mat) -> KKTOperator:
    """The operator of a KKT matrix, shell or assembled."""
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
