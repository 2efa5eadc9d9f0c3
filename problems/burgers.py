"""Optimal control of Burgers' equation u_t + (c u^2)_x - nu u_xx = z on (0,1), u = 0 at both ends.

P1 elements in space, theta scheme in time; the control acts on all nodes and is constant on each time
step (`-control interval`), or given at the nodes in time (`-control nodal`, the literature's scheme).

    python -m problems.burgers -nx 128 -nt 256 -sqp_monitor -plot burgers.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import pdeopt as po
from pdeopt.core import sections
from problems.shared import case
from problems.shared.command_line import command_line, start
from problems.shared.fields import Fields, Readable, StepField, TimeField
from problems.shared.pictures import Panel, space_time


@dataclass(frozen=True)
class BurgersSettings(po.Settings):
    """The Burgers problem."""

    nx: int = po.setting(128, "P1 elements; interior nodes with -control nodal", at_least=2)
    nt: int = po.setting(256, "time steps", at_least=2)
    nu: float = po.setting(0.01, "viscosity", above=0)
    alpha: float = po.setting(0.05, "control weight", above=0)
    theta: float = po.setting(
        None, "implicitness of the time scheme; default 1, with -control nodal 0.5", at_least=0.5, at_most=1, kind=float
    )
    flux: float = po.setting(0.5, "c in (c u^2)_x; 1/2 is u u_x", kind=float)
    T: float = po.setting(1.0, "final time", above=0)
    control: str = po.setting(
        "interval", "control constant on intervals, or linear between the nodes in time", choices=("interval", "nodal")
    )
    space_ranks: int = po.setting(1, "ranks that share each time step", at_least=1)


def mass_matrix(elements: int) -> sp.csr_matrix:
    """The P1 mass matrix on (0,1) with all nodes, exact integrals, (elements + 1)^2."""
    h = 1.0 / elements
    main = np.full(elements + 1, 2 * h / 3)
    main[[0, -1]] = h / 3
    off = np.full(elements, h / 6)
    return sp.diags([off, main, off], [-1, 0, 1]).tocsr()


class Burgers(po.TimeDependentConstraint):
    """M(u_k - u_{k-1}) + dt [th S(u_k) + (1 - th) S(u_{k-1})] - dt B z_k = 0 with S(u) = nu A u + N(u).

    N(u)_i = c int (u^2)_x phi_i. State: the interior nodes; control: all nodes (twice as many, for both
    ends of a step, with `nodal`; the step then sees their mean).

    Args:
        elements: number of P1 elements.
        nu, theta, flux: viscosity, implicitness, and c; c = 1/2 is the usual u u_x.
        initial: u_0 at the interior nodes, shape (elements - 1,).
        nodal: controls at both ends of a step.
    """

    def __init__(
        self, elements: int, nu: float, theta: float, flux: float, initial: Tensor, nodal: bool = False
    ) -> None:
        self.h, self.nu, self.theta, self.flux = 1.0 / elements, nu, theta, flux
        self.initial, self.nodal = initial, nodal
        n, m = elements - 1, elements + 1
        self.state_dim, self.control_dim = n, 2 * m if nodal else m
        Q = mass_matrix(elements)
        self.state_mass = po.StepMatrix.constant(Q[1:-1, 1:-1])
        self.control_mass = po.StepMatrix.constant(sp.block_diag([0.5 * Q, 0.5 * Q]) if nodal else Q)
        self.pattern = self._sparsity(n, Q)
        inside = torch.ones(n, 3, dtype=torch.bool)  # the first and last node have one neighbor less
        inside[0, 0] = inside[-1, 2] = False
        self._inside = inside.flatten().nonzero()[:, 0]
        self._masses: tuple[Tensor, dict[str, po.StepMatrix]] | None = None  # B and C for these lengths of steps

    def _sparsity(self, n: int, Q: sp.csr_matrix) -> po.StepPattern:
        tridiagonal, B = po.Sparsity.banded(n), Q[1:-1]
        controls = sp.hstack([B, B]) if self.nodal else B
        old = tridiagonal.csr if self.theta < 1 else sp.csr_matrix((n, n))
        curvature = sp.block_diag([old, tridiagonal.csr, sp.csr_matrix((self.control_dim, self.control_dim))])
        return po.StepPattern(tridiagonal, tridiagonal, controls, curvature)

    def initial_state(self, p: Tensor) -> Tensor:
        return self.initial

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        dt, th = steps.dt[:, None], self.theta
        if self.nodal:
            z = 0.5 * (z[:, : z.shape[1] // 2] + z[:, z.shape[1] // 2 :])
        S = th * self.spatial(u_new) + (1 - th) * self.spatial(u_old) if th < 1 else self.spatial(u_new)
        return self.mass_state(u_new - u_old) + dt * (S - self.mass(z))

    def spatial(self, u: Tensor) -> Tensor:
        """S(u) = nu A u + N(u), shape (batch, n)."""
        left, middle, right = neighbors(u)
        diffusion = (2 * middle - left - right) * (self.nu / self.h)
        return diffusion + (self.flux / 3) * (left + middle + right) * (right - left)

    def mass_state(self, u: Tensor) -> Tensor:
        """M u."""
        left, middle, right = neighbors(u)
        return (self.h / 6) * (left + 4 * middle + right)

    def mass(self, v: Tensor) -> Tensor:
        """B v: the free rows of the mass matrix for values at all nodes."""
        return (self.h / 6) * (v[:, :-2] + 4 * v[:, 1:-1] + v[:, 2:])

    # Everything below is optional: what automatic differentiation finds, by formula and a few times faster.

    def linearize(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> BurgersJacobian:
        dt, th, n = steps.lengths[:, None, None], self.theta, self.state_dim
        mass = self.h / 6 * torch.tensor([1.0, 4.0, 1.0], dtype=u_new.dtype).expand(1, n, 3)
        blocks: dict[str, Tensor | po.StepMatrix] = {"A": self._inner(mass + dt * th * self.spatial_bands(u_new))}
        if not (self._masses and torch.equal(self._masses[0], dt)):
            C = torch.cat([-0.5 * dt * mass] * 2, dim=2) if self.nodal else -dt * mass
            B, C = po.StepMatrix(self.pattern.B, self._inner(-mass)), po.StepMatrix(self.pattern.C, C.flatten(1))
            self._masses = dt, {"B": B, "C": C}
        blocks |= self._masses[1]
        if th < 1:
            blocks["B"] = self._inner(dt * (1 - th) * self.spatial_bands(u_old) - mass)
        return BurgersJacobian(self, (u_old, u_new, z), steps, self.pattern, blocks)

    def _inner(self, bands: Tensor) -> Tensor:
        """Entries of a tridiagonal matrix from (batch, n, 3), (batch, 3 n - 2)."""
        return bands.flatten(1).index_select(1, self._inside)

    def spatial_bands(self, u: Tensor) -> Tensor:
        """The diagonals of S'(u): derivatives by the left, own and right node, shape (batch, n, 3)."""
        left, middle, right = neighbors(u)
        diffusion, c = self.nu / self.h, self.flux / 3
        return torch.stack(
            [
                -diffusion - c * (2 * left + middle),
                2 * diffusion + c * (right - left),
                -diffusion + c * (2 * right + middle),
            ],
            dim=2,
        )


