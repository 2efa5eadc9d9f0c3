"""Control of the flow in a cavity or around a cylinder, differential-algebraic: Navier-Stokes by Taylor-Hood elements.

    u_t + (u.grad) u - nu Lap u + grad p = 0,  div u = 0  on the unit square

The lid drags the fluid along, the side walls hold it, and the bottom exerts a shear stress, the control; toward two
cells that turn in opposite directions. Elements by DOLFINx (`make setup-fenicsx`), implicit Euler; Newton's method on
all steps, with KKT systems reduced to the control.

`-geometry cylinder` is the channel of Schaefer and Turek (problems/shared/channel.py). The skin of the cylinder moves
along itself, as a belt would, and the speed of each of its points is the control: the integral of the drag coefficient
over time and the price of control is minimized, from the stationary flow around the cylinder at rest on. The fluid
follows the skin up to force times 1e-6, which makes the force a functional of the velocity, as accurate as the weak
form itself (Dirichlet controls by penalty: L. S. Hou, S. S. Ravindran, SIAM J. Control Optim. 36, 1998).

    python -m problems.navier_stokes -n 24 -nt 64 -sqp_monitor
    python -m problems.navier_stokes -geometry cylinder
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

import pdeopt as po
from pdeopt.core import sections
from pdeopt.core.arrays import copy
from pdeopt.space.fenicsx import cell_coefficients, set_fixed
from problems.shared.case import write_files
from problems.shared.channel import CENTER, HEIGHT, RADIUS, SPEED, TO_COEFFICIENT, channel_mesh, inflow
from problems.shared.command_line import command_line, finish, start
from problems.shared.files import ReportFiles, SolutionFile, check_targets
from problems.shared.pictures import Panel


@dataclass(frozen=True)
class FlowSettings(po.Settings):
    """The flow and its control."""

    geometry: str = po.setting(
        "cavity", "a cavity with a lid, or a channel with a cylinder", choices=("cavity", "cylinder")
    )
    n: int = po.setting(8, "elements in a direction; along a quarter of the cylinder", at_least=2)
    nt: int = po.setting(16, "time steps", at_least=2)
    T: float = po.setting(2.0, "final time", above=0)
    reynolds: float = po.setting(50.0, "Reynolds number of the lid, 1 / nu, or of the cylinder", above=0)
    alpha: float = po.setting(None, "control weight; default 0.01, with the cylinder 1", above=0, kind=float)
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
    velocity, pressure = V.sub(0), V.sub(1)
    return [
        _fixed(velocity, lambda x: np.isclose(x[0], 0) | np.isclose(x[0], 1)),
        _fixed(velocity, lambda x: np.isclose(x[1], 1), lid),
        _fixed(velocity.sub(1), lambda x: np.isclose(x[1], 0)),
        _fixed(pressure, lambda x: np.isclose(x[0], 0) & np.isclose(x[1], 0)),
    ]


class Flow:
    """A flow and its control, and what is written and drawn of them.

    Attributes:
        constraint: the state is (u, p), without what is fixed.
        problem: with the objective.
        flow: the function of the state, and what is fixed of it.
    """

    name = "navier_stokes"
    constraint: po.FormConstraint
    problem: po.ControlProblem
    flow: tuple[Any, list[Any]]

    def arrays(self, result: po.Result) -> dict[str, np.ndarray] | None:
        """On rank 0: nodes, triangles, velocity there at t_1 ... t_N, (N, nodes, 2), and control. Collective."""
        from dolfinx import fem

        problem, (w, fixed) = self.problem, self.flow
        u, z, _ = problem.unpack(result)
        states, controls = problem.grid.gather(u), problem.grid.gather(z.reshape(len(u), problem.m))
        if states is None:
            return None
        space, found = w.function_space, list[np.ndarray]()
        corners = fem.Function(po.function_space(space.mesh, ("Lagrange", 1)))
        parts = [space.sub(0).sub(k).collapse() for k in range(2)]
        wholes = [fem.Function(part) for part, _ in parts]
        for state in states.numpy():  # only of what is written
            set_fixed(fixed, w.x.array)
            w.x.array[self.constraint.state_dofs] = state
            for whole, (_, places) in zip(wholes, parts):
                whole.x.array[:] = w.x.array[places]
                corners.interpolate(whole)
                found.append(corners.x.array.copy())
        x, y = corners.function_space.tabulate_dof_coordinates()[:, :2].T
        velocity = np.stack(found).reshape(len(states), 2, -1).transpose(0, 2, 1)
        triangles = cell_coefficients(corners.function_space)
        kept = {"x": x, "y": y, "triangles": triangles, "t": problem.grid.times, "velocity": velocity}
        return {**kept, "control": controls.numpy(), "objective": np.array(result.objective)}

    def panels(self, arrays: dict[str, np.ndarray]) -> list[list[Panel]]:
        """The speed at a third of the time, and at its end."""
        speed, triangles = np.linalg.norm(arrays["velocity"], axis=2), (arrays["x"], arrays["y"], arrays["triangles"])
        words: dict[str, Any] = {"triangles": triangles, "names": ("x", "y"), "scale": "speed"}
        steps = [(len(speed) - 1) // 3, len(speed) - 1]
        return [[Panel(f"speed, t = {arrays['t'][k + 1]:.2g}", speed[k], **words)] for k in steps]


class Cavity(Flow):
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
        self.flow = w, walls(V)
        words = {"bcs": self.flow[1], "control_mass": 0.5 * z**2 * bottom * ufl.ds}
        self.constraint = po.FormConstraint(F, w, w_old, z, dt, **words)
        target = fem.Function(V)
        target.sub(0).interpolate(two_cells)
        mass = self.constraint.hessian(0.5 * ufl.inner(u, u) * ufl.dx, w)
        objective = po.Tracking(self.constraint.coefficients(target, w), mass)
        objective += po.ControlCost(settings.alpha or 0.01, self.constraint.control_mass)
        self.problem = po.ControlProblem(self.constraint, objective, grid)

    def solve(self, **settings: Any) -> po.Result:
        """From the flow without control."""
        words = {"precond": "reduced", "start": "state", "opt_tol": self.settings.tol}
        return po.SQPSolver(self.problem, type="newton", **{**words, **settings}).solve()


#: How far the fluid slips on the skin of the cylinder, over the force on it.
SLIP = 1e-6

#: A time step as long as this makes the flow stationary.
FOREVER = 1e5


class Cylinder(Flow):
    """The channel with the cylinder, and its drag.

    Args:
        settings: the parameters.
        comm: communicator of the time steps.

    Attributes:
        constraint: the state is (u, p), without what walls and inflow fix; the control has the nodes of the cylinder.
        problem: the integral of the drag coefficient, and the price of control.
        weight: of the squared speed in the price.
        at_rest: the drag coefficient of the stationary flow without control.
        momentum: what the force has taken from the fluid at the skin before the start, of which the first step pays.

    Raises:
        InputError: parameters that are not legal, or no DOLFINx.
    """

    def __init__(self, settings: FlowSettings, comm: Any = None) -> None:
        po.check(settings)
        self.settings = settings
        if settings.space_ranks > 1:
            raise po.InputError("-space_ranks", settings.space_ranks, "1 with -geometry cylinder")
        try:
            import ufl
            from dolfinx import fem
        except ImportError:
            raise po.InputError("navier_stokes", "no DOLFINx", "make setup-fenicsx") from None
        channel = _channel(settings.n)
        V, Z = po.function_space(channel, taylor_hood(channel)), po.function_space(channel, ("Lagrange", 1))
        w, w_old, z, dt = fem.Function(V), fem.Function(V), fem.Function(Z), fem.Constant(channel, 0.0)
        (u, p), (u_old, _), (v, q) = ufl.split(w), ufl.split(w_old), ufl.TestFunctions(V)
        out = ufl.SpatialCoordinate(channel) - ufl.as_vector(CENTER)
        skin = ufl.conditional(ufl.lt(ufl.dot(out, out), (1.5 * RADIUS) ** 2), 1.0, 0.0)
        along = ufl.as_vector([-out[1], out[0]]) / RADIUS
        nu = 2 * RADIUS * SPEED / settings.reynolds

        def flow(v: Any) -> Any:
            return ufl.inner(ufl.dot(ufl.grad(u), u), v) + nu * ufl.inner(ufl.grad(u), ufl.grad(v)) - p * ufl.div(v)

        F = (ufl.inner(u - u_old, v) + dt * flow(v) - dt * q * ufl.div(u)) * ufl.dx
        F += dt * ufl.inner(u - z * along, v) / SLIP * skin * ufl.ds
        self.weight = (settings.alpha or 1.0) / (SPEED**2 * 2 * RADIUS)
        walls = [_fixed(V.sub(0), lambda x: np.isclose(x[1], 0) | np.isclose(x[1], HEIGHT))]
        walls += [_fixed(V.sub(0), lambda x: np.isclose(x[0], 0), inflow)]
        self.flow = w, walls
        self.constraint = po.FormConstraint(F, w, w_old, z, dt, bcs=walls, control_mass=0.5 * z**2 * skin * ufl.ds)
        ahead = fem.Function(V.sub(0).collapse()[0])
        ahead.interpolate(_on_cylinder)
        drag, kept = -TO_COEFFICIENT * flow(ahead) * ufl.dx, -TO_COEFFICIENT * ufl.inner(u, ahead) * ufl.dx
        begin = po.TimeGrid.uniform(1, FOREVER, MPI.COMM_SELF)
        steady, fluid = (
            po.ControlProblem(self.constraint, po.FormObjective(self.constraint, terminal=form), begin)
            for form in (drag, kept)
        )
        design = steady.create_design()
        state = steady.solve_state(design)
        self.at_rest, self.momentum = (each.at(each.join(state, design)).value for each in (steady, fluid))
        objective = po.FormObjective(self.constraint, state=drag, terminal=kept)
        objective += po.ControlCost(self.weight, self.constraint.control_mass)
        grid = po.TimeGrid.uniform(settings.nt, settings.T, comm)
        self.problem = po.ControlProblem(self.constraint, objective, grid, initial_state=copy(state))

    def mean_drag(self, result: po.Result) -> float:
        """The drag coefficient, averaged over time."""
        speed = po.RieszMetric(self.problem).control_norm(self.problem.unpack(result)[1])
        paid = 0.5 * self.weight * speed**2
        return (result.objective - paid - self.momentum) / self.settings.T

    def solve(self, **settings: Any) -> po.Result:
        """From the flow around the cylinder at rest."""
        words = {"precond": "reduced", "start": "state", "opt_tol": self.settings.tol}
        return po.SQPSolver(self.problem, **{**words, **settings}).solve()


def _on_cylinder(x: np.ndarray) -> np.ndarray:
    """(1, 0) on the cylinder, else 0: points (3, k) -> (2, k)."""
    return np.stack([1.0 * (np.hypot(x[0] - CENTER[0], x[1] - CENTER[1]) < 1.001 * RADIUS), 0 * x[0]])


def _channel(n: int) -> Any:
    """The mesh, on each rank of the time grid."""
    import ufl
    from dolfinx import mesh

    points, triangles = channel_mesh(n)
    if hasattr(ufl, "VectorElement"):
        element = ufl.VectorElement("Lagrange", ufl.triangle, 1)
    else:
        from basix.ufl import element as make

        element = make("Lagrange", "triangle", 1, shape=(2,))
    return mesh.create_mesh(MPI.COMM_SELF, triangles.astype(np.int64), points, ufl.Mesh(element))


def _fixed(space: Any, where: Any, value: Any = None) -> Any:
    """A Dirichlet condition on a part of a mixed space, zero by default."""
    from dolfinx import fem

    part, _ = space.collapse()
    given = fem.Function(part)
    if value is not None:
        given.interpolate(value)
    return fem.dirichletbc(given, fem.locate_dofs_geometrical((space, part), where), space)


OPTIONS = [*sections(FlowSettings), *sections(ReportFiles), *sections(SolutionFile)]


def main(argv: Sequence[str] | None = None) -> float:
    """Solve the problem of the options and return the objective."""
    with command_line(argv, __doc__, OPTIONS):
        begin, settings = time.process_time(), po.read(FlowSettings)
        case = Cylinder(settings) if settings.geometry == "cylinder" else Cavity(settings)
        report, solution, problem = po.read(ReportFiles), po.read(SolutionFile), case.problem
        check_targets(problem.grid.mpi, report, solution)
        if settings.space_ranks > 1 and (report.plot or solution.output):
            raise po.InputError("-plot, -output", f"-space_ranks {settings.space_ranks}", "-space_ranks 1")
        result = case.solve()
        po.require_all_read()
        words = {"message": result.message, "objective": result.objective, "iterations": result.iterations}
        write_files(case, result, report, solution, words)
        seconds, why = time.process_time() - begin, result.message.split(":")[0]
        say, krylov = PETSc.Sys.Print, " ".join(str(record.krylov) for record in result.history[1:])
        states, controls = problem.constraint.layout.size, problem.constraint.controls.size
        say(f"navier_stokes: {states} unknowns, {controls} controls a step")
        say(f"navier_stokes: objective {result.objective:.14g}, {why} ({seconds:.1f} CPU s)")
        if isinstance(case, Cylinder):
            mean = case.mean_drag(result)
            say(f"drag coefficient: {case.at_rest:.6f} without control, {mean:.6f} with it, on average")
        say(f"{result.iterations} Newton iterations, of CG in each: {krylov}")
        finish("navier_stokes", result.reason > 0, result.message)
        return result.objective


if __name__ == "__main__":
    start(main)
