"""Multigrid in time, by PETSc's PCMG: on KKT systems, and on their Schur complement alone.

Both coarsen in time only. A level holds the blocks of its steps (`KKTBlocks.coarsen`); ranks that run out of
steps keep empty parts of the vectors. Cycles, smoothers and everything else are options of PCMG, such as
`-{prefix}pc_mg_cycle_type` and `-{prefix}mg_levels_ksp_max_it`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from petsc4py import PETSc

from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import together
from pdeopt.core.options import set_default
from pdeopt.core.settings import Settings, read_inner, setting
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.precond.blockjacobi import TimeBlockJacobi
from pdeopt.precond.operator import BlockOperator, SchurOperator, blocks_of, leave
from pdeopt.precond.wathen import PropagatedSchur, WathenPC, WathenSettings
from pdeopt.steps.sparse import combination
from pdeopt.steps.stepsolve import step_solver
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.transfer import constant, injection, linear, linear_adjoint, spread


@dataclass(frozen=True)
class TimeMultigridSettings(Settings, prefix="timemg_"):
    """Multigrid in time.

    A PC's own prefix may stand before the options.
    """

    transfer: str = setting(
        "variational",
        "states and multipliers linear in time, controls constant; restriction by "
        "the transpose, or by injection (controls: averages)",
        choices=("injection", "variational"),
    )
    coarsening: int = setting(2, "steps that become one; it should divide the windows of the smoother", at_least=2)
    levels: int = setting(20, "largest number of levels", at_least=2)
    coarsest: int = setting(4, "steps that are not coarsened further", at_least=1)
    operators: str = setting(
        "rediscretized",
        "coarse operators: sums over windows, products P'KP, or without control",
        choices=("rediscretized", "galerkin", "no_control"),
    )


@dataclass
class Level:
    """A time grid of the hierarchy with its blocks; None for both on ranks without steps."""

    grid: TimeGrid | None
    blocks: KKTBlocks | None


def hierarchy(blocks: KKTBlocks, settings: TimeMultigridSettings) -> list[Level]:
    """The levels, finest first. Collective."""
    levels = [Level(blocks.grid, blocks)]
    steps, with_control = blocks.grid.num_steps, settings.operators != "no_control"
    while steps > settings.coarsest and len(levels) < settings.levels:
        finer = levels[-1].blocks
        coarse = None if finer is None else finer.coarsen(settings.coarsening, with_control)
        levels.append(Level(None if coarse is None else coarse.grid, coarse))
        steps = -(-steps // settings.coarsening)
    return levels


def multigrid_settings(prefix: str) -> TimeMultigridSettings:
    """The settings of a PC with this prefix."""
    return read_inner(TimeMultigridSettings, prefix)


class TimeMultigridPC:
    """Multigrid in time on a KKT operator, smoothed by block Jacobi.

    The smoother is Richardson's iteration with `TimeBlockJacobi`, the coarsest problem is solved by GMRES with
    the serial matched preconditioner.
    """

    _cycle: PETSc.PC | None = None
    _kept: Sequence[PETSc.Mat] = ()

    def setUp(self, pc: PETSc.PC) -> None:
        blocks = blocks_of(pc.getOperators()[1])
        assert blocks is not None  # the finest level has steps on all ranks
        self._free()
        self._cycle = PETSc.PC().create(blocks.grid.comm)
        self._cycle.setOptionsPrefix(pc.getOptionsPrefix() or "")
        self._cycle.setOperators(*pc.getOperators())
        self._cycle.setType("mg")
        settings = multigrid_settings(pc.getOptionsPrefix() or "")
        levels = hierarchy(blocks, settings)
        transfers = [self._transfers(fine, coarse, settings, blocks) for fine, coarse in pairwise(levels)]
        matrices = [pc.getOperators()[0]]
        for level, (P, _) in zip(levels[1:], transfers):
            operator: BlockOperator = BlockOperator(level.blocks, blocks.grid.comm)
            if settings.operators == "galerkin":
                operator = GalerkinOperator(level.blocks, matrices[-1], P)
            matrices.append(operator.shell())
        _fill(self._cycle, matrices, transfers, [self._smooth] * (len(levels) - 1), self._coarsest)
        self._kept = matrices[1:]
        for name, value in DEFAULTS.items():
            set_default((pc.getOptionsPrefix() or "") + name, value)
        self._cycle.setFromOptions()
        self._cycle.setUp()

    def _transfers(
        self, fine: Level, coarse: Level, settings: TimeMultigridSettings, blocks: KKTBlocks
    ) -> tuple[PETSc.Mat, PETSc.Mat | None]:
        """Prolongation, and restriction where it is not the transpose."""
        factor, n, m = settings.coarsening, blocks.n, blocks.C.shape[1]
        kinds = [(linear, n), (constant, m), (linear_adjoint, n)]
        P = _spread(fine, coarse, blocks, factor, kinds)
        if settings.transfer == "variational":
            return P, None
        kinds = [(injection, n), (constant, m), (partial(injection, adjoint=True), n)]
        down = _spread(fine, coarse, blocks, factor, kinds)
        return P, down.transpose()

    def _smooth(self, ksp: PETSc.KSP) -> None:
        ksp.setType("richardson")
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(TimeBlockJacobi())

    def _coarsest(self, ksp: PETSc.KSP) -> None:
        ksp.setType("fgmres")
        ksp.setTolerances(rtol=1e-10, max_it=60)
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(WathenPC())

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        assert self._cycle is not None  # PETSc sets up first
        self._cycle.apply(x, y)

    def destroy(self, pc: PETSc.PC) -> None:
        self._free()

    def _free(self) -> None:
        for thing in self._kept if self._cycle is None else (self._cycle, *self._kept):
            thing.destroy()
        self._cycle, self._kept = None, []


#: Options of PCMG on KKT systems, unless the user says otherwise.
DEFAULTS = {"pc_mg_cycle_type": "w", "mg_levels_ksp_max_it": "1", "mg_levels_ksp_norm_type": "none"}


class GalerkinOperator(BlockOperator):
    """P'KP as a product, with the blocks of the rediscretized operator for its preconditioners."""

    def __init__(self, blocks: KKTBlocks | None, fine: PETSc.Mat, P: PETSc.Mat) -> None:
        super().__init__(blocks, fine.getComm())
        self._fine, self._P = fine, P
        self._x, self._Kx = P.createVecLeft(), P.createVecLeft()

    def mult(self, matrix: PETSc.Mat, k: PETSc.Vec, out: PETSc.Vec) -> None:
        self._P.mult(k, self._x)
        self._fine.mult(self._x, self._Kx)
        self._P.multTranspose(self._Kx, out)

    multTranspose = mult


