"""Inequalities c(u_i, z_i, p) <= 0 at the steps: bounds on states and controls, and functions along the path.

Written as constraints are, for a batch of steps, and weighted as integrals are: a multiplier nu is a function (a
density) whose part of the Lagrangian is sum_i w_i'(nu_i c_i), w_i = dt_i times the lumped mass, so that it does not
depend on mesh and time step. (Multipliers of bounds on states are measures: their densities grow with refinement, their
integrals w'nu converge. E. Casas, Control of an elliptic problem with pointwise state constraints, SIAM J. Control
Optim. 24, 1986.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.objective import Objective, Sum
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import Array, real_array
from pdeopt.core.errors import InputError
from pdeopt.optimize.parts.pathterms import BoundGroup, Excess, Group, InequalityTerm, PathConstraint, PathGroup
from pdeopt.steps.timegrid import Steps, require_whole_steps

#: A number; values of the components; rows of this rank, one a step; or a function of the times. None for no bound.
Limit = Any


@dataclass(frozen=True)
class InequalityReport:
    """What a solution says about one kind of inequality.

    Attributes:
        name: "state_upper", "control_lower", or that of a path constraint.
        density: the multiplier nu >= 0 of each step of this rank and entry, (n_local, k).
        integral: sum of w nu over all steps and entries, which a refinement leaves as it is.
        violation: the largest c, at least 0.
        active: how many entries are active.
        step, time, component: where the multiplier is largest: 1..N, t_i, 0..k-1; where ranks share a step, the natural
            number of the unknown.
        slack: s > 0 with c + s = 0, (n_local, k).
    """

    name: str
    density: Tensor
    integral: float
    violation: float
    active: int
    step: int
    time: float
    component: int
    slack: Tensor

    def as_row(self) -> dict[str, Any]:
        """All but rows of tensors, as values of JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("density", "slack")}


