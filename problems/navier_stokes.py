"""Control of the flow in a cavity, a differential-algebraic equation: Navier-Stokes with Taylor-Hood elements.

    u_t + (u.grad) u - nu Lap u + grad p = 0,  div u = 0  on the unit square

The lid drags the fluid along, the side walls hold it, and the bottom exerts a shear stress, the control; toward two
cells that turn in opposite directions. Elements by DOLFINx (`make setup-fenicsx`), implicit Euler; Newton's method on
all steps, with KKT systems reduced to the control.

    python -m problems.navier_stokes -n 24 -nt 64 -sqp_monitor
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from petsc4py import PETSc

import pdeopt as po
from pdeopt.core import sections
from problems.shared.command_line import command_line, finish, start


@dataclass(frozen=True)
class FlowSettings(po.Settings):
    """The flow and its control."""

    n: int = po.setting(8, "elements in a direction", at_least=2)
    nt: int = po.setting(16, "time steps", at_least=2)
    T: float = po.setting(2.0, "final time", above=0)
    reynolds: float = po.setting(50.0, "Reynolds number of the lid, 1 / nu", above=0)
    alpha: float = po.setting(1e-2, "control weight", above=0)
    tol: float = po.setting(1e-6, "gradient at the end", above=0)
    space_ranks: int = po.setting(1, "ranks that share each time step", at_least=1)


def two_cells(x: np.ndarray) -> np.ndarray:
    """Velocity of the stream function 0.1 sin(pi x)^2 sin(2 pi y): points (3, k) -> (2, k)."""
    x, y = np.pi * x[:2]
    return 0.1 * np.pi * np.stack([2 * np.sin(x) ** 2 * np.cos(2 * y), -np.sin(2 * x) * np.sin(2 * y)])


def lid(x: np.ndarray) -> np.ndarray:
    """Velocity of the lid, 1 in the middle and smooth at the corners: points (3, k) -> (2, k)."""
    return np.stack([16 * x[0] ** 2 * (1 - x[0]) ** 2, 0 * x[0]])


def taylor_hood(mesh: Any) -> Any:
    """P2 for both components of the velocity, P1 for the pressure."""
    import ufl

    if hasattr(ufl, "VectorElement"):
        cell = mesh.ufl_cell()
        return ufl.MixedElement(ufl.VectorElement("Lagrange", cell, 2), ufl.FiniteElement("Lagrange", cell, 1))
    from basix.ufl import element, mixed_element  # of DOLFINx 0.7 and later

    cell = mesh.basix_cell()
    return mixed_element([element("Lagrange", cell, 2, shape=(2,)), element("Lagrange", cell, 1)])


def walls(V: Any) -> list[Any]:
    """No slip at the sides, the lid's velocity, no flow through the bottom, and the pressure 0 at a corner."""
    from dolfinx import fem

    def fix(space: Any, where: Any, value: Any = None) -> Any:
        part, _ = space.collapse()
        given = fem.Function(part)
        if value is not None:
            given.interpolate(value)
        return fem.dirichletbc(given, fem.locate_dofs_geometrical((space, part), where), space)

    velocity, pressure = V.sub(0), V.sub(1)
    return [
        fix(velocity, lambda x: np.isclose(x[0], 0) | np.isclose(x[0], 1)),
        fix(velocity, lambda x: np.isclose(x[1], 1), lid),
        fix(velocity.sub(1), lambda x: np.isclose(x[1], 0)),
        fix(pressure, lambda x: np.isclose(x[0], 0) & np.isclose(x[1], 0)),
    ]


class Cavity:
    """The step, and its tracking problem.

    Args:
        settings: the parameters.
        comm: communicator of the time steps.

    Attributes:
        constraint: the state is (u, p), without what the walls fix; the control has the nodes of the bottom.
        problem: with target and price of the control.
    """

    def __init__(self, settings: FlowSettings, comm: Any = None) -> None:
        po.check(settings)
        self.settings = settings
        try:
            import ufl
            from dolfinx import fem, mesh
        except ImportError:
            raise po.InputError("navier_stokes", "no DOLFINx", "make setup-fenicsx") from None
        grid = po.TimeGrid.uniform(settings.nt, settings.T, comm, settings.space_ranks)
        cut = po.mesh_partitioner(grid)
        square = mesh.create_unit_square(grid.space, settings.n, settings.n, partitioner=cut)
        V, Z = po.function_space(square, taylor_hood(square)), po.function_space(square, ("Lagrange", 1))
        w, w_old, z, dt = fem.Function(V), fem.Function(V), fem.Function(Z), fem.Constant(square, 0.0)
        (u, p), (u_old, _), (v, q) = ufl.split(w), ufl.split(w_old), ufl.TestFunctions(V)
        x, nu = ufl.SpatialCoordinate(square), 1 / settings.reynolds
        bottom = ufl.conditional(ufl.lt(x[1], 1e-6), 1.0, 0.0)
        flow = ufl.inner(ufl.dot(ufl.grad(u), u), v) + nu * ufl.inner(ufl.grad(u), ufl.grad(v))
        flow -= p * ufl.div(v) + q * ufl.div(u)
        F = ufl.inner(u - u_old, v) * ufl.dx + dt * flow * ufl.dx - dt * z * v[0] * bottom * ufl.ds
        self.constraint = po.FormConstraint(F, w, w_old, z, dt, bcs=walls(V), control_mass=0.5 * z**2 * bottom * ufl.ds)
        target = fem.Function(V)
        target.sub(0).interpolate(two_cells)
        mass = self.constraint.hessian(0.5 * ufl.inner(u, u) * ufl.dx, w)
        objective = po.Tracking(self.constraint.coefficients(target, w), mass)
        objective += po.ControlCost(settings.alpha, self.constraint.control_mass)
        self.problem = po.ControlProblem(self.constraint, objective, grid)

    def solve(self, **settings: Any) -> po.Result:
        """From the flow without control."""
        words = {"precond": "reduced", "start": "state", "opt_tol": self.settings.tol}
        return po.SQPSolver(self.problem, type="newton", **{**words, **settings}).solve()


OPTIONS = sections(FlowSettings)


def main(argv: Sequence[str] | None = None) -> float:
    """Solve the problem of the options and return the objective."""
    with command_line(argv, __doc__, OPTIONS):
        begin, case = time.process_time(), Cavity(po.read(FlowSettings))
        result, problem = case.solve(), case.problem
        po.require_all_read()
        seconds, why = time.process_time() - begin, result.message.split(":")[0]
        say, krylov = PETSc.Sys.Print, " ".join(str(record.krylov) for record in result.history[1:])
        states, controls = problem.constraint.layout.size, problem.constraint.controls.size
        say(f"navier_stokes: {states} unknowns, {controls} controls a step")
        say(f"navier_stokes: objective {result.objective:.14g}, {why} ({seconds:.1f} CPU s)")
        say(f"{result.iterations} Newton iterations, of CG in each: {krylov}")
        finish("navier_stokes", result.reason > 0, result.message)
        return result.objective


if __name__ == "__main__":
    start(main)
