"""Optimal control of the heat equation u_t - kappa Lap u + r u = f + z on a rectangle, or on any mesh of the plane.

Q1 or P1 elements by scikit-fem, theta scheme in time. The control is constant on each time step; it is a
source everywhere (`-heat_control distributed`) or the flux through a part of the boundary (`boundary`).

    python -m problems.heat -nx 30 -ny 10 -nt 32 -solver newton -sqp_monitor -plot heat.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import skfem
import torch
from skfem.models import laplace, mass
from torch import Tensor

import pdeopt as po
from pdeopt.core import digest, sections
from pdeopt.core.arrays import Array
from pdeopt.space import AffineStepJacobian
from problems.shared import case
from problems.shared.command_line import command_line, start
from problems.shared.fields import Fields, Readable, StepField, TimeField
from problems.shared.meshes import read_mesh
from problems.shared.pictures import Panel

#: Gauss points of this degree: exact for all matrices on parallelograms and triangles.
DEGREE = 3

#: How many times the picture shows.
SHOWN_TIMES = 4

#: Center and radius of the heat source.
SOURCE, RADIUS = (0.1, 0.1), 0.07


@dataclass(frozen=True)
class HeatSettings(po.Settings):
    """The heat problem."""

    nx: int = po.setting(60, "Q1 elements in x", at_least=2)
    ny: int = po.setting(20, "Q1 elements in y", at_least=2)
    nt: int = po.setting(64, "time steps", at_least=2)
    T: float = po.setting(1.0, "final time", above=0)
    kappa: float = po.setting(0.05, "conductivity", above=0)
    alpha: float = po.setting(1e-3, "control weight", above=0)
    theta: float = po.setting(1.0, "implicitness of the time scheme, theta", at_least=0.5, at_most=1)
    length: float = po.setting(3.0, "length of the rectangle", above=0)
    height: float = po.setting(1.0, "height of the rectangle", above=0)
    mesh: str = po.setting("", "read this mesh of triangles or quadrilaterals instead of the rectangle")
    reaction: float = po.setting(0.0, "r, a loss of heat everywhere", at_least=0)
    source: float = po.setting(0.0, f"heat source f in the ball of radius {RADIUS} about {SOURCE}")
    target: str = po.setting("bump", "a traveling bump, or one everywhere", choices=("bump", "one"))
    heat_boundary: str = po.setting("dirichlet", "u = 0 on the boundary, or no flux", choices=("dirichlet", "neumann"))
    heat_control: str = po.setting(
        "distributed",
        "a source everywhere, or the flux through the boundary at the least y",
        choices=("distributed", "boundary"),
    )
    space_ranks: int = po.setting(1, "ranks that share each time step", at_least=1)


class Space:
    """Elements of the lowest order on a mesh.

    Args:
        mesh: of triangles or quadrilaterals.
        dirichlet, boundary: u = 0 on the boundary; control on the part of it that the mesh names `control`,
            else on the edges at the least y. The state is free there.

    Attributes:
        points, cells: coordinates, (2, nodes), and the nodes of each cell, (cells, 3 or 4).
        free, control: numbers of the nodes of the state, (n,), and of the control, (m,).
        M, A: mass and stiffness matrix on the free nodes.
        Q, B: mass matrix of the control, over the domain or its part of the boundary, and its free rows.

    Raises:
        InputError: no edge to control, or no free node.
    """

    def __init__(self, mesh: skfem.Mesh, dirichlet: bool = True, boundary: bool = False) -> None:
        element = skfem.ElementTriP1() if isinstance(mesh, skfem.MeshTri1) else skfem.ElementQuad1()
        self.basis = skfem.Basis(mesh, element, intorder=DEGREE)
        self.points, self.cells = self.basis.doflocs, self.basis.element_dofs.T
        M, A = (sp.csr_matrix(form.assemble(self.basis)) for form in (mass, laplace))
        edges = _control_edges(mesh) if boundary else np.array([], dtype=int)
        part = skfem.FacetBasis(mesh, element, facets=edges, intorder=DEGREE) if boundary else self.basis
        Q = sp.csr_matrix(mass.assemble(part))
        fixed = self._nodes(np.setdiff1d(mesh.boundary_facets(), edges)) if dirichlet else []
        self.free = np.setdiff1d(self.cells, fixed)  # files may have points outside all cells
        self.control = self._nodes(edges) if boundary else np.unique(self.cells)
        if self.free.size == 0:
            raise po.InputError("mesh", "no node inside the domain", "a finer mesh, or -heat_boundary neumann")
        self.M, self.A = (X[self.free][:, self.free] for X in (M, A))
        self.Q = Q[self.control][:, self.control]
        self.B = sp.identity(Q.shape[0], format="csr")[self.free][:, self.control] @ self.Q

    def _nodes(self, edges: Array) -> Array:
        return np.asarray(self.basis.get_dofs(edges).all())

    def load(self, f: Any) -> Array:
        """The integrals of f times the basis functions of the free nodes, shape (n,); f(x, y) of arrays."""
        return np.asarray(skfem.LinearForm(lambda v, w: f(*w.x) * v).assemble(self.basis)[self.free])

    def on_all_nodes(self, rows: Tensor) -> Array:
        """Values at the free nodes, (batch, n), padded with the zeros of the others, (batch, nodes)."""
        padded = np.zeros((len(rows), self.points.shape[1]))
        padded[:, self.free] = rows.numpy()
        return padded


def _control_edges(mesh: skfem.Mesh) -> Array:
    if "control" in (mesh.boundaries or {}):
        return np.asarray(mesh.boundaries["control"])
    least, size = mesh.p[1].min(), np.ptp(mesh.p)
    edges = mesh.facets_satisfying(lambda x: x[1] <= least + 1e-9 * size, boundaries_only=True)
    if edges.size == 0:
        legal = "an edge there, or a boundary named control"
        raise po.InputError("-heat_control boundary", "a mesh without a boundary edge at the least y", legal)
    return np.asarray(edges)


class Heat(po.TimeDependentConstraint):
    """M(u_k - u_{k-1}) + dt [S(th u_k + (1 - th) u_{k-1}) - B z_k - f] = 0 with u_0 = 0.

    Args:
        M, S: mass matrix and operator of the state, (n, n).
        Q, B: mass matrix of the control, (m, m), and what the control does to the state, (n, m).
        f: load vector, shape (n,).
        theta: implicitness.
    """

    def __init__(self, M: Any, S: Any, Q: Any, B: Any, f: Array, theta: float) -> None:
        (n, m), th = B.shape, theta
        self.state_dim, self.control_dim, self.theta = n, m, theta
        self.state_mass, self.control_mass = po.StepMatrix.constant(M), po.StepMatrix.constant(Q)
        self.S, self.B, self.f = po.StepMatrix.constant(S), po.StepMatrix.constant(B), torch.from_numpy(f)
        state = po.Sparsity(M) | po.Sparsity(S)
        self.pattern = po.StepPattern(state, state, B, po.Sparsity.empty(2 * n + m, 2 * n + m))
        self._blocks: tuple[Tensor, dict[str, po.StepMatrix]] | None = None  # for these lengths of steps
        self._fixed = self._entries(sp.hstack([-M, M, 0 * B]))
        self._per_time = self._entries(sp.hstack([(1 - th) * S, th * S, -B]))

    def _entries(self, matrix: sp.spmatrix) -> Tensor:
        pattern = self.pattern.jacobian
        return torch.from_numpy(np.asarray(matrix.tocsr()[pattern.rows, pattern.cols]).reshape(1, -1))

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.zeros(self.state_dim, dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        dt, th = steps.lengths[:, None], self.theta
        return self.state_mass(u_new - u_old) + dt * (self.S(th * u_new + (1 - th) * u_old) - self.B(z) - self.f)

    def linearize(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> AffineStepJacobian:
        dt = steps.lengths
        if not (self._blocks and torch.equal(self._blocks[0], dt)):
            self._blocks = dt, self.pattern.split(self._fixed + dt[:, None] * self._per_time)
        return AffineStepJacobian(self, (u_old, u_new, z), steps, self.pattern, self._blocks[1])


class HeatCase(Readable):
    """The tracking problem of the settings, u_0 = 0.

    Args:
        settings: the parameters.
        comm: communicator of the time steps.

    Raises:
        InputError: parameters that are not legal, a mesh that does not serve, or more ranks than steps.
    """

    name = "heat"

    def __init__(self, settings: HeatSettings, comm: Any = None) -> None:
        po.check(settings)
        if not settings.mesh:
            sizes = {"-nx": settings.nx, "-ny": settings.ny, "-nt": settings.nt}
            case.require_room(sizes, settings.nt, 2 * settings.nx * settings.ny, comm)
        self.settings, self.parameters = settings, asdict(settings)
        self.parameters.pop("space_ranks")  # a restart may split the ranks in another way
        space = self.space = Space(
            read_mesh(settings.mesh) if settings.mesh else rectangle(settings),
            settings.heat_boundary == "dirichlet",
            settings.heat_control == "boundary",
        )
        if settings.mesh:  # a restart is of the same mesh, not of the same name
            cells = (torch.from_numpy(each.copy()) for each in (space.points, space.cells, space.control))
            self.parameters["mesh_content"] = digest(*cells)
        S = settings.kappa * space.A + settings.reaction * space.M
        f = settings.source * space.load(lambda x, y: np.hypot(x - SOURCE[0], y - SOURCE[1]) <= RADIUS)
        grid = po.TimeGrid.uniform(settings.nt, settings.T, comm, settings.space_ranks)
        constraint: po.TimeDependentConstraint = Heat(space.M, S, space.Q, space.B, f, settings.theta)
        target = self.target
        if settings.space_ranks > 1:
            constraint = spread = po.SpreadConstraint(constraint, grid, is_affine=True)
            target = lambda t: self.target(t)[:, spread.own]  # noqa: E731
        objective = po.Tracking(target, constraint.state_mass) + po.ControlCost(settings.alpha, constraint.control_mass)
        self.problem = po.ControlProblem(constraint, objective, grid)

    def target(self, t: Tensor) -> Tensor:
        """d at the free nodes: times (batch,) -> (batch, n)."""
        x, y = torch.from_numpy(self.space.points[:, self.space.free])
        t = t[:, None]
        if self.settings.target == "one":
            return torch.ones_like(t * x)
        return torch.sin(torch.pi * t) * torch.exp(-8 * ((x - 0.75 - 1.5 * t) ** 2 + (y - 0.5) ** 2))

    def fields(self, result: po.Result) -> Fields:
        """Over times and all nodes: target, state and multiplier; control over its own nodes.

        Beside them x and y of the nodes, the nodes of the cells, those of the control, and t.
        """
        problem, space = self.problem, self.space
        u, z, _ = problem.unpack(result)
        lam, _, _ = problem.fields(problem.join(result.multiplier, result.design))

        def whole(rows: Tensor, t: Tensor) -> Array:
            return space.on_all_nodes(rows)

        return {
            "x": space.points[0],
            "y": space.points[1],
            "cells": space.cells,
            "control_nodes": space.control,
            "t": problem.grid.times,
            "target": TimeField(lambda t: space.on_all_nodes(self.target(t))),
            "state": StepField(u, "state", whole, first=torch.zeros(len(space.free), dtype=torch.float64)),
            "control": StepField(z.reshape(len(u), problem.m), "control"),
            "multiplier": StepField(lam, "state", whole),
            "objective": np.array(result.objective),
        }

    def panels(self, arrays: dict[str, np.ndarray]) -> list[list[Panel]]:
        """Target above state above control on the plane, at a few times; a control of the boundary over x and time."""
        t, triangles = arrays["t"], (arrays["x"], arrays["y"], _triangles(arrays["cells"]))
        moments = np.linspace(0, len(t) - 1, SHOWN_TIMES + 2).round().astype(int)[1:-1]

        def row(name: str, scale: str, steps: Array, shift: int = 0) -> list[Panel]:
            titles = [f"{name}, t = {t[k]:.2g}" for k in steps]
            values = [arrays[name][k - shift] for k in steps]
            return [
                Panel(title, each, triangles=triangles, names=("x", "y"), scale=scale)
                for title, each in zip(titles, values)
            ]

        rows = [row("target", "state", moments), row("state", "state", moments)]
        if self.settings.heat_control == "distributed":
            return [*rows, row("control", "control", moments, shift=1)]
        x = arrays["x"][arrays["control_nodes"]]
        order = np.argsort(x)
        return [*rows, [Panel("control", arrays["control"][:, order], (x.min(), x.max(), 0.0, float(t[-1])))]]


def _triangles(cells: Array) -> Array:
    """Triangles of cells: (cells, 3) as they are, quadrilaterals (cells, 4) in two each."""
    return cells if cells.shape[1] == 3 else np.concatenate([cells[:, [0, 1, 2]], cells[:, [0, 2, 3]]])


def rectangle(settings: HeatSettings) -> skfem.Mesh:
    """(0, length) x (0, height) in nx times ny rectangles."""
    x = np.linspace(0.0, settings.length, settings.nx + 1)
    return skfem.MeshQuad.init_tensor(x, np.linspace(0.0, settings.height, settings.ny + 1))


OPTIONS = [*sections(HeatSettings), *case.OPTIONS]


def main(argv: Sequence[str] | None = None) -> float:
    """Solve the problem of the options and return the objective."""
    with command_line(argv, __doc__, OPTIONS):
        return case.run(HeatCase(po.read(HeatSettings)))


if __name__ == "__main__":
    start(main)
