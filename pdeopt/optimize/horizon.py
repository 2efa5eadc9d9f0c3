"""The same problem again on a horizon that moved on: where to start."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import assign
from pdeopt.core.autodiff import plainly
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import ControlResult
from pdeopt.steps.timegrid import TimeGrid


@plainly
def shifted(problem: ControlProblem, result: ControlResult, steps: int = 1) -> ControlResult:
    """A result as it is seen some time steps later: a start for the next problem of a receding horizon. Collective.

    State, control and multiplier of step i are those of step i + `steps`, at the end those of the last step. Where time
    steps are equal and the target moves on with the horizon, what is new is the end alone, and Newton's method takes
    two or three iterations (M. Diehl, H. G. Bock, J. P. Schloeder, A real-time iteration scheme for nonlinear
    optimization in optimal feedback control, SIAM J. Control Optim. 43, 2005). Controls of a control map, which are not
    those of a step, and parameters stay.

    Args:
        problem: whose result it is.
        result: of any method.
        steps: by how many, at least 0.

    Returns:
        A result for `start` of `solve`, with vectors of its own; its history is that of `result`.

    Raises:
        InputError: more steps than there are, or fewer than 0.

    Example:
        A step of the loop: constraint and grid, which know all sparsities, serve all problems.

        >>> now = ControlProblem(constraint, objective_from(t), grid, initial_state=measured)
        >>> result = solve(now, method="newton", start=shifted(now, result, 5))
    """
    grid = problem.grid
    if not 0 <= steps <= grid.num_steps:
        raise InputError("steps", steps, f"an integer from 0 to {grid.num_steps}")
    u, z, p = problem.unpack(result)
    if problem.control_map is None and problem.m:
        z = _later(grid, z.reshape(-1, problem.m), steps)
    primal, multiplier = problem.create_primal(), problem.create_multiplier()
    state, design = problem.split(problem.layout.pack(primal, _later(grid, u, steps), z.reshape(-1), p))
    assign(multiplier, _later(grid, problem.layout.rows(result.multiplier), steps))
    primal.destroy()
    return replace(result, design=design, state=state, multiplier=multiplier)


def _later(grid: TimeGrid, rows: Tensor, steps: int) -> Tensor:
    """Row i + steps at row i, and the last row at those that have none."""
    last = rows[-1].clone()
    for _ in range(steps):
        rows, _ = grid.shift_adjoint(rows)
        if grid.is_last:
            rows[-1] = last
    return rows