class SchurMultigrid:
    """Multigrid on S = F W^-1 F', block tridiagonal and elliptic in time: a W-cycle is textbook multigrid.

    The smoother takes the diagonal block of S with *all* its terms, matched,

        (A + N) W^-1 (A + N)',   N W^-1 N' = B W^-1 B' + C Wzz^-1 C',

    two solves a step that are independent over the steps.
    """

    def __init__(self, blocks: KKTBlocks) -> None:
        self.blocks = blocks

    def configure(self, pc: PETSc.PC) -> None:
        """Make `pc` this multigrid, two smoothings before and after. Collective."""
        prefix, blocks = pc.getOptionsPrefix() or "", self.blocks
        settings = multigrid_settings(prefix)
        levels = hierarchy(blocks, settings)
        pc.setType("mg")
        transfers = [
            (_spread(fine, coarse, blocks, settings.coarsening, [(linear_adjoint, blocks.n)]), None)
            for fine, coarse in pairwise(levels)
        ]
        matrices = [pc.getOperators()[0]]
        matrices += [SchurOperator(level.blocks, blocks.grid.comm).shell() for level in levels[1:]]
        mpi, last = blocks.grid.mpi, levels[-1].blocks
        smoothers = [together(mpi, partial(MatchedBlock, level.blocks)) for level in levels[:-1]]
        serial = together(mpi, lambda: last and PropagatedSchur(last, WathenSettings("matched", "forward"))) or Idle()
        _fill(
            pc,
            matrices,
            transfers,
            [partial(self._smooth, smoother) for smoother in smoothers],
            partial(self._coarsest, serial),
        )
        for name, value in SCHUR_DEFAULTS.items():
            set_default(prefix + name, value)

    def _smooth(self, smoother: MatchedBlock, ksp: PETSc.KSP) -> None:
        ksp.setType("richardson")
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(smoother)

    def _coarsest(self, serial: PropagatedSchur | Idle, ksp: PETSc.KSP) -> None:
        ksp.setType("cg")
        ksp.setTolerances(rtol=1e-10, max_it=60)
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(serial)


#: Options of PCMG on Schur complements, unless the user says otherwise.
SCHUR_DEFAULTS = {
    "pc_mg_cycle_type": "w",
    "mg_levels_ksp_max_it": "2",
    "mg_levels_ksp_norm_type": "none",
    "mg_levels_ksp_richardson_scale": "1.3",
}


class MatchedBlock:
    """((A + N) W^-1 (A + N)')^-1 for each step: what smooths S."""

    def __init__(self, blocks: KKTBlocks | None) -> None:
        self.blocks = blocks
        if blocks is not None:
            N = blocks.shift(with_old_state=True)
            self._solver = step_solver(combination([(1.0, blocks.A), (1.0, N)]))

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        if self.blocks is None:
            return leave(y)
        r = self._solver.solve(copy(x).reshape(-1, self.blocks.n))
        assign(y, self._solver.solve(self.blocks.state.multiply(r), transpose=True))

    applyTranspose = apply


class Idle:
    """The preconditioner of a rank without steps."""

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """There is nothing to do."""
        leave(y)


def _spread(fine: Level, coarse: Level, blocks: KKTBlocks, factor: int, kinds: list[Any]) -> PETSc.Mat:
    """The transfer of a vector with these kinds of fields."""
    fields = [(None if fine.grid is None else kind(fine.grid, factor), size) for kind, size in kinds]
    return spread(fine.grid, coarse.grid, blocks.grid.comm, fields)


def _fill(pc: PETSc.PC, matrices: list[Any], transfers: list[Any], smoothers: list[Any], coarsest: Any) -> None:
    """Hand levels to PCMG, whose level 0 is the coarsest."""
    top = len(matrices) - 1
    pc.setMGLevels(top + 1)
    for depth, (P, R) in enumerate(transfers):
        pc.setMGInterpolation(top - depth, P)
        if R is not None:
            pc.setMGRestriction(top - depth, R)
    for depth, matrix in enumerate(matrices):
        ksp = pc.getMGSmoother(top - depth)
        ksp.setOperators(matrix)
        (smoothers[depth] if depth < top else coarsest)(ksp)
