"""Control of the flow in a cavity or around a cylinder, differential-algebraic: Navier-Stokes by Taylor-Hood elements.

    u_t + (u.grad) u - nu Lap u + grad p = 0,  div u = 0  on the unit square

The lid drags the fluid along, the side walls hold it, and the bottom exerts a shear stress, the control; toward two
cells that turn in opposite directions. Elements by DOLFINx (`make setup-fenicsx`), implicit Euler; Newton's method on
all steps, with KKT systems reduced to the control.

`-geometry cylinder` is the channel of Schaefer and Turek (problems/shared/channel.py). The skin of the cylinder moves
along itself, as a belt would, and the acceleration of each of its points is the control: the integral of the drag
coefficient over time and the price of control is minimized, from the stationary flow around the cylinder at rest on.
(With the speed for control the optimum is not smooth at the end, and steps never are short enough.) The fluid follows
the skin up to force times 1e-6, which makes the force a functional of the velocity, as accurate as the weak form itself
(Dirichlet controls by penalty: L. S. Hou, S. S. Ravindran, SIAM J. Control Optim. 36, 1998). BDF2: the state has the
velocity of the step before, too.

    python -m problems.navier_stokes -n 24 -nt 64 -sqp_monitor
    python -m problems.navier_stokes -geometry cylinder
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import pdeopt as po
from pdeopt.core import sections
from pdeopt.core.arrays import copy
from pdeopt.space.fenicsx import part_of
from problems.shared.case import FORM_OPTIONS, FormFiles
from problems.shared.channel import CENTER, HEIGHT, RADIUS, SPEED, TO_COEFFICIENT, channel_mesh, inflow
from problems.shared.command_line import command_line, finish, start
from problems.shared.flow import Flow, fixed, taylor_hood


@dataclass(frozen=True)
class FlowSettings(po.Settings):
    """The flow and its control."""

    geometry: str = po.setting(
        "cavity", "a cavity with a lid, or a channel with a cylinder", choices=("cavity", "cylinder")
    )
    n: int = po.setting(8, "elements in a direction; along a quarter of the cylinder", at_least=2)
    nt: int = po.setting(16, "time steps", at_least=2)
    T: float = po.setting(2.0, "final time", above=0)
    scheme: str = po.setting(
        None,
        "backward differences of first or second order; default euler, with the cylinder bdf2",
        choices=("euler", "bdf2"),
        kind=str,
    )
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


def walls(V: Any) -> list[Any]:
    """No slip at the sides, the lid's velocity, no flow through the bottom, and the pressure 0 at a corner."""
    velocity, pressure = V.sub(0), V.sub(1)
    return [
        fixed(velocity, lambda x: np.isclose(x[0], 0) | np.isclose(x[0], 1)),
        fixed(velocity, lambda x: np.isclose(x[1], 1), lid),
        fixed(velocity.sub(1), lambda x: np.isclose(x[1], 0)),
        fixed(pressure, lambda x: np.isclose(x[0], 0) & np.isclose(x[1], 0)),
    ]


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
        if settings.scheme == "bdf2":
            raise po.InputError("-scheme", "bdf2", "euler with -geometry cavity")
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
        self.spaces = V, Z
        words = {"bcs": walls(V), "control_mass": 0.5 * z**2 * bottom * ufl.ds}
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
        constraint: the state is (u, p, s) with the speed s of the skin, and with the scheme of second order u at the
            step before; without what walls and inflow fix. The control has the nodes of the cylinder.
        problem: the integral of the drag coefficient, and the price of control.
        weight: of the squared acceleration in the price.
        at_rest: the drag coefficient of the stationary flow without control.
        momentum: what the force has taken from the fluid at the skin before the start, of which the first step pays.

    Raises:
        InputError: parameters that are not legal, or no DOLFINx.
    """

    def __init__(self, settings: FlowSettings, comm: Any = None) -> None:
        po.check(settings)
        self.settings, self.weight = settings, (settings.alpha or 1.0) / (SPEED**2 * 2 * RADIUS)
        if settings.space_ranks > 1:
            raise po.InputError("-space_ranks", settings.space_ranks, "1 with -geometry cylinder")
        drag, kept = self._step(_channel(settings.n))
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
        self.problem = po.ControlProblem(self.constraint, objective, grid, initial_state=self._always(copy(state)))

    def _step(self, channel: Any) -> tuple[Any, Any]:
        """Make the constraint.

        Returns:
            functionals of the state: the drag coefficient without its part u_t, and the integral of that over time.
        """
        import ufl
        from dolfinx import fem

        before = [] if self.settings.scheme == "euler" else ["velocity"]
        V, Z = (
            po.function_space(channel, taylor_hood(channel, "pressure", *before)),
            po.function_space(channel, ("Lagrange", 1)),
        )
        w, w_old, z, dt = fem.Function(V), fem.Function(V), fem.Function(Z), fem.Constant(channel, 0.0)
        (u, p, s, *kept), old, (v, q, r, *tests) = ufl.split(w), ufl.split(w_old), ufl.TestFunctions(V)
        skin, along = _skin(channel)
        nu = 2 * RADIUS * SPEED / self.settings.reynolds

        def flow(v: Any) -> Any:
            return ufl.inner(ufl.dot(ufl.grad(u), u), v) + nu * ufl.inner(ufl.grad(u), ufl.grad(v)) - p * ufl.div(v)

        change = 1.5 * u - 2.0 * old[0] + 0.5 * old[3] if kept else u - old[0]
        F = (ufl.inner(change, v) + dt * flow(v) - dt * q * ufl.div(u)) * ufl.dx
        F += (dt * ufl.inner(u - s * along, v) / SLIP + (s - old[2] - dt * z) * r) * skin * ufl.ds
        for last, test in zip(kept, tests):
            F += ufl.inner(last - old[0], test) * ufl.dx
        self.spaces, bcs = (V, Z), [fixed(V.sub(2), lambda x: _distance(x) > 1.001 * RADIUS)]
        for k in (0, *range(3, V.num_sub_spaces)):
            bcs.append(fixed(V.sub(k), lambda x: np.isclose(x[1], 0) | np.isclose(x[1], HEIGHT)))
            bcs.append(fixed(V.sub(k), lambda x: np.isclose(x[0], 0), inflow))
        self.constraint = po.FormConstraint(F, w, w_old, z, dt, bcs=bcs, control_mass=0.5 * z**2 * skin * ufl.ds)
        ahead = fem.Function(V.sub(0).collapse()[0])
        ahead.interpolate(lambda x: np.stack([1.0 * (_distance(x) < 1.001 * RADIUS), 0 * x[0]]))
        return -TO_COEFFICIENT * flow(ahead) * ufl.dx, -TO_COEFFICIENT * ufl.inner(u, ahead) * ufl.dx

    def _always(self, state: Tensor) -> Tensor:
        """A state that was the same the step before."""
        values, V = self.constraint.values(state[None])[0], self.spaces[0]
        for k in range(3, V.num_sub_spaces):
            values[part_of(V.sub(k))[1]] = values[part_of(V.sub(0))[1]]
        return torch.from_numpy(values[self.constraint.state_dofs])

    def mean_drag(self, result: po.Result) -> float:
        """The drag coefficient, averaged over time."""
        acceleration = po.RieszMetric(self.problem).control_norm(self.problem.unpack(result)[1])
        paid = 0.5 * self.weight * acceleration**2
        return (result.objective - paid - self.momentum) / self.settings.T

    def solve(self, **settings: Any) -> po.Result:
        """From the flow around the cylinder at rest."""
        words = {"precond": "reduced", "start": "state", "opt_tol": self.settings.tol}
        return po.SQPSolver(self.problem, **{**words, **settings}).solve()


def _distance(x: np.ndarray) -> np.ndarray:
    """From the center of the cylinder: points (3, k) -> (k,)."""
    return np.hypot(x[0] - CENTER[0], x[1] - CENTER[1])


def _skin(channel: Any) -> tuple[Any, Any]:
    """What is one on the surface of the cylinder and zero on the walls, and the direction along it."""
    import ufl

    out = ufl.SpatialCoordinate(channel) - ufl.as_vector(CENTER)
    near = ufl.conditional(ufl.lt(ufl.dot(out, out), (1.5 * RADIUS) ** 2), 1.0, 0.0)
    return near, ufl.as_vector([-out[1], out[0]]) / RADIUS


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


OPTIONS = [*sections(FlowSettings), *FORM_OPTIONS]


def main(argv: Sequence[str] | None = None) -> float:
    """Solve the problem of the options and return the objective."""
    with command_line(argv, __doc__, OPTIONS):
        begin, settings, files = time.process_time(), po.read(FlowSettings), FormFiles.read()
        if settings.space_ranks > 1 and (files.report.plot or files.solution.output):
            legal = "-space_ranks 1, or -series"
            raise po.InputError("-plot, -output", f"-space_ranks {settings.space_ranks}", legal)
        case = Cylinder(settings) if settings.geometry == "cylinder" else Cavity(settings)
        problem = case.problem
        result = case.solve()
        po.require_all_read()
        words = {"message": result.message, "objective": result.objective, "iterations": result.iterations}
        files.write(case, result, words)
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
