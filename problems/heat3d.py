"""Optimal control of the heat equation u_t - kappa Lap u = z in the unit cube, its steps spread over ranks.

Finite differences on n^3 interior nodes, u = 0 on the boundary, implicit Euler, a control for each node and step. With
`-space_ranks k`, k ranks share the nodes of each step, cut into boxes; the rest of the ranks go along time.

`-discretization elements` is the same as a weak form of DOLFINx (`make setup-fenicsx`): trilinear elements on (n + 1)^3
cubes, a control for each node, boundary included; `lumped` takes the integrals by the trapezoidal rule at the nodes,
and has the equations of the finite differences, to rounding.

    mpiexec -n 4 python -m problems.heat3d -n 16 -nt 16 -space_ranks 2 -sqp_monitor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

import pdeopt as po
from pdeopt.core import sections
from problems.shared import case
from problems.shared.command_line import command_line, start
from problems.shared.fields import Fields, Readable, StepField
from problems.shared.files import SeriesFiles, SolutionFile, check_targets
from problems.shared.pictures import Panel


@dataclass(frozen=True)
class Heat3dSettings(po.Settings):
    """The heat problem in the cube."""

    n: int = po.setting(16, "interior nodes along each edge", at_least=2)
    nt: int = po.setting(16, "time steps", at_least=2)
    T: float = po.setting(1.0, "final time", above=0)
    kappa: float = po.setting(0.05, "conductivity", above=0)
    alpha: float = po.setting(1e-3, "control weight", above=0)
    space_ranks: int = po.setting(1, "ranks that share each time step", at_least=1)
    discretization: str = po.setting(
        "differences",
        "finite differences; trilinear elements by DOLFINx, or these with integrals by values at nodes",
        choices=("differences", "elements", "lumped"),
    )


class Heat3d(po.SpaceConstraint):
    """h^3 [u_k - u_{k-1} - dt (kappa Lap_h u_k + z_k)] = 0 with u_0 = 0, at the nodes that a rank owns.

    Args:
        comm: of the ranks of a step.
        n: interior nodes along each edge, h = 1/(n + 1).
        kappa: conductivity.
    """

    is_affine = True

    def __init__(self, comm: Any, n: int, kappa: float) -> None:
        patch = po.grid_layout(comm, (n, n, n))
        super().__init__(patch.layout)
        self.kappa, self.h = kappa, 1.0 / (n + 1)
        self.order, self.patch = torch.from_numpy(patch.order), patch
        own, seen = patch.layout.n_owned, patch.layout.n_all
        self.state_mass = self.control_mass = po.StepMatrix.constant(self.h**3 * sp.identity(own))
        self.pattern = self.step_pattern(patch.stencil(), sp.eye(own, seen), sp.identity(own))

    def local_residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        own = slice(0, self.layout.n_owned)
        rate = self.kappa * self.laplace(u_new) + z
        return self.h**3 * (u_new[:, own] - u_old[:, own] - steps.lengths[:, None] * rate)

    def laplace(self, u: Tensor) -> Tensor:
        """Lap_h u at the owned nodes, (batch, n_all) -> (batch, n_owned), zero outside the cube."""
        v = torch.nn.functional.pad(u, (0, 1))[:, self.order]  # boxes with a frame
        m = slice(1, -1)
        total = v[:, 2:, m, m] + v[:, :-2, m, m] + v[:, m, 2:, m] + v[:, m, :-2, m] + v[:, m, m, 2:] + v[:, m, m, :-2]
        return ((total - 6.0 * v[:, m, m, m]) / self.h**2).reshape(len(u), -1)

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.zeros(self.layout.n_owned, dtype=torch.float64)


def heat_form(grid: po.TimeGrid, n: int, kappa: float, is_lumped: bool) -> tuple[po.FormConstraint, Any]:
    """The same equation as a weak form, and the function space of states and controls.

    Args:
        grid: whose ranks share the mesh.
        n, kappa: see `Heat3d`.
        is_lumped: integrals by the trapezoidal rule at the nodes.
    """
    try:
        from dolfinx import fem, mesh
        from ufl import TestFunction, dx, grad, inner
    except ImportError:
        raise po.InputError("-discretization", "no DOLFINx", "differences, or make setup-fenicsx") from None
    words = {"cell_type": mesh.CellType.hexahedron, "partitioner": po.mesh_partitioner(grid)}
    cube = mesh.create_box(grid.space, [np.zeros(3), np.ones(3)], [n + 1] * 3, **words)
    V = po.function_space(cube, ("Lagrange", 1))
    u, u_old, z, v, dt = fem.Function(V), fem.Function(V), fem.Function(V), TestFunction(V), fem.Constant(cube, 0.0)
    dV = dx(metadata={"quadrature_rule": "GLL", "quadrature_degree": 1}) if is_lumped else dx
    F = ((u - u_old) * v + dt * (kappa * inner(grad(u), grad(v)) - z * v)) * dV
    faces = fem.locate_dofs_geometrical(V, lambda x: np.isclose(abs(x - 0.5).max(0), 0.5))
    masses = {"state_mass": 0.5 * u**2 * dV, "control_mass": 0.5 * z**2 * dV}
    return po.FormConstraint(F, u, u_old, z, dt, bcs=[fem.dirichletbc(0.0, faces, V)], **masses), V


def _cubes(rows: Tensor, t: Tensor) -> np.ndarray:
    """(batch, side^3) -> (batch, side, side, side)."""
    side = round(rows.shape[1] ** (1 / 3))
    return rows.numpy().reshape(-1, side, side, side)


class Heat3dCase(Readable):
    """Tracking of a bump that moves along the diagonal of the cube.

    Args:
        settings: the parameters.
        comm: communicator of all ranks.

    Raises:
        InputError: parameters that are not legal, ranks that are no multiple of `space_ranks`, or no DOLFINx.
    """

    name = "heat3d"

    def __init__(self, settings: Heat3dSettings, comm: Any = None) -> None:
        po.check(settings)
        case.require_room({"-n": settings.n, "-nt": settings.nt}, settings.nt, 3 * settings.n**3, comm)
        self.settings, self.parameters = settings, asdict(settings)
        self.parameters.pop("space_ranks")  # a restart may split the ranks in another way
        grid = po.TimeGrid.uniform(settings.nt, settings.T, comm, settings.space_ranks)
        self.h, kind = 1.0 / (settings.n + 1), settings.discretization
        self.constraint: Heat3d | po.FormConstraint
        if kind == "differences":
            self.constraint = Heat3d(grid.space_comm, settings.n, settings.kappa)
            places = (np.stack(np.unravel_index(self.constraint.layout.natural, (settings.n,) * 3)) + 1.0) * self.h
        else:
            self.constraint, self.V = heat_form(grid, settings.n, settings.kappa, kind == "lumped")
            places = self.V.tabulate_dof_coordinates()[self.constraint.state_dofs].T
        self.points = torch.from_numpy(places.copy())  # of the owned nodes, (3, n_owned)
        objective = po.Tracking(self.target, self.constraint.state_mass)
        objective += po.ControlCost(settings.alpha, self.constraint.control_mass)
        self.problem = po.ControlProblem(self.constraint, objective, grid)

    def target(self, t: Tensor) -> Tensor:
        """d at the owned nodes: times (batch,) -> (batch, n_owned)."""
        center = 0.25 + 0.5 * t[:, None, None] / self.settings.T
        return torch.sin(torch.pi * t[:, None]) * torch.exp(-8 * (self.points - center).square().sum(1))

    def fields(self, result: po.Result) -> Fields:
        """Over times and all nodes in their natural order: target, state, control and multiplier; and t.

        Those of the control are n + 2 along each edge with `elements`, for it has the nodes of the boundary, too.
        """
        problem = self.problem
        u, z, _ = problem.unpack(result)
        lam, _, _ = problem.fields(problem.join(result.multiplier, result.design))
        rows = {"state": u, "multiplier": lam, "target": self.target(problem.grid.steps.t_new)}
        control = StepField(z.reshape(len(u), problem.m), "control", _cubes)
        cubes = {name: StepField(part, "state", _cubes) for name, part in rows.items()}
        return {"t": problem.grid.times, **cubes, "control": control, "objective": np.array(result.objective)}

    def write_series(self, path: str, result: po.Result) -> None:
        """State, control and target; no rank gathers more than its rows. Collective."""
        grid, constraint, (u, z, _) = self.problem.grid, self.constraint, self.problem.unpack(result)
        z, target = z.reshape(len(u), self.problem.m), self.target(grid.steps.t_new)
        if isinstance(constraint, Heat3d):
            rows = {"state": u, "control": z, "target": target}
            po.write_series(path, grid, constraint.patch, rows, [(self.h, 1.0 - self.h)] * 3)
        else:
            values = {"state": constraint.values(u), "control": constraint.values(z, "control")}
            values["target"] = constraint.values(target)
            po.write_functions(path, grid, {name: (self.V, each) for name, each in values.items()})

    def panels(self, arrays: dict[str, np.ndarray]) -> list[list[Panel]]:
        """Target, state and control on the plane through the middle of the cube, at a few times."""
        steps = np.linspace(0, self.settings.nt - 1, 5).round().astype(int)[1:-1]

        def row(name: str, scale: str) -> list[Panel]:
            n = arrays[name].shape[1]
            edge = self.h if n == self.settings.n else 0.0
            extent = (edge, 1.0 - edge, edge, 1.0 - edge)
            titles = [f"{name}, z = 1/2, t = {arrays['t'][k + 1]:.2g}" for k in steps]
            return [
                Panel(title, arrays[name][k][:, :, n // 2].T, extent, names=("x", "y"), scale=scale)
                for title, k in zip(titles, steps)
            ]

        return [row("target", "state"), row("state", "state"), row("control", "control")]


OPTIONS = [*sections(Heat3dSettings), *sections(SeriesFiles), *case.OPTIONS]


def main(argv: Sequence[str] | None = None) -> float:
    """Solve the problem of the options and return the objective."""
    with command_line(argv, __doc__, OPTIONS):
        check_targets(PETSc.COMM_WORLD.tompi4py(), po.read(SolutionFile))  # h5py does not load after DOLFINx
        return case.run_in_series(Heat3dCase(po.read(Heat3dSettings)))


if __name__ == "__main__":
    start(main)