class Inequalities:
    """All inequalities c <= 0 of a problem, K entries a step: values, derivatives and weights by rows (n_local, K).

    Entries that ask for nothing have c = -1, no derivative and weight 0. Calls are collective.

    Args:
        problem: whose steps these are.
        lower, upper: bounds on the controls of the steps.
        state_lower, state_upper: bounds on the states. Each bound is a number; values of the components, (n,) or (m,);
            rows of this rank, (n_local, n) or (n_local, m); or a function of the times, (batch,) -> (batch, n).
            Infinite entries are no bounds. The node t_0 has none: there u_0 is given. Where ranks share a step, n and m
            are the unknowns of this rank.
        path: a function c(u, z, steps), a `PathConstraint`, or several of them, of different names; functions without
            one are path[0], path[1], ... Not where ranks share a step.

    Attributes:
        weight: w.
        kept: which entries ask for something.
        scale: the size of what is bounded.
        measure: sum w.

    Raises:
        InputError: other shapes, NaN, lower > upper, a fixed u_0 outside the bounds of the first step, bounds on
            parameters, or nothing that is bounded.

    Example:
        >>> rows = Inequalities(problem, state_upper=0.5)
        >>> c = rows.value(problem.at(x))
    """

    def __init__(
        self,
        problem: ControlProblem,
        lower: Limit = None,
        upper: Limit = None,
        state_lower: Limit = None,
        state_upper: Limit = None,
        path: Any = None,
    ) -> None:
        self.problem, self.groups = problem, list[Group]()
        self._add_bounds("control", 1, lower, upper)
        self._add_bounds("state", 0, state_lower, state_upper)
        several = path if isinstance(path, Sequence) else [] if path is None else [path]
        if several:
            require_whole_steps(problem.grid, "path constraints", "bounds on states and controls, or space_ranks 1")
        for k, each in enumerate(several):
            name = "path" if len(several) == 1 else f"path[{k}]"
            named = each if isinstance(each, PathConstraint) else PathConstraint(each, name=name)
            self.groups.append(PathGroup(problem, named))
        if not self.groups:
            raise InputError("inequalities", "none", "lower | upper | state_lower | state_upper | path")
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):  # results have them by name
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError("path", f"two inequalities of the name {twice}", "PathConstraint(function, name=another)")
        self._sizes = [group.size for group in self.groups]
        start = problem.at(problem.join(problem.constant_state(problem.create_design()), problem.create_design()))
        c = self.at(start.u, start.z_step, start.steps)
        self.kept = c > -math.inf
        if not problem.grid.sum(self.kept.any().double()) > 0:
            raise InputError("inequalities", "bounds that are all infinite", "a finite one")
        self.weight = torch.where(self.kept, torch.cat([group.weight for group in self.groups], dim=1), 0.0)
        scales = [g.scale(part).expand_as(part) for g, part in zip(self.groups, c.split(self._sizes, dim=1))]
        self.scale = torch.where(self.kept, torch.cat(scales, dim=1), 1.0)
        self.measure = float(problem.grid.sum(self.weight.sum()))

    def _add_bounds(self, what: str, field: int, lower: Limit, upper: Limit) -> None:
        problem = self.problem
        if lower is None and upper is None:
            return
        ends = {"lower": (lower, -math.inf), "upper": (upper, math.inf)}
        low, high = (_limits(problem, values, field, f"{what}_{end}", free) for end, (values, free) in ends.items())
        if problem.grid.max((~(low <= high) | (low == math.inf) | (high == -math.inf)).any().double()) > 0:
            raise InputError(f"{what} bounds", "a lower bound above the upper one, or NaN", "lower <= upper")
        if field == 0:
            _require_start(problem, low, high)
        for end, limit, given, other in (("lower", low, lower, high), ("upper", high, upper, low)):
            if given is not None:
                self.groups.append(BoundGroup(problem, f"{what}_{end}", field, limit, other))

    def at(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """c at states and controls of the steps of this rank, -inf where that asks for nothing."""
        return torch.cat([group.value(u, z, steps) for group in self.groups], dim=1)

    def value(self, lin: Linearization) -> Tensor:
        """c at a linearization."""
        return torch.where(self.kept, self.at(lin.u, lin.z_step, lin.steps), -1.0)

    def jvp(self, lin: Linearization, dx: PETSc.Vec) -> Tensor:
        """c' dx."""
        du, dz, dp = self.problem.fields(dx)
        point, direction = (lin.u, lin.z_step, lin.steps), (du, lin.controls(dz), dp)
        return torch.where(self.kept, torch.cat([g.jvp(point, *direction) for g in self.groups], dim=1), 0.0)

    def vjp(self, lin: Linearization, r: Tensor) -> PETSc.Vec:
        """The transpose of c' times rows, a new vector like x."""
        point, r = (lin.u, lin.z_step, lin.steps), torch.where(self.kept, r, 0.0)
        parts = [g.vjp(point, part) for g, part in zip(self.groups, r.split(self._sizes, dim=1))]
        u, z, p = (torch.stack(part).sum(0) for part in zip(*parts))
        out = self.problem.create_primal()
        return self.problem.layout.pack(out, u, lin.controls.adjoint(z), self.problem.grid.sum(p))

    def with_hessian(self, lin: Linearization, sigma: Tensor, nu: Tensor | None) -> Linearization:
        """The same point, where the objective's Hessian has c' diag(sigma) c' + w nu.c'' on top; no nu, no c''."""
        parts = sigma.split(self._sizes, dim=1)
        bends = [None] * len(parts) if nu is None else (self.weight * nu).split(self._sizes, dim=1)
        term = lin.objective
        for group, part, bend in zip(self.groups, parts, bends):
            term = term + InequalityTerm(group, self.problem.grid.begin, part, bend)
        return lin.with_objective(term)

    def penalty(self, gamma: float, nu: Tensor | None = None) -> Objective:
        """gamma/2 sum w max(c / scale + a, 0)^2, a term for the objective whose multipliers are `pressed`.

        Args:
            gamma: the price of violations.
            nu: multipliers that are known, (n_local, K), a = scale nu / gamma; None for none.
        """
        parts = (gamma * self.weight / self.scale.square()).split(self._sizes, dim=1)
        ahead = [None] * len(parts) if nu is None else (self.scale.square() * nu / gamma).split(self._sizes, dim=1)
        begin = self.problem.grid.begin
        return Sum(*(Excess(group, begin, part, a) for group, part, a in zip(self.groups, parts, ahead)))

    def pressed(self, gamma: float, c: Tensor, nu: Tensor | None = None) -> Tensor:
        """The multipliers max(nu + gamma c / scale^2, 0) of `penalty`, (n_local, K)."""
        return torch.where(self.kept, torch.relu(gamma * c / self.scale.square() + (0.0 if nu is None else nu)), 0.0)

    @property
    def are_bounds(self) -> bool:
        """Whether all are bounds, whose Hessian is diagonal."""
        return all(isinstance(group, BoundGroup) for group in self.groups)

    def integral(self, rows: Tensor) -> float:
        """sum w rows."""
        return float(self.problem.grid.sum((self.weight * rows).sum()))

    def norm(self, rows: Tensor) -> float:
        """sqrt(sum w rows^2)."""
        return math.sqrt(self.integral(rows.square()))

    def largest(self, rows: Tensor) -> float:
        """The largest entry that is kept, -inf where a rank has none."""
        kept = torch.where(self.kept, rows, -math.inf)
        return float(self.problem.grid.max(kept.max() if kept.numel() else torch.tensor(-math.inf)))

    def where(self, rows: Tensor, group: Group | None = None) -> tuple[str, int, float, int]:
        """Where an entry of `rows`, of all or of a group, is largest: name, step, time and component."""
        grid, best = self.problem.grid, (-math.inf, "", 0, 0.0, 0)
        kept = torch.where(self.kept, rows, -math.inf).split(self._sizes, dim=1)
        for each, part in zip(self.groups, kept):
            if part.numel() and (group is None or each is group):
                row, component = divmod(int(part.argmax()), each.size)
                step, time = int(grid.steps.index[row]), float(grid.steps.t_new[row])
                number = int(each.numbers[component]) if grid.space_ranks > 1 else component
                best = max(best, (float(part[row, component]), each.name, step, time, number))
        _, name, step, time, component = max(grid.mpi.allgather(best))
        return name, step, time, component

    def reports(self, c: Tensor, s: Tensor, nu: Tensor) -> dict[str, InequalityReport]:
        """What values, slacks and multipliers say about each group, by its name."""
        grid, found = self.problem.grid, dict[str, InequalityReport]()
        rows = (c, s / self.scale, self.scale, nu, self.weight, self.kept)
        parts = (each.split(self._sizes, dim=1) for each in rows)
        for group, g_c, g_s, g_scale, g_nu, w, kept in zip(self.groups, *parts):
            _, step, time, component = self.where(nu, group)
            largest = max(float(grid.max((kept * g_nu).max())), 1e-300)
            found[group.name] = InequalityReport(
                name=group.name,
                density=g_nu * kept,
                integral=float(grid.sum((w * g_nu).sum())),
                violation=max(float(grid.max(torch.where(kept, g_c, -1.0).max())), 0.0),
                active=int(grid.sum((kept & (g_nu / largest > g_s)).sum().double())),
                step=step,
                time=time,
                component=component,
                slack=g_s * g_scale,
            )
        return found


def whole_rows(inequalities: Inequalities, rows: Tensor) -> list[list[float]]:
    """Rows of all ranks, each step with its entries in natural order, for a restart on any ranks. Collective."""
    grid, (columns, width) = inequalities.problem.grid, _places(inequalities)
    found = np.empty((grid.num_steps, width))
    for begin, places, part in grid.mpi.allgather((grid.begin, columns, rows.numpy())):
        found[begin : begin + len(part), places] = part
    values: list[list[float]] = found.tolist()
    return values


def own_rows(inequalities: Inequalities, whole: list[list[float]]) -> Tensor:
    """What this rank has of such rows. Raises `InputError` where they are those of other inequalities."""
    found, grid, (columns, width) = np.array(whole, dtype=float), inequalities.problem.grid, _places(inequalities)
    if found.shape != (grid.num_steps, width):
        legal = f"shape ({grid.num_steps}, {width})"
        raise InputError("multipliers of inequalities of an earlier run", f"shape {found.shape}", legal)
    return torch.from_numpy(found[grid.begin : grid.end][:, columns])


def _places(inequalities: Inequalities) -> tuple[Array, int]:
    """The places of the entries of this rank in those of all, (K,), and how many these are."""
    starts = np.cumsum([0, *(group.whole_size for group in inequalities.groups)])
    own = [start + group.numbers for start, group in zip(starts, inequalities.groups)]
    return np.concatenate(own), int(starts[-1])


def _require_start(problem: ControlProblem, low: Tensor, high: Tensor) -> None:
    """Refuse a fixed u_0 outside the bounds of the first step. Collective."""
    if problem.param_dim or not len(problem.grid.node_zero):
        return  # there is none
    u0, first = problem.initial_state(torch.zeros(0, dtype=torch.float64)), (math.inf, 0.0)
    wrong = ((u0 < low[0]) | (u0 > high[0])).nonzero() if problem.grid.is_first else torch.empty(0)
    if len(wrong):
        layout, at = problem.constraint.layout if problem.grid.space_ranks > 1 else None, int(wrong[0])
        first = at if layout is None else int(layout.natural[at]), float(u0[at])
    component, value = min(problem.grid.mpi.allgather(first))
    if component < math.inf:
        got = f"the fixed initial state outside them: component {component} is {value:.6g}"
        raise InputError("state bounds", got, "bounds that u_0 keeps, or infinite ones at early steps")


def _limits(problem: ControlProblem, values: Limit, field: int, what: str, free: float) -> Tensor:
    """Bounds by rows of this rank, (n_local, n) or (n_local, m). Collective."""
    rows, size = problem.grid.n_local, (problem.n, problem.m)[field]
    if values is None:
        return torch.full((rows, size), free, dtype=torch.float64)
    array: Array = real_array(values(problem.grid.steps.t_new) if callable(values) else values, what)
    if field == 1 and array.shape == (rows * size,) != (size,) and problem.control_map is None:
        array = array.reshape(rows, size)
    if array.shape == (rows, 1):  # a number a step
        array = np.broadcast_to(array, (rows, size))
    wrong = array.shape not in ((), (size,), (rows, size)) or size == 0 or isinstance(array, np.ma.MaskedArray)
    if problem.grid.max(torch.tensor(float(wrong))) > 0:
        legal = f"a number, ({size},), rows of this rank, ({rows}, {size}), or a function of the times that gives them"
        raise InputError(what, f"shape {array.shape}", legal if size else "no bound: there are no such unknowns")
    return torch.from_numpy(np.broadcast_to(array, (rows, size)).copy())
