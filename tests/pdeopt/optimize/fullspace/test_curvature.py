"""What is said of stationary points: the eigenvalues of the dense reduced Hessian are the judge."""

import pytest
import torch
from petsc4py import PETSc

import pdeopt as po
from pdeopt.optimize.fullspace.curvature import NO_MINIMUM, curves_down, negative_eigenvector
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries


def reduced_eigenvalues(problem, k, held=()):
    """Of Z'L''Z with Z an orthonormal basis of the kernel of F' without the directions of the design that are held."""
    K, size = Oracle(problem).kkt(k, "full"), problem.layout.primal_size
    unit = torch.eye(size, dtype=torch.float64)[[problem.layout.state_size + place for place in held]]
    rows = torch.cat([K[size:, :size], unit])
    Z = torch.linalg.svd(rows)[2][len(rows) :].T
    return torch.linalg.eigvalsh(Z.T @ K[:size, :size] @ Z)


@pytest.mark.parametrize("name", ["burgers", "dense", "burgers nodal"])
@pytest.mark.parametrize("seed, size", [(0, 3.0), (1, 0.01)])
@pytest.mark.parametrize("held", [(), (0, 3)])
def test_inertia_and_lanczos_see_what_the_dense_eigenvalues_are(name, seed, size, held, options):
    """At feasible points with random multipliers, where the Hessian has both signs."""
    problem = examples.EXAMPLES[name]()
    metric, fixed = po.RieszMetric(problem), torch.zeros(problem.layout.design_size, dtype=torch.bool)
    fixed[list(held)] = True
    lin = problem.at(problem.join(problem.solve_state(problem.create_design()), problem.create_design()))
    lam = po.randomize(problem.create_multiplier(), seed)
    lam.scale(size)
    x = problem.join(problem.solve_state(problem.create_design()), problem.create_design())
    values = reduced_eigenvalues(problem, torch.cat([entries(x), entries(lam)]), held)
    solver = KKTSolver(metric, "full", "test_")
    solver.set_point(lin, lam, fixed if held else None)
    assert solver.descents() is None  # nothing is factored yet
    solver.factor()
    if PETSc.Sys.hasExternalPackage("mumps"):  # other factors do not tell the inertia
        assert solver.descents() == int((values < 0).sum())
    assert curves_down(metric, lin, lam, fixed) == bool((values < 0).any())
    solver.destroy()


def test_a_convex_operator_has_no_negative_eigenvalue_and_rounding_is_none():
    diagonal = torch.logspace(-8, 0, 30, dtype=torch.float64)
    start, grid = torch.ones(30, dtype=torch.float64), po.TimeGrid.uniform(1, 1.0)
    assert negative_eigenvector(lambda y: diagonal * y, start, grid) is None
    assert negative_eigenvector(lambda y: 0.0 * y, start, grid) is None
    diagonal[7] = -0.1
    y, value = negative_eigenvector(lambda y: diagonal * y, start, grid)
    assert float(y.norm()) == pytest.approx(1.0) and float(diagonal @ y**2) == pytest.approx(value) and value < 0


class Pendulum(po.TimeDependentConstraint):
    """u = (angle, speed); the midpoint rule."""

    state_dim, control_dim = 2, 1

    def initial_state(self, p):
        return torch.zeros(2, dtype=torch.float64)

    def residual(self, u_old, u_new, z, steps):
        angle, speed = (0.5 * (u_old + u_new)).chunk(2, dim=1)
        return u_new - u_old - steps.dt[:, None] * torch.cat([speed, z - torch.sin(angle)], dim=1)


def hanging(num_steps):
    """A pendulum that is to stand up."""
    upright = po.TerminalLoss(lambda u, p: 100.0 * (1 + torch.cos(u[0]) + 0.5 * u[1] ** 2))
    return po.ControlProblem(Pendulum(), po.ControlCost(1.0) + upright, po.TimeGrid.uniform(num_steps, T=10.0))


@pytest.fixture(scope="module")
def pendulum():
    return hanging(30)


WORDS = {
    "newton": dict(method="newton"),
    "newton without factors": dict(method="newton", precond="wathen"),
    "active_set": dict(lower=-5.0),
    "sqp": dict(method="sqp"),
    "tao": dict(method="tao", tao_type="nls"),
}


@pytest.mark.parametrize("words", WORDS)
def test_a_pendulum_that_hangs_is_no_minimum(pendulum, words):
    result = po.solve(pendulum, **WORDS[words])
    assert result.iterations == 0 and result.objective == pytest.approx(200.0) and result.converged
    assert NO_MINIMUM in result.message


def test_what_newton_ends_at_is_looked_at(pendulum):
    """From a push it runs back to rest, and the composite step does not."""
    push = 0.2 * torch.sin(pendulum.grid.steps.t_mid)
    newton, composite = (po.solve(pendulum, method, start=push) for method in ("newton", "sqp"))
    assert newton.iterations > 0 and (newton.objective < 199.0 or NO_MINIMUM in newton.message)
    assert composite.objective < 10.0 and NO_MINIMUM not in composite.message


def test_the_default_goes_on_from_a_saddle(pendulum):
    """From rest, where no derivative says which way, to a minimum; and the same after a restart at the saddle."""
    solver, memory = po.SQPSolver(pendulum), []
    result = solver.solve(observers=[lambda method, history: memory.append(method.memory())])
    assert result.converged and solver.kind == "composite" and NO_MINIMUM not in result.message
    notes = [record.note for record in result.history.records]
    assert ["no minimum" in note for note in notes] == [False, True] + [False] * (len(notes) - 2)
    assert result.history["objective"][1] < result.history["objective"][0] == pytest.approx(200.0)
    x, lam = pendulum.join(result.state, result.design), result.multiplier
    assert result.objective < 10.0 and (reduced_eigenvalues(pendulum, torch.cat([entries(x), entries(lam)])) > 0).all()
    again = po.SQPSolver(pendulum).solve(solver.start(), memory=memory[0])
    assert again.history["objective"] == result.history["objective"]


def test_a_minimum_is_not_spoken_of():
    for method in ("newton", "active_set"):
        assert po.solve(examples.burgers(), method).message == "converged optimality"
