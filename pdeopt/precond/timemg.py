"""Multigrid in time on KKT systems, by PETSc's PCMG; levels and their transfers are those of `levels.py`."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from petsc4py import PETSc

from pdeopt.core.settings import read, read_inner
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.precond.base import Preconditioner
from pdeopt.precond.blockjacobi import BlockJacobiSettings, TimeBlockJacobi
from pdeopt.precond.levels import Level, TimeMultigridSettings, Transfer, fill_multigrid, hierarchy, transfer
from pdeopt.precond.operator import BlockMatrix, BlockOperator, GalerkinOperator, blocks_of
from pdeopt.precond.wathen import WathenPC, WathenSettings
from pdeopt.steps.transfer import adjoint_interpolation, injection, interpolation, piecewise_constant

#: Options of PCMG on KKT systems, unless the user says otherwise.
MULTIGRID_DEFAULTS = {"pc_mg_cycle_type": "w", "mg_levels_ksp_max_it": "1", "mg_levels_ksp_norm_type": "none"}

#: The coarsest KKT system is solved by flexible GMRES to this relative residual.
COARSEST_RTOL, COARSEST_ITERATIONS = 1e-10, 60


class TimeMultigridPC(Preconditioner):
    """Multigrid in time on a KKT matrix, smoothed by block Jacobi.

    The smoother is Richardson's iteration with `TimeBlockJacobi`, the coarsest problem is solved by GMRES with
    `WathenPC`. States and multipliers are prolonged linearly in time, controls as constants of the coarse steps.

    Attributes:
        settings: as they are read.
        levels: of the present matrix, finest first.
    """

    reads = (TimeMultigridSettings, BlockJacobiSettings, WathenSettings)

    def initialize(self, pc: PETSc.PC) -> None:
        super().initialize(pc)
        self.settings = read_inner(TimeMultigridSettings, self.prefix)
        read(BlockJacobiSettings)  # also where few steps make one level, which no smoother sees

    def update(self, pc: PETSc.PC) -> None:
        finest = pc.getOperators()[0]
        blocks = blocks_of(pc.getOperators()[1])
        assert blocks is not None  # the finest level has steps on all ranks
        self.levels = hierarchy(blocks, self.settings)
        transfers = [self._transfers(fine, coarse, blocks) for fine, coarse in pairwise(self.levels)]
        matrices = [finest]
        for level, (P, _) in zip(self.levels[1:], transfers):
            matrices.append(self._operator(level.blocks, matrices[-1], P).shell())
            self.own(matrices[-1].destroy)
        self._cycle = PETSc.PC().create(blocks.grid.comm)
        self.own(self._cycle.destroy)
        self._cycle.setOptionsPrefix(self.prefix)
        self._cycle.setOperators(*pc.getOperators())
        fill_multigrid(self._cycle, matrices, transfers, _smoother, _coarsest, MULTIGRID_DEFAULTS)
        self._cycle.setFromOptions()
        self._cycle.setUp()

    def _operator(self, blocks: KKTBlocks | None, fine: PETSc.Mat, P: PETSc.Mat) -> BlockMatrix:
        """That of a coarse level."""
        if self.settings.operators == "galerkin":
            return GalerkinOperator(blocks, fine, P)
        return BlockOperator(blocks, fine.getComm())

    def _transfers(self, fine: Level, coarse: Level, blocks: KKTBlocks) -> tuple[PETSc.Mat, PETSc.Mat | None]:
        """Prolongation, and restriction where it is not the transpose."""
        n, m = blocks.n, blocks.C.shape[1]

        def prolongation(state: Transfer, control: Transfer, multiplier: Transfer) -> PETSc.Mat:
            fields = [(state, n), (control, m), (multiplier, n)]
            return transfer(fine, coarse, blocks.grid.comm, self.settings.coarsening, fields)

        P = prolongation(interpolation, piecewise_constant, adjoint_interpolation)
        if self.settings.transfer == "variational":
            return P, None
        return P, prolongation(injection, piecewise_constant, partial(injection, adjoint=True)).transpose()

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self._cycle.apply(x, y)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self._cycle.applyTranspose(x, y)

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        settings = self.settings
        steps = [str(level.grid.num_steps) for level in self.levels if level.grid is not None]
        lines = [
            f"levels: {len(self.levels)}, of {', '.join(steps)} steps" if len(steps) == len(self.levels) else None,
            f"transfer: {settings.transfer}; operators: {settings.operators}",
        ]
        for line in lines:
            self.tell(pc, viewer, line)
        self.view_inner(pc, viewer, self._cycle)


def _smoother(ksp: PETSc.KSP) -> None:
    ksp.setType("richardson")
    ksp.getPC().setType("python")
    ksp.getPC().setPythonContext(TimeBlockJacobi())


def _coarsest(ksp: PETSc.KSP) -> None:
    ksp.setType("fgmres")
    ksp.setTolerances(rtol=COARSEST_RTOL, max_it=COARSEST_ITERATIONS)
    ksp.getPC().setType("python")
    ksp.getPC().setPythonContext(WathenPC())
