import numpy as np
import pytest
import torch

from pdeopt.control.objective import ControlCost, Tracking
from pdeopt.control.problem import ControlProblem
from pdeopt.control.verify import randomize
from pdeopt.core.errors import SolveFailure
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.precond import circulant
from pdeopt.precond.circulant import CirculantPC
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples
from tests.helpers.krylov import (
    fields,
    heat,
    iterations,
    matrix_of,
    operator_at_random,
    operator_at_zero,
    preconditioner,
    solver,
)
from tests.helpers.matrices import densify
from tests.helpers.parallel_time import RANKS, check
from tests.helpers.support import relative

#: Tracking of the first unknown of three alone.
FIRST = Tracking(lambda t: torch.cos(3 * t[:, None]), observe=np.array([0]))


def on_a_circle(operator):
    """The dense matrix with means over time for its blocks, and with a last step that goes before the first."""
    blocks = KKTBlocks.of(operator)
    K, (u, z, _, lam) = matrix_of(operator), fields(blocks)
    N = blocks.grid.num_steps
    A, B, C, W, Q = (
        densify(part).mean(0) for part in (blocks.A, blocks.B, blocks.C, blocks.state.spread(), blocks.control.spread())
    )
    each, before = torch.eye(N, dtype=A.dtype), torch.diag(torch.ones(N - 1, dtype=A.dtype), -1)
    before[0, -1] = -1.0
    T, E = torch.kron(each, A) + torch.kron(before, B), torch.kron(each, C)
    K[u[:, None], u], K[z[:, None], z] = torch.kron(each, W), torch.kron(each, Q)
    K[lam[:, None], u], K[u[:, None], lam], K[lam[:, None], z], K[z[:, None], lam] = T, T.T, E, E.T
    return K


@pytest.mark.parametrize("name", ["burgers theta", "heat"])
def test_it_inverts_the_matrix_with_means_on_a_circle(name):
    """Burgers has another Jacobian in each step."""
    operator, _ = operator_at_random(examples.EXAMPLES[name](), "metric")
    given = torch.eye(operator.layout.local_size, dtype=torch.float64)[:, [0, 5, -1]]
    found = preconditioner(operator, CirculantPC(), given)
    assert relative(found, torch.linalg.solve(on_a_circle(operator), given)) <= 1e-9


@pytest.mark.parametrize("name", examples.PATTERNED)
def test_it_solves_with_control_maps_and_parameters(name):
    operator, _ = operator_at_random(examples.EXAMPLES[name](), "metric")
    assert iterations(operator, CirculantPC(), randomize(operator.problem.create_kkt(), 6)) <= 60


@pytest.mark.parametrize("N", [6, 30, 60])
def test_iterations_are_bounded_by_the_unknowns_at_both_ends_of_time(N):
    """What is left out has rank 2n where coefficients are constant."""
    operator = operator_at_zero(heat(N), "metric")
    assert iterations(operator, CirculantPC(), rtol=1e-10) <= 2 * operator.problem.n + 1


@pytest.mark.parametrize("alpha", [1e-2, 1e-8])
def test_counts_are_flat_where_a_part_is_observed(alpha):
    found = [iterations(operator_at_zero(heat(N, alpha, objective=FIRST)), CirculantPC()) for N in (16, 64, 256)]
    assert max(found) <= 10 and max(found) - min(found) <= 2


def test_the_optimum_with_observation_and_control_on_parts():
    constraint = examples.Heat(5, 0.05)
    objective = Tracking(lambda t: torch.cos(3 * t[:, None]), observe=np.array([3]))
    problem = ControlProblem(
        constraint, objective + ControlCost(1e-4, constraint.control_mass), TimeGrid.uniform(20, 1.0)
    )
    found, expected = (SQPSolver(problem, type="newton", precond=way).solve() for way in ("circulant", "direct"))
    assert found.converged and found.objective == pytest.approx(expected.objective, rel=1e-8)


def test_factors_serve_on_where_nothing_changed():
    operator, context = operator_at_zero(heat(8)), CirculantPC()
    with solver(operator, context) as ksp:
        factors = []
        for T in (0.5, 0.5, 1.0):
            operator.set_point(operator_at_zero(heat(8, T=T)).lin)
            ksp.getOperators()[0].stateIncrease()
            ksp.setOperators(ksp.getOperators()[0])
            ksp.setUp()
            factors.append(context._factors)
    assert factors[0] is factors[1] is not factors[2]


def test_what_takes_too_much_memory_is_said(monkeypatch):
    monkeypatch.setattr(circulant, "MEMORY", 1000)
    with pytest.raises(SolveFailure, match=r"factors of .* entries"):
        iterations(operator_at_zero(heat(6)), CirculantPC())


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_iterations_do_not_depend_on_the_number_of_ranks(ranks):
    check("circulant", ranks)
