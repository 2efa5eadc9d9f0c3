"""How well does a plate conduct, and how warm was it? A field of coefficients and the initial state from point sensors.

    u_t = div(exp(m) grad u) + 2 on the unit square, u = 0 on its boundary, u(0) = u_0

m and u_0 are both unknown, with Gaussian priors of an H1 precision, gamma |grad m|^2 + delta |m - mean|^2; sensors tell
u at the ends of the time steps, with noise. P1 elements by DOLFINx (`make setup-fenicsx`), implicit Euler. The maximum
of the posterior by Gauss-Newton, on the parameters alone: conjugate gradients preconditioned by the prior. Then the
directions that the data inform, by `Posterior`. The data are those of a mesh twice as fine.

    python -m problems.inverse_diffusion -n 64
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

import pdeopt as po
from pdeopt.core import sections
from pdeopt.core.arrays import Array
from pdeopt.space.fenicsx import cell_coefficients
from problems.shared.case import FORM_OPTIONS, FormFiles
from problems.shared.command_line import command_line, finish, start
from problems.shared.fields import Fields, Readable, StepField
from problems.shared.pictures import Panel


@dataclass(frozen=True)
class InverseSettings(po.Settings):
    """The inverse problem."""

    n: int = po.setting(32, "elements in a direction, a multiple of 8", at_least=8)
    nt: int = po.setting(16, "time steps", at_least=2)
    T: float = po.setting(1.0, "final time", above=0)
    noise: float = po.setting(0.02, "standard deviation of a measurement", above=0)
    gamma: float = po.setting(1.0, "of the prior: weight of the squared gradient", above=0)
    delta: float = po.setting(10.0, "of the prior: weight of the squared value", above=0)
    rank: int = po.setting(80, "eigenvalues of the data's part of the Hessian, 0 for none", at_least=0)
    seed: int = po.setting(0, "of the noise", at_least=0)
    rtol: float = po.setting(1e-8, "gradient at the end, relative to the start", above=0)


#: Mean of the prior of m; of u_0 it is 0.
MEAN = -2.0

#: Sensors stand at the inner nodes of a mesh of so many elements in a direction.
SENSORS = 8

#: What is found.
FIELDS = ("m", "u_0")


class Plate:
    """The equation on a mesh, and its parameters.

    Args:
        settings: the parameters.
        n: elements in a direction.

    Attributes:
        constraint: the step; p = [m | u_0], one coefficient a node each.
        sensors: numbers of the unknowns of the state where sensors stand.
        x, y: coordinates of the nodes.
        triangles: the nodes of each, (cells, 3).
        space: of the state.
    """

    def __init__(self, settings: InverseSettings, n: int) -> None:
        try:
            from dolfinx import fem, mesh
            from ufl import TestFunction, dx, exp, grad, inner
        except ImportError:
            raise po.InputError("inverse_diffusion", "no DOLFINx", "make setup-fenicsx") from None
        square = mesh.create_unit_square(MPI.COMM_SELF, n, n)
        V = po.function_space(square, ("Lagrange", 1))
        u, u_old, m, u_0 = (fem.Function(V) for _ in range(4))
        v, dt = TestFunction(V), fem.Constant(square, 0.0)
        F = (u - u_old) * v * dx + dt * (exp(m) * inner(grad(u), grad(v)) - 2.0 * v) * dx
        weights = settings.gamma, settings.delta
        precision = sum(0.5 * (weights[0] * inner(grad(f), grad(f)) + weights[1] * f**2) * dx for f in (m, u_0))
        edge = fem.locate_dofs_geometrical(V, lambda x: np.isclose(abs(x[:2] - 0.5).max(0), 0.5))
        bcs = [fem.dirichletbc(0.0, edge, V)]
        self.constraint = po.FormConstraint(
            F, u, u_old, None, dt, bcs=bcs, p=[m, u_0], initial=u_0, param_mass=precision
        )
        self.x, self.y = V.tabulate_dof_coordinates()[:, :2].T
        self.triangles, self.space = cell_coefficients(V), V
        points = SENSORS * np.stack([self.x, self.y])[:, self.constraint.state_dofs]
        (places,) = np.nonzero((abs(points - points.round()) < 1e-9).all(0))
        self.sensors = places[np.lexsort(points[:, places])]

    def truth(self) -> Array:
        """The parameters that the data are made with, (P,)."""
        x, y = self.x, self.y
        m = MEAN + 0.8 * np.sin(2 * np.pi * x) * np.cos(np.pi * y)
        warm = np.exp(-20 * ((x - 0.3) ** 2 + (y - 0.6) ** 2)) + 0.7 * np.exp(-30 * ((x - 0.7) ** 2 + (y - 0.3) ** 2))
        return np.concatenate([m, warm])

    def mean(self) -> Array:
        """Of the prior, (P,)."""
        return np.concatenate([np.full_like(self.x, MEAN), np.zeros_like(self.x)])


def measurements(settings: InverseSettings, comm: Any) -> np.ma.MaskedArray[Any, Any]:
    """What the sensors say at all nodes in time but the first: (nt + 1, sensors)."""
    plate, grid = Plate(settings, 2 * settings.n), po.TimeGrid.uniform(settings.nt, settings.T, MPI.COMM_SELF)
    problem = po.ControlProblem(plate.constraint, po.Tracking(np.zeros(plate.constraint.state_dim)), grid)
    truth = problem.create_design()
    truth.setArray(plate.truth())
    u = problem.fields(problem.join(problem.solve_state(truth), truth))[0].numpy()[:, plate.sensors]
    u += settings.noise * np.random.default_rng(settings.seed).standard_normal(u.shape)
    data = np.ma.masked_all((settings.nt + 1, u.shape[1]))
    data[1:] = u
    return data


class InverseDiffusion(Readable):
    """The posterior of m and u_0.

    Args:
        settings: the parameters.
        comm: communicator of the time steps.

    Attributes:
        plate: the equation.
        problem: minus the posterior's logarithm is its objective.
    """

    name = "inverse_diffusion"

    def __init__(self, settings: InverseSettings, comm: Any = None) -> None:
        po.check(settings)
        if settings.n % SENSORS:
            raise po.InputError("-n", settings.n, f"a multiple of {SENSORS}: sensors are nodes")
        self.settings, plate = settings, Plate(settings, settings.n)
        self.plate, mean = plate, torch.from_numpy(plate.mean())
        precision = po.StepMatrix.constant(plate.constraint.param_mass)

        def prior(u: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
            return 0.5 * ((p - mean) * precision((p - mean)[None])[0]).sum()

        data = measurements(settings, comm)
        misfit = po.Tracking(data, observe=plate.sensors, weight=1 / settings.noise**2)
        grid = po.TimeGrid.uniform(settings.nt, settings.T, comm)
        self.problem = po.ControlProblem(plate.constraint, misfit + po.TerminalLoss(prior), grid)

    def solve(self, **settings: Any) -> po.Result:
        """The maximum of the posterior, from the prior's mean."""
        problem, begin = self.problem, self.problem.create_design()
        begin.setArray(self.plate.mean() if problem.grid.is_first else np.array([]))  # p is on rank 0
        lin = problem.at(problem.join(problem.constant_state(begin), begin))
        scale = po.RieszMetric(problem).dual_norm(lin.gradient)
        words = {"gauss_newton": True, "precond": "reduced", "opt_tol": self.settings.rtol * scale}
        return po.solve(problem, method="newton", start=begin, **{**words, **settings})

    def posterior(self, result: po.Result, rank: int) -> po.Posterior:
        """The Gaussian approximation of the posterior at its maximum, in that many directions. Collective."""
        return po.Posterior(self.problem, result, self.plate.constraint.param_mass, rank=rank)

    @cached_property
    def _halves(self) -> tuple[slice, slice]:
        return slice(0, len(self.plate.x)), slice(len(self.plate.x), None)

    def fields(self, result: po.Result) -> Fields:
        """Nodes, triangles, both fields as found and as they are, states at t_1 ... t_N. Collective."""
        plate, (m, u_0), (u, _, p) = self.plate, self._halves, self.problem.unpack(result)
        truth, found = plate.truth(), p.numpy()
        state = StepField(u, "", lambda rows, t: plate.constraint.values(rows))
        places = {"x": plate.x, "y": plate.y, "triangles": plate.triangles, "t": self.problem.grid.times}
        fields = {"m": found[m], "u_0": found[u_0], "true_m": truth[m], "true_u_0": truth[u_0], "state": state}
        return {**places, **fields, "objective": np.array(result.objective)}

    def write_series(self, path: str, result: po.Result) -> None:
        """The states at t_1 ... t_N. Collective."""
        states = self.plate.constraint.values(self.problem.unpack(result)[0])
        po.write_functions(path, self.problem.grid, {"state": (self.plate.space, states)})

    def panels(self, arrays: dict[str, Array]) -> list[list[Panel]]:
        """Both fields, as found and as they are."""
        triangles = arrays["x"], arrays["y"], arrays["triangles"]

        def panel(title: str, key: str, scale: str) -> Panel:
            return Panel(title, arrays[key], triangles=triangles, names=("x", "y"), scale=scale)

        return [[panel(f"found: {name}", name, name), panel(f"true: {name}", f"true_{name}", name)] for name in FIELDS]

    def errors(self, result: po.Result) -> tuple[float, float]:
        """Of m and u_0, relative to how far the truth is from the prior's mean."""
        p, truth, mean = self.problem.unpack(result)[2].numpy(), self.plate.truth(), self.plate.mean()
        found = [float(np.linalg.norm((p - truth)[h]) / np.linalg.norm((truth - mean)[h])) for h in self._halves]
        return found[0], found[1]


