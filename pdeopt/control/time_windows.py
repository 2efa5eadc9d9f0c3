"""The reduced objective as a smooth function of flat tensors, with windows of time as the parts of its unknowns.

The local function of a window of steps a+1..b is the objective of these steps alone, from the state u_a that the whole
has, with what the steps after them say about u_b:

    sum_{i in window} J_i(u_i, z_i) + c.u_b,   c = (dF_{b+1}/du_b)' lam_{b+1}

Its gradient at the present controls is that of the whole, and it costs the window's share of the steps. With a horizon
of h steps, h more steps are solved for, their controls fixed, before c stands for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.metric import DesignForm, RieszMetric
from pdeopt.control.objective import Objective
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import InputError
from pdeopt.core.settings import Settings, read, setting
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.hierarchy import Hierarchy, window_transfer
from pdeopt.functions.smooth import Costs, Operator, SmoothFunction
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.timegrid import Steps

#: A state solve and an adjoint solve; a Hessian product takes one of each, too.
COSTS = Costs(value=0.5, gradient=1.0, hessian_product=1.0)


@dataclass(frozen=True)
class WindowSettings(Settings, prefix="window_"):
    """Options `-window_*`."""

    coarse: int = setting(
        8, "windows of the coarse space of a time hierarchy, where the steps allow it; 0 for none", at_least=0
    )
    horizon: int = setting(0, "steps beyond a window that its local function solves for", at_least=0)


class ReducedFunction(SmoothFunction):
    """y -> J(u(z), z) with z = y / scale.

    Args:
        reduced: the objective.
        scale: of the unknowns, as in `TaoSolver`; None for 1.
    """

    def __init__(self, reduced: ReducedObjective, scale: PETSc.Vec | None = None, **defaults: Any) -> None:
        self.reduced, self.problem = reduced, reduced.problem
        self._z, self._g = (self.problem.create_design() for _ in range(2))
        super().__init__(self._z.getLocalSize(), self.problem.grid.mpi, COSTS)
        self.scale = torch.ones(self.size, dtype=torch.float64) if scale is None else copy(scale)
        self.settings = read(WindowSettings, **defaults)

    def _at(self, y: Tensor) -> PETSc.Vec:
        assign(self._z, y / self.scale)
        return self._z

    def _value(self, x: Tensor) -> float:
        return self.reduced.value(self._at(x))

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        value = self.reduced.value_and_gradient(self._at(x), self._g)
        return value, copy(self._g) / self.scale

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        dz = self._g.duplicate()
        assign(dz, d / self.scale)
        self.reduced.hvp(self._at(x), dz, self._g)
        return copy(self._g) / self.scale

    def decompose(self, parts: int, overlap: int = 0, team: object = None) -> Decomposition:
        """Windows of time of nearly equal numbers of steps; a rank works alone on windows that it owns whole.

        Raises:
            InputError: more windows than steps.
        """
        problem, grid = self.problem, self.problem.grid
        if not self._has_windows:
            return super().decompose(parts, overlap)
        N, m = grid.num_steps, problem.m
        if not 1 <= parts <= N:
            raise InputError("windows", parts, f"1 to {N}, the number of steps")
        cuts = [round(N * s / parts) for s in range(parts + 1)]
        windows = [(max(a - overlap, 0), min(b + overlap, N)) for a, b in pairwise(cuts)]
        own = [(max(a - grid.begin, 0), min(b - grid.begin, grid.n_local)) for a, b in windows]
        indices = [torch.arange(a * m, max(a, b) * m) for a, b in own]
        ends = grid.offsets
        owners = [r for a, b in windows for r in range(grid.mpi.size) if ends[r] <= a and b <= ends[r + 1]]
        if grid.mpi.size == 1 or len(owners) < parts:  # a window of several ranks
            return Decomposition(self.size, indices, grid.mpi)
        return Decomposition(self.size, indices, grid.mpi, grid.mpi, owners)

    def preconditioner(self) -> Operator | None:
        """The inverse of the objective's own Hessian in the controls: the whole is this plus a compact operator."""
        form = self._own_form
        if form is None:
            return None
        design = DesignForm(self.problem, form)
        return lambda g: design.solve(g * self.scale) * self.scale

    @cached_property
    def _own_form(self) -> InnerProduct | None:
        """The objective's Hessian in the controls of each step; None where it is singular."""
        problem = self.problem
        if problem.param_dim:
            return None
        z = torch.zeros(problem.grid.n_local, problem.m, dtype=torch.float64)
        u = problem.initial_state(torch.zeros(problem.param_dim, dtype=torch.float64)).expand(len(z), -1)
        _, form = problem.objective.hessian_blocks(u, z, problem.grid.steps)
        form = form.agreed(problem.grid)
        if problem.grid.mpi.allreduce(int(bool(form.zero_rows().any()))):
            return None
        return form

    @property
    def _has_windows(self) -> bool:
        return self.problem.control_map is None and self.problem.param_dim == 0

    def local(self, decomposition: Decomposition, part: int, x: Tensor) -> SmoothFunction:
        """The objective of a window; of other parts, the whole one. Collective.

        Costs a gradient where f and f' at x are not those that were asked for last.
        """
        problem = self.problem
        indices = decomposition.parts[part]
        a, b = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)
        is_window = b - a == len(indices) and a % problem.m == b % problem.m == 0
        is_mine = problem.grid.mpi.size == 1 or decomposition.team is not None
        if not (self._has_windows and is_window and is_mine):
            return super().local(decomposition, part, x)
        z = self._at(x)
        if not self.reduced.is_at(z):
            self.value_and_gradient(x)
        return WindowFunction(self, a // problem.m, b // problem.m, x)


class WindowFunction(SmoothFunction):
    """d -> the objective of the steps of rows a to b of this rank at y + R' d, see above; its value at 0 is J.

    Args:
        whole: the function of all steps.
        a, b: rows of this rank, a <= row < b; an empty window for a part of another rank.
        y: the present unknowns of this rank.
    """

    def __init__(self, whole: ReducedFunction, a: int, b: int, y: Tensor) -> None:
        problem = whole.problem
        self.m, last = problem.m, min(b + whole.settings.horizon, problem.grid.n_local)
        share = (last - a) / problem.grid.num_steps
        super().__init__((b - a) * self.m, costs=whole.costs.times(share), tally=whole.tally)
        lin, lam = whole.reduced.linearization(whole._z), copy(whole.reduced.multiplier(whole._z))
        following, _ = problem.grid.shift_adjoint(lin.jacobian.vjp(lam.reshape(-1, problem.n))[0])
        if a == b:
            return
        rows = slice(a * self.m, last * self.m)
        self.scale, self.y, self._form = whole.scale[rows], y[rows], whole._own_form
        if self._form is not None:
            self._form = self._form[a:b]
        steps = problem.grid.begin + a, problem.grid.begin + last
        terminal = LinearTerminal(following[last - 1], steps[1])
        self.window = Window(problem, *steps, lin.u_old[a], terminal)
        self.reduced = ReducedObjective(self.window)
        self._z, self._g = (self.window.create_design() for _ in range(2))
        assign(self._z, self.y / self.scale)
        self.reduced.start_from(lin.u[a:last])
        self._offset = lin.value - self.reduced.value(self._z)

    def _at(self, d: Tensor) -> PETSc.Vec:
        y = self.y.clone()
        y[: self.size] += d
        assign(self._z, y / self.scale)
        return self._z

    def _value(self, x: Tensor) -> float:
        return self._offset + self.reduced.value(self._at(x))

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        value = self.reduced.value_and_gradient(self._at(x), self._g)
        return self._offset + value, (copy(self._g) / self.scale)[: self.size]

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        dz, whole = self._g.duplicate(), torch.zeros_like(self.y)
        whole[: self.size] = d
        assign(dz, whole / self.scale)
        self.reduced.hvp(self._at(x), dz, self._g)
        return (copy(self._g) / self.scale)[: self.size]

    def preconditioner(self) -> Operator | None:
        form, scale = self._form, self.scale[: self.size]
        if form is None:
            return None
        return lambda g: form.solve((g * scale).reshape(-1, self.m)).reshape(-1) * scale


class Window(ControlProblem):
    """The steps begin + 1 to end of a problem, from a given state, with one more term of the objective."""

    def __init__(self, problem: ControlProblem, begin: int, end: int, start: Tensor, term: Objective) -> None:
        self.start = start.clone()
        super().__init__(problem.constraint, problem.objective + term, problem.grid.window(begin, end))

    def initial_state(self, p: Tensor) -> Tensor:
        return self.start


class LinearTerminal(Objective):
    """c.u_k for one step k."""

    def __init__(self, c: Tensor, k: int) -> None:
        self.c, self.k = c.clone(), k

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return torch.where(steps.index == self.k, u @ self.c, 0.0)

    def gradient(self, u: Tensor, z: Tensor, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
        du = torch.where((steps.index == self.k)[:, None], self.c, 0.0)
        return du, torch.zeros_like(z), torch.zeros_like(steps.p)

    def hvp(
        self, u: Tensor, z: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(du), torch.zeros_like(dz), torch.zeros_like(dp)


def with_coarse_space(reduced: ReducedObjective, scale: PETSc.Vec | None = None) -> Hierarchy:
    """The reduced objective with controls constant on `-window_coarse` windows as its coarse space.

    It has none where the problem has a control map or global parameters, objectives with a target a step, fewer steps
    than windows, or windows that reach over ranks.
    """
    problem, fine = reduced.problem, ReducedFunction(reduced, scale)
    windows, grid = fine.settings.coarse, problem.grid
    if 0 < windows < grid.num_steps:
        try:
            return time_hierarchy(reduced, -(-grid.num_steps // windows), scale)
        except InputError:
            pass
    return Hierarchy([fine])


def time_hierarchy(reduced: ReducedObjective, factor: int, scale: PETSc.Vec | None = None) -> Hierarchy:
    """The reduced objective on the grid of the problem and on one with `factor` times longer steps.

    The unknowns are y = D z with D^2 the lumped metric; a coarse control is the same on all steps of its window. The
    objective and the constraint must serve both grids: targets are functions of time, or the same at all times.

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
    fine = ReducedFunction(reduced, RieszMetric(problem).root() if scale is None else scale)
    below = ReducedFunction(ReducedObjective(coarse), RieszMetric(coarse).root())
    below.costs = COSTS.times(grid.num_steps / problem.grid.num_steps)
    return Hierarchy([fine, below], [transfer])
