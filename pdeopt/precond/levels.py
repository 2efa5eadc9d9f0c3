"""Levels of a time hierarchy for PETSc's multigrid (PCMG): their blocks, their transfers, and how PCMG gets them.

A level holds the blocks of its steps, `KKTBlocks.coarsen` of the finer one. Ranks that run out of steps keep empty
parts of the vectors. Cycles, smoothers and everything else are options of PCMG, such as
`-{prefix}pc_mg_cycle_type` and `-{prefix}mg_levels_ksp_max_it`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import scipy.sparse as sp
from petsc4py import PETSc

from pdeopt.core.options import set_default
from pdeopt.core.settings import Settings, setting
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.transfer import transfer_matrix

#: Prolongation of one field as a sparse matrix (fine steps of this rank) x (coarse steps), see `steps/transfer.py`.
Transfer = Callable[[TimeGrid, int], sp.csr_matrix]


@dataclass(frozen=True)
class TimeMultigridSettings(Settings, prefix="timemg_"):
    """Multigrid in time, on the KKT system or on its Schur complement.

    A PC's own prefix may stand before the options.
    """

    transfer: str = setting(
        "variational",
        "restriction in time of KKT residuals: the transpose of the prolongation, or injection (sums for controls)",
        choices=("injection", "variational"),
    )
    coarsening: int = setting(
        2, "time steps that become one on the next level; it should divide the smoother's windows", at_least=2
    )
    levels: int = setting(20, "largest number of levels in time", at_least=2)
    coarsest: int = setting(4, "number of time steps that is not coarsened further", at_least=1)
    operators: str = setting(
        "rediscretized",
        "KKT systems of the coarse levels: sums of the steps' equations, products P'KP, or those sums without control",
        choices=("rediscretized", "galerkin", "no_control"),
    )


@dataclass(frozen=True)
class Level:
    """A time grid of the hierarchy with its blocks; None for both on ranks without steps."""

    grid: TimeGrid | None
    blocks: KKTBlocks | None


def hierarchy(blocks: KKTBlocks, settings: TimeMultigridSettings) -> list[Level]:
    """The levels, finest first. Collective.

    Args:
        blocks: of the finest level, on all ranks.
        settings: how many levels, and how much coarser.

    Raises:
        InputError: there is more than one level, and a control map or global parameters.
    """
    levels = [Level(blocks.grid, blocks)]
    steps, with_control = blocks.grid.num_steps, settings.operators != "no_control"
    while steps > settings.coarsest and len(levels) < settings.levels:
        finer = levels[-1].blocks
        coarse = None if finer is None else finer.coarsen(settings.coarsening, with_control)
        levels.append(Level(None if coarse is None else coarse.grid, coarse))
        steps = -(-steps // settings.coarsening)
    return levels


def transfer(
    fine: Level, coarse: Level, comm: PETSc.Comm, factor: int, fields: Sequence[tuple[Transfer, int]]
) -> PETSc.Mat:
    """The prolongation of vectors from one level to the next finer one; the caller destroys it. Collective.

    Args:
        fine, coarse: the levels.
        comm: of the vectors of all levels.
        factor: steps of the fine grid that make one of the coarse grid.
        fields: of a vector, in the order of its storage on a rank: prolongation and unknowns a step.
    """
    grid = fine.grid
    parts = [(sp.csr_matrix((0, 0)) if grid is None else kind(grid, factor), size) for kind, size in fields]
    return transfer_matrix(grid, coarse.grid, comm, parts)


def fill_multigrid(
    pc: PETSc.PC,
    matrices: Sequence[PETSc.Mat],
    transfers: Sequence[tuple[PETSc.Mat, PETSc.Mat | None]],
    smoother: Callable[[PETSc.KSP], None],
    coarsest: Callable[[PETSc.KSP], None],
    defaults: Mapping[str, str],
) -> None:
    """Make `pc` PCMG with these levels, whose own level 0 is the coarsest. Collective.

    Args:
        pc: which has its prefix and its operators.
        matrices: of the levels, finest first.
        transfers: prolongation to each level but the coarsest, finest first, and restriction where it is not the
            transpose.
        smoother: prepares the KSP that smooths a level.
        coarsest: prepares the KSP of the coarsest level.
        defaults: options without the prefix of `pc`, for which the user's come first.
    """
    top = len(matrices) - 1
    pc.setType("mg")
    pc.setMGLevels(top + 1)
    for depth, (prolongation, restriction) in enumerate(transfers):
        pc.setMGInterpolation(top - depth, prolongation)
        if restriction is not None:
            pc.setMGRestriction(top - depth, restriction)
    for depth, matrix in enumerate(matrices):
        ksp = pc.getMGSmoother(top - depth)
        ksp.setOperators(matrix)
        (smoother if depth < top else coarsest)(ksp)
    for name, value in defaults.items():
        set_default((pc.getOptionsPrefix() or "") + name, value)