OPTIONS = [*sections(InverseSettings), *FORM_OPTIONS]


def main(argv: Sequence[str] | None = None) -> float:
    """Find the maximum and the informed directions, and return the objective."""
    with command_line(argv, __doc__, OPTIONS):
        begin = time.process_time()
        settings, files = po.read(InverseSettings), FormFiles.read()
        case = InverseDiffusion(settings)
        result = case.solve()
        po.require_all_read()
        krylov = [record.krylov for record in result.history]
        m, u_0 = case.errors(result)
        words = {"message": result.message, "objective": result.objective, "iterations": result.iterations}
        files.write(case, result, {**words, "error_m": m, "error_u_0": u_0})
        say = PETSc.Sys.Print
        seconds, why = time.process_time() - begin, result.message.split(":")[0]
        say(f"inverse_diffusion: objective {result.objective:.14g}, {why} ({seconds:.1f} CPU s)")
        say(f"{result.iterations} Gauss-Newton iterations, of CG in each: {' '.join(map(str, krylov[1:]))}")
        say(f"errors relative to the prior mean's: m {m:.2f}, u_0 {u_0:.2f}")
        if settings.rank and result.converged:
            posterior = case.posterior(result, min(settings.rank, case.problem.param_dim))
            values = posterior.eigenvalues
            shown = " ".join(f"{value:.3g}" for value in values[:10])
            above = f"{int((values > 1).sum())} of {len(values)} above 1"
            gain = posterior.information()
            say(f"data against prior: {shown} ...; {above}, information gained {gain:.1f} nats")
        finish("inverse_diffusion", result.reason > 0, result.message)
        return result.objective


if __name__ == "__main__":
    start(main)
