"""Optimal control of the Klein-Gordon equation u_tt - u_xx + r u + g u^p = f + z.

P1 elements in space, the state is (u, v) with v = u_t.

`-variant boundary`: on (-1,1), r = 0, p = 2, with boundary values in time and a forcing such that x cos t
is the solution for z = 0, g = 1; implicit midpoint rule, control constant on each time step.
`-variant cubic`: on (0,1), r = 1, p = 3, at rest on the boundary, steered to zero; trapezoidal rule,
control given at the nodes in time.

    python -m problems.klein_gordon -solver newton -sqp_monitor -plot klein_gordon.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import pdeopt as po
from pdeopt.core import sections
from problems.burgers import mass_matrix
from problems.shared import case
from problems.shared.command_line import command_line, start
from problems.shared.fields import Fields, Readable, StepField, TimeField
from problems.shared.pictures import Panel, space_time


@dataclass(frozen=True)
class KleinGordonSettings(po.Settings):
    """The Klein-Gordon problem."""

    nx: int = po.setting(64, "P1 elements; interior nodes with -variant cubic", at_least=2)
    nt: int = po.setting(128, "time steps", at_least=2)
    T: float = po.setting(None, "final time; default 12, with -variant cubic 1", above=0, kind=float)
    alpha: float = po.setting(1e-2, "control weight", above=0)
    g: float = po.setting(1.0, "factor of the nonlinear term")
    variant: str = po.setting(
        "boundary", "moving boundary values and g u^2, or fixed ends and g u^3", choices=("boundary", "cubic")
    )
    space_ranks: int = po.setting(1, "ranks that share each time step", at_least=1)


class KleinGordon(po.TimeDependentConstraint):
    """The implicit midpoint rule for u_t = v, v_t - u_xx + g u^2 = f + z on (-1,1), u = x cos t at the ends.

        M (u_k - u_{k-1}) - dt M vbar = 0
        M_I: (v_k - v_{k-1}) + dt [A_I: ubar + g N(ubar) - M_I: (f(tbar) + z_k)] = 0

    Bars: the mean of both ends of a step; N(u)_i = int u^2 phi_i; M_I:, A_I: the free rows of the matrices on
    all nodes, where u and v have their boundary values; f: interpolated, such that u = x cos t for z = 0 and
    g = 1. State: u, then v, at the free nodes; control: all nodes. With the factor M in the first equation the
    mass matrix is the metric of both.

    Args:
        elements: number of P1 elements.
        g: factor of the nonlinear term.
        forced: with f and the boundary values; else both are zero.

    Attributes:
        left, right, reaction: ends of the interval, and r in the term r u.
        trapezoidal: the nonlinear term is the mean of that at both ends of a step, and so is the control.
        free, nodes: number of free nodes; all nodes, shape (elements + 1,).
        tracked_mass: M, for u alone.
    """

    conservative = True
    left, right, reaction = -1.0, 1.0, 0.0
    trapezoidal = False

    def __init__(self, elements: int, g: float, forced: bool = True) -> None:
        self.g, self.forced, length = g, forced, self.right - self.left
        self.h = length / elements
        self.nodes = self.left + length * torch.arange(elements + 1, dtype=torch.float64) / elements
        self.mass = self.h / 6 * torch.tensor([1.0, 4.0, 1.0], dtype=torch.float64)
        self.stiffness = torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64) / self.h + self.reaction * self.mass
        Q = length * mass_matrix(elements)
        M, self.free = Q[1:-1, 1:-1], elements - 1
        self.state_dim, self.control_dim = 2 * self.free, (2 if self.trapezoidal else 1) * (elements + 1)
        self.tracked_mass = po.StepMatrix.constant(M)
        self.state_mass = po.StepMatrix.constant(sp.block_diag([M, M]))
        self.control_mass = po.StepMatrix.constant(sp.block_diag([0.5 * Q, 0.5 * Q]) if self.trapezoidal else Q)
        self.pattern = self._sparsity(Q[1:-1])
        inside = torch.ones(self.free, 18 if self.trapezoidal else 15, dtype=torch.bool)
        inside[0, 0:12:3] = inside[-1, 2:12:3] = False  # the first and last node have one neighbor less
        self._inside = inside

    def _sparsity(self, B: sp.csr_matrix) -> po.StepPattern:
        n, m, band = self.free, self.control_dim, po.Sparsity.banded(self.free).csr
        C = sp.vstack([sp.csr_matrix((n, m)), sp.hstack([B, B]) if self.trapezoidal else B])
        W = sp.lil_matrix((4 * n + m, 4 * n + m))  # over [u_old | v_old | u_new | v_new | z]
        old, new = slice(0, n), slice(2 * n, 3 * n)
        if self.trapezoidal:
            W[old, old] = W[new, new] = sp.eye(n)
        else:
            W[old, old] = W[old, new] = W[new, old] = W[new, new] = band
        both = sp.bmat([[band, band], [band, band]])
        return po.StepPattern(both, both, C, W)

    def initial_state(self, p: Tensor) -> Tensor:
        return with_zeros(self.nodes[1:-1])

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        dt = steps.dt[:, None]
        (u0, v0), (u1, v1) = self.on_all_nodes(u_old, steps.t_old), self.on_all_nodes(u_new, steps.t_new)
        slip = (u1 - u0 - 0.5 * dt * (v0 + v1))[:, 1:-1]
        force = stencil(self.stiffness, 0.5 * (u0 + u1)) + self.g * self.nonlinear(self.stages(u0, u1)).mean(0)
        push = self.forcing(steps.t_mid) + (z.unflatten(1, (2, -1)).mean(1) if self.trapezoidal else z)
        momentum = stencil(self.mass, v1 - v0 - dt * push) + dt * force
        return torch.cat([stencil(self.mass, pad(slip)), momentum], dim=1)

    def on_all_nodes(self, state: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """u and v with their boundary values at the times t, each (batch, elements + 1)."""
        u, v = state.chunk(2, dim=1)
        return self._with_ends(u, torch.cos(t)), self._with_ends(v, -torch.sin(t))

    def _with_ends(self, u: Tensor, factor: Tensor) -> Tensor:
        if not self.forced:
            return pad(u)
        ends = self.nodes[[0, -1]] * factor[:, None]
        return torch.cat([ends[:, :1], u, ends[:, 1:]], dim=1)

    def forcing(self, t: Tensor) -> Tensor:
        """f on all nodes at the times t, (batch, elements + 1)."""
        u = self.nodes * torch.cos(t)[:, None]
        return u * u - u if self.forced else torch.zeros_like(u)

    def stages(self, old: Tensor, new: Tensor) -> Tensor:
        """Where the nonlinear term is taken, (stages, batch, ...): at the midpoint, or at both ends.

        Its derivative by `old` is half of that at the first stage, by `new` half of that at the last.
        """
        return torch.stack([old, new] if self.trapezoidal else [0.5 * (old + new)])

    def nonlinear(self, u: Tensor) -> Tensor:
        """N(u) from values on all nodes, (..., elements + 1) -> (..., elements - 1)."""
        left, middle, right = neighbors(u)
        return self.h / 12 * ((left + middle) ** 2 + 4 * middle**2 + (middle + right) ** 2)

    # Everything below is optional: what automatic differentiation finds, by formula and a few times faster.

    def nonlinear_bands(self, u: Tensor) -> Tensor:
        """The diagonals of N'(u), symmetric: derivatives by the left, own and right node, (..., free, 3)."""
        left, middle, right = neighbors(u)
        return self.h / 6 * torch.stack([left + middle, left + 6 * middle + right, middle + right], dim=-1)

    def nonlinear_curvature(self, u: Tensor, lam: Tensor, d: Tensor) -> Tensor:
        """(lam.N)''(u) d for lam and d on the free nodes: N'(d) lam, as N is quadratic."""
        return stencil(self.nonlinear_bands(pad(d)), pad(lam))

    def linearize(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> KleinGordonJacobian:
        dt = steps.dt[:, None, None]
        (u0, _), (u1, _) = self.on_all_nodes(u_old, steps.t_old), self.on_all_nodes(u_new, steps.t_new)
        bands = self.g * self.nonlinear_bands(self.stages(u0, u1))
        M, S_old, S_new = (part.expand(len(steps), self.free, 3) for part in (self.mass, bands[0], bands[-1]))
        S_old, S_new = (0.5 * dt * (self.stiffness + part) for part in (S_old, S_new))
        C = [-0.5 * dt * M, -0.5 * dt * M] if self.trapezoidal else [-dt * M]
        slip = torch.cat([-M, -0.5 * dt * M, M, -0.5 * dt * M], dim=2)  # by row, as the pattern [B A C]
        momentum = torch.cat([S_old, -M, S_new, M, *C], dim=2)
        values = torch.cat([slip[:, self._inside[:, :12]], momentum[:, self._inside]], dim=1)
        return KleinGordonJacobian(self, (u_old, u_new, z), steps, self.pattern, values)


class KleinGordonJacobian(po.SparseStepJacobian):
    """The step Jacobian with its second derivatives, which are those of N."""

    def hvp(
        self,
        lam: Tensor,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kg, n, dt, (u_old, u_new, z, p) = self.constraint, self.constraint.free, self.steps.dt[:, None], self.point
        d_old, d_new = self._directions(d_old, d_new)
        u, d = kg.stages(u_old[:, :n], u_new[:, :n]), kg.stages(d_old[:, :n], d_new[:, :n])
        h = 0.5 * kg.g * dt * kg.nonlinear_curvature(u, lam[:, n:], d)
        return with_zeros(h[0]), with_zeros(h[-1]), torch.zeros_like(z), p


class CubicKleinGordon(KleinGordon):
    """The trapezoidal rule for u_t = v, v_t - u_xx + u + g u^3 = z on (0,1), u = 0 at the ends, u_0 = sin pi x.

        M (u_k - u_{k-1}) - dt M vbar = 0
        M (v_k - v_{k-1}) + dt [(A + M) ubar + g h (u_{k-1}^3 + u_k^3) / 2 - B (z_{k-1} + z_k) / 2] = 0

    The cubic term is lumped, and nothing else. Control: values on all nodes at both ends of a step.
    """

    left, right, reaction = 0.0, 1.0, 1.0
    trapezoidal = True

    def __init__(self, elements: int, g: float) -> None:
        super().__init__(elements, g, forced=False)

    def initial_state(self, p: Tensor) -> Tensor:
        return with_zeros(torch.sin(torch.pi * self.nodes[1:-1]))

    def nonlinear(self, u: Tensor) -> Tensor:
        return self.h * u[..., 1:-1] ** 3

    def nonlinear_bands(self, u: Tensor) -> Tensor:
        own = 3 * self.h * u[..., 1:-1] ** 2
        return torch.stack([torch.zeros_like(own), own, torch.zeros_like(own)], dim=-1)

    def nonlinear_curvature(self, u: Tensor, lam: Tensor, d: Tensor) -> Tensor:
        return 6 * self.h * u * lam * d


def pad(u: Tensor) -> Tensor:
    """Values at the free nodes with zeros at both ends."""
    return torch.nn.functional.pad(u, (1, 1))


def with_zeros(u: Tensor) -> Tensor:
    """The state (u, 0)."""
    return torch.cat([u, torch.zeros_like(u)], dim=-1)


def neighbors(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values at the left, own and right node of each free node, from those at all nodes."""
    return u[..., :-2], u[..., 1:-1], u[..., 2:]


def stencil(bands: Tensor, u: Tensor) -> Tensor:
    """The product of a matrix, given by its diagonals (..., 3), with values at all nodes; rows of the free ones."""
    left, middle, right = neighbors(u)
    return bands[..., 0] * left + bands[..., 1] * middle + bands[..., 2] * right


def swinging(x: Tensor, T: float, t: Tensor) -> Tensor:
    """The target x cos t + sin(pi x) (t/T)^2 at the nodes and times, (batch, nodes)."""
    t = t[:, None]
    return x * torch.cos(t) + torch.sin(torch.pi * x) * (t / T) ** 2


def zero(x: Tensor, T: float, t: Tensor) -> Tensor:
    """The target zero at the nodes and times, (batch, nodes)."""
    return torch.zeros(len(t), len(x), dtype=x.dtype)


class KleinGordonCase(Readable):
    """The tracking problem of the settings; only u is tracked.

    `target` maps times to d on all nodes: x cos t + sin(pi x) (t/T)^2, or zero with `-variant cubic`.

    Args:
        settings: the parameters.
        comm: communicator of the time steps.

    Raises:
        InputError: parameters that are not legal, or more ranks than steps.
    """

    name = "klein_gordon"

    def __init__(self, settings: KleinGordonSettings, comm: Any = None) -> None:
        po.check(settings)
        case.require_room({"-nx": settings.nx, "-nt": settings.nt}, settings.nt, 5 * settings.nx, comm)
        cubic = settings.variant == "cubic"
        self.T = (1.0 if cubic else 12.0) if settings.T is None else settings.T
        self.parameters = {**asdict(settings), "T": self.T}
        self.parameters.pop("space_ranks")  # a restart may split the ranks in another way
        grid = po.TimeGrid.uniform(settings.nt, self.T, comm, settings.space_ranks)
        if cubic:
            self.constraint: KleinGordon = CubicKleinGordon(settings.nx + 1, settings.g)
        else:
            self.constraint = KleinGordon(settings.nx, settings.g)
        free = self.constraint.free
        target = self.target = partial(zero if cubic else swinging, self.constraint.nodes, self.T)
        constraint: po.TimeDependentConstraint = self.constraint
        tracking = po.Tracking(lambda t: target(t)[:, 1:-1], self.constraint.tracked_mass, np.arange(free))
        if settings.space_ranks > 1:
            constraint = spread = po.SpreadConstraint(self.constraint, grid)
            mass = sp.block_diag([self.constraint.tracked_mass.as_csr(), sp.csr_matrix((free, free))])
            tracking = po.Tracking(lambda t: with_zeros(target(t)[:, 1:-1])[:, spread.own], spread.form(mass))
        objective = tracking + po.ControlCost(settings.alpha, constraint.control_mass)
        control_map = po.ControlMap.nodal(grid, free + 2) if cubic else None
        self.problem = po.ControlProblem(constraint, objective, grid, control_map)

    def fields(self, result: po.Result) -> Fields:
        """x, t, and over all nodes: target, state u, velocity v, control, multipliers.

        `multiplier` is that of the second equation, `multiplier_u` that of the first; both (nt, elements + 1).
        """
        problem, kg = self.problem, self.constraint
        u, z, _ = problem.unpack(result)
        lam, _, _ = problem.fields(problem.join(result.multiplier, result.design))
        is_whole = problem.grid.space_ranks == 1  # also of controls at nodes in time, one more than steps
        steps, width = (-1, kg.free + 2) if is_whole else (len(u), problem.m)
        first = kg.initial_state(torch.zeros(0))

        def of_states(k: int) -> StepField:
            return StepField(u, "state", lambda rows, t: kg.on_all_nodes(rows, t)[k].numpy(), first)

        def of_multipliers(k: int) -> StepField:
            return StepField(lam, "state", lambda rows, t: pad(rows.chunk(2, dim=1)[k]).numpy())

        return {
            "x": kg.nodes.numpy(),
            "t": problem.grid.times,
            "target": TimeField(lambda t: self.target(t).numpy()),
            "state": of_states(0),
            "velocity": of_states(1),
            "control": StepField(z.reshape(steps, width), "control"),
            "multiplier": of_multipliers(1),
            "multiplier_u": of_multipliers(0),
            "objective": np.array(result.objective),
        }

    def panels(self, arrays: dict[str, np.ndarray]) -> list[list[Panel]]:
        """Target, state and control over space-time."""
        return [space_time(arrays, (self.constraint.left, self.constraint.right, 0.0, self.T))]


OPTIONS = [*sections(KleinGordonSettings), *case.OPTIONS]


def main(argv: Sequence[str] | None = None) -> float:
    """Solve the problem of the options and return the objective."""
    with command_line(argv, __doc__, OPTIONS):
        return case.run(KleinGordonCase(po.read(KleinGordonSettings)))


if __name__ == "__main__":
    start(main)