class BurgersJacobian(po.SparseStepJacobian):
    """The step Jacobian with its second derivatives: N is quadratic, so that of lam.N is the same at all states."""

    _last: tuple[Tensor, Tensor, Tensor] | None = None  # a multiplier and its curvature

    def hvp(
        self,
        lam: Tensor,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        th = self.constraint.theta
        h_new = None if d_new is None else self._product(lam, d_new)
        h_old = None if d_old is None or th == 1 else (1 - th) * self._product(lam, d_old)
        return h_old, h_new if h_new is None or th == 1 else th * h_new, None, None

    def _product(self, lam: Tensor, v: Tensor) -> Tensor:
        """dt (lam.N)'' v, shape (batch, n)."""
        if self._last is None or not torch.equal(self._last[0], lam):
            self._last = lam.clone(), *self._curvature_bands(lam)
        _, own, off = self._last
        out = own * v
        out[:, 1:].addcmul_(off, v[:, :-1])
        out[:, :-1].addcmul_(off, v[:, 1:])
        return out

    def _curvature_bands(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonals of dt (lam.N)'', a tridiagonal matrix: (batch, n), and beside it (batch, n - 1)."""
        scale = self.steps.dt[:, None] * (self.constraint.flux / 3)
        left, _, right = neighbors(lam)
        return 2 * scale * (left - right), scale * (lam[:, :-1] - lam[:, 1:])


def neighbors(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values at the left, own and right node of each interior node; zero on the boundary."""
    zero = torch.zeros_like(u[:, :1])
    padded = torch.cat([zero, u, zero], dim=1)
    return padded[:, :-2], u, padded[:, 2:]


class BurgersCase(Readable):
    """The tracking problem of the settings: u_0 = d = 1 on x <= 1/2, else 0.

    Args:
        settings: the parameters.
        comm: communicator of the time steps.

    Raises:
        InputError: parameters that are not legal, or more ranks than steps.
    """

    name = "burgers"

    def __init__(self, settings: BurgersSettings, comm: Any = None) -> None:
        po.check(settings)
        case.require_room({"-nx": settings.nx, "-nt": settings.nt}, settings.nt, 3 * settings.nx, comm)
        nodal = settings.control == "nodal"
        self.elements = settings.nx + 1 if nodal else settings.nx
        theta = (0.5 if nodal else 1.0) if settings.theta is None else settings.theta
        self.parameters = {**asdict(settings), "theta": theta}
        self.parameters.pop("space_ranks")  # a restart may split the ranks in another way
        self.nodes = np.arange(self.elements + 1) / self.elements
        self.target = (self.nodes[1:-1] <= 0.5).astype(float)
        grid = po.TimeGrid.uniform(settings.nt, settings.T, comm, settings.space_ranks)
        target = initial = torch.from_numpy(self.target)
        constraint: po.TimeDependentConstraint
        constraint = Burgers(self.elements, settings.nu, theta, settings.flux, initial, nodal)
        if settings.space_ranks > 1:
            constraint = spread = po.SpreadConstraint(constraint, grid)
            target = target[spread.own]
        objective = po.Tracking(target, constraint.state_mass) + po.ControlCost(settings.alpha, constraint.control_mass)
        control_map = po.ControlMap.nodal(grid, self.elements + 1) if nodal else None
        self.problem = po.ControlProblem(constraint, objective, grid, control_map)

    def fields(self, result: po.Result) -> Fields:
        """x, t, and over all nodes: target, state (nt + 1, nx + 1), control and multiplier."""
        problem = self.problem
        u, z, _ = problem.unpack(result)
        lam, _, _ = problem.fields(problem.join(result.multiplier, result.design))
        is_whole = problem.grid.space_ranks == 1  # also of controls at nodes in time, one more than steps
        steps, width = (-1, self.elements + 1) if is_whole else (len(u), problem.m)

        def padded(rows: Tensor, t: Tensor) -> np.ndarray:
            return np.pad(rows.numpy(), ((0, 0), (1, 1)))

        return {
            "x": self.nodes,
            "t": problem.grid.times,
            "target": TimeField(lambda t: np.pad(np.tile(self.target, (len(t), 1)), ((0, 0), (1, 1)))),
            "state": StepField(u, "state", padded, first=torch.from_numpy(self.target)),
            "control": StepField(z.reshape(steps, width), "control"),
            "multiplier": StepField(lam, "state", padded),
            "objective": np.array(result.objective),
        }

    def panels(self, arrays: dict[str, np.ndarray]) -> list[list[Panel]]:
        """Target, state and control over space-time."""
        return [space_time(arrays, (0.0, 1.0, 0.0, float(self.problem.grid.times[-1])))]


OPTIONS = [*sections(BurgersSettings), *case.OPTIONS]


def main(argv: Sequence[str] | None = None) -> float:
    """Solve the problem of the options and return the objective."""
    with command_line(argv, __doc__, OPTIONS):
        return case.run(BurgersCase(po.read(BurgersSettings)))


if __name__ == "__main__":
    start(main)
