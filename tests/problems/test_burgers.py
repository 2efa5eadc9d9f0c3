"""The main problem against theorems, independent solutions and published optima."""

import numpy as np
import pytest
import torch
from scipy.io import loadmat

from pdeopt.optimize.fullspace.sqp import SQPSolver
from problems.burgers import Burgers, BurgersCase, BurgersSettings
from tests.helpers.support import ROOT, relative

REFERENCES = sorted((ROOT / "tests/reference").glob("burgers_*.mat"))


def solve(method="newton", tolerance=1e-12, **words):
    case = BurgersCase(BurgersSettings(**words))
    result = SQPSolver(case.problem, type=method, opt_tol=tolerance, feas_tol=tolerance).solve()
    assert result.converged, result.message
    return case, result


@pytest.mark.parametrize("method", ["newton", "composite"])
@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.stem)
def test_solutions_are_those_of_the_independent_script(file, method):
    reference = loadmat(file, squeeze_me=True)
    words = {name: float(reference[name]) for name in ("nu", "alpha", "theta", "flux", "T")}
    sizes = {name: int(reference[name]) for name in ("nx", "nt")}
    case, result = solve(method, control=str(reference["control"]), **words, **sizes)
    arrays = case.arrays(result)
    assert result.objective == pytest.approx(float(reference["objective"]), rel=1e-10)
    assert relative(arrays["state"][1:, 1:-1], reference["u"]) <= 1e-8
    assert relative(arrays["control"], reference["z"]) <= 1e-8
    assert relative(arrays["multiplier"][:, 1:-1], reference["lam"]) <= 1e-8


def without_constant(case, objective):
    """J without sum_{i>=1} w_i/2 |d|_M^2, as the literature counts."""
    d = torch.from_numpy(case.target)[None]
    w = case.problem.grid.steps.weight.sum()
    return objective - float(0.5 * w * (d * case.problem.constraint.state_mass(d)).sum())


def published(n, alpha, J, shifted):
    marks = [pytest.mark.slow] if n >= 160 else []
    return pytest.param(n, alpha, J, shifted, marks=marks, id=f"{n}-{alpha}")


@pytest.mark.parametrize(
    "n, alpha, J, shifted",
    [
        published(20, 0.05, 0.051479478473, -0.17292528343),
        published(40, 0.05, 0.057929288318, -0.17891014258),
        published(80, 0.05, 0.061896669945, -0.18142894734),
        published(160, 0.05, 0.064147470871, -0.18249137488),
        published(80, 1.0, None, -0.10309907218),
        published(80, 0.1, None, -0.16347748940),
        published(80, 0.01, None, -0.21185581908),
        published(80, 0.001, None, -0.23249758813),
    ],
)
def test_published_optima_with_nodal_controls(n, alpha, J, shifted):
    case, result = solve(tolerance=1e-9, control="nodal", nx=n, nt=n, alpha=alpha)
    assert without_constant(case, result.objective) == pytest.approx(shifted, abs=2e-11)
    assert J is None or result.objective == pytest.approx(J, abs=2e-12)


def test_the_plans_optimum():
    assert solve(nx=32, nt=32)[1].objective == pytest.approx(0.05469007214503, abs=1e-13)


def manufactured(elements, steps, theta):
    """The error at t = 1 for u = sin(pi x) (1 + t + t^2), whose forcing is put in as the control."""
    nu, flux, pi = 0.1, 0.5, np.pi

    def exact(x, t):
        return np.sin(pi * x) * (1 + t + t * t)

    def forcing(x, t):
        g = 1 + t + t * t
        return np.sin(pi * x) * (1 + 2 * t + nu * pi**2 * g) + flux * pi * np.sin(2 * pi * x) * g**2

    from pdeopt.control.objective import ControlCost
    from pdeopt.control.problem import ControlProblem
    from pdeopt.steps.timegrid import TimeGrid

    x, grid = np.arange(elements + 1) / elements, TimeGrid.uniform(steps, 1.0)
    constraint = Burgers(elements, nu, theta, flux, torch.from_numpy(exact(x[1:-1], 0.0)))
    problem = ControlProblem(constraint, ControlCost(1.0), grid)
    t = (grid.times[1:] - (1 - theta) / steps)[:, None]  # where the step's average of the forcing is taken
    z = problem.create_design()
    z.setArray(forcing(x, t).ravel())
    u = problem.solve_state(z).getArray().reshape(steps, -1)
    error = u[-1] - exact(x[1:-1], 1.0)
    return np.sqrt((error**2).mean())


def orders(errors):
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


def test_space_is_of_second_order():
    """Time is refined with the square of the mesh width."""
    assert orders([manufactured(n, n * n // 2, 1.0) for n in (4, 8, 16, 32)])[-1] == pytest.approx(2, abs=0.1)


def test_implicit_euler_is_of_first_order():
    assert orders([manufactured(128, n, 1.0) for n in (4, 8, 16)])[-1] == pytest.approx(1, abs=0.15)


def test_the_trapezoidal_rule_is_of_second_order():
    """Against a fine solution in time, so that space does not count."""
    assert orders([manufactured(4 * n, n, 0.5) for n in (8, 16, 32)])[-1] == pytest.approx(2, abs=0.1)


def test_without_control_the_energy_decays():
    """d/dt |u|^2 / 2 = -nu |u_x|^2: convection does no work, whatever c."""
    for flux in (0.5, 1.0, -2.0):
        case = BurgersCase(BurgersSettings(nx=32, nt=32, flux=flux, nu=0.05))
        problem, mass = case.problem, case.problem.constraint.state_mass
        u = torch.from_numpy(problem.solve_state(problem.create_design()).getArray().reshape(32, -1).copy())
        u = torch.cat([torch.from_numpy(case.target)[None], u])
        energy = (u * mass(u)).sum(1)
        assert (energy.diff() < 0).all()


def test_cheaper_control_means_better_tracking():
    values = [solve(nx=16, nt=16, alpha=alpha)[1].objective for alpha in (1e-1, 1e-2, 1e-3)]
    assert values == sorted(values, reverse=True)
