"""Coarser time steps as the coarse levels of a reduced objective."""

from __future__ import annotations

from petsc4py import PETSc

from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import SWEEP_COSTS, ReducedObjective
from pdeopt.core.arrays import copy
from pdeopt.core.errors import InputError
from pdeopt.functions.hierarchy import Hierarchy, window_transfer
from pdeopt.functions.smooth import ScaledFunction


def with_coarse_space(reduced: ReducedObjective, scale: PETSc.Vec | None = None) -> Hierarchy:
    """The reduced objective with controls constant on `-window_coarse` windows as its coarse space.

    It has none where the problem has a control map or global parameters, objectives with a target a step, fewer steps
    than windows, or windows that reach over ranks.

    Args:
        reduced: the objective on the grid of its problem.
        scale: D of the unknowns y = D z, in the layout of the design; default the root of the lumped metric.

    Returns:
        One level or two, finest first. Collective.
    """
    windows, grid = reduced.settings.coarse, reduced.problem.grid
    if 0 < windows < grid.num_steps:
        try:
            return time_hierarchy(reduced, -(-grid.num_steps // windows), scale)
        except InputError:
            pass
    return Hierarchy([_scaled(reduced, scale)])


def time_hierarchy(reduced: ReducedObjective, factor: int, scale: PETSc.Vec | None = None) -> Hierarchy:
    """The reduced objective on the grid of the problem and on one with `factor` times longer steps. Collective.

    The unknowns are y = D z with D^2 the lumped metric; a coarse control is the same on all steps of its window. The
    objective and the constraint must serve both grids: targets are functions of time, or the same at all times.

    Args:
        reduced: the objective on the fine grid.
        factor: steps that become one.
        scale: D of the fine grid, in the layout of the design; default the root of the lumped metric.

    Returns:
        Two levels, finest first.

    Raises:
        InputError: a control map or global parameters, or windows that reach over ranks.
    """
    problem = reduced.problem
    if problem.control_map is not None or problem.param_dim:
        raise InputError("coarser time steps", "a control map or global parameters", "one control a step")
    transfer = window_transfer(problem.grid, problem.m, factor)
    grid = problem.grid.coarsen(factor)
    assert grid is not None  # each rank has whole windows
    coarse = ControlProblem(problem.constraint, problem.objective, grid)
    kept = {} if reduced.sweeps is None else vars(reduced.sweeps.settings)
    below = ReducedObjective(coarse, costs=SWEEP_COSTS.times(grid.num_steps / problem.grid.num_steps), **kept)
    return Hierarchy([_scaled(reduced, scale), _scaled(below)], [transfer])


def _scaled(reduced: ReducedObjective, scale: PETSc.Vec | None = None) -> ScaledFunction:
    """The objective as a function of y = D z."""
    return ScaledFunction(reduced, copy(RieszMetric(reduced.problem).root() if scale is None else scale))
