"""Solves over all steps: serial ones invert the state Jacobian, and those that are parallel in time are as exact."""

import pytest
import torch
from torch.func import jacfwd

from pdeopt.control.propagator import Propagator, PropagatorSettings, substitute_backward, substitute_forward
from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.functions.petsc import PetscFunction
from problems import burgers, heat
from tests.helpers import examples
from tests.helpers.krylov import heat as small_heat
from tests.helpers.oracle import Oracle
from tests.helpers.parallel_time import RANKS, check
from tests.helpers.support import entries, random_design


def problem_of(kind, options):
    options(propagator=kind, mgrit_window=4)
    return examples.burgers(nt=18)


def test_gradients_and_hessian_products_are_those_of_substitution(options):
    found = []
    for kind in ("serial", "mgrit"):
        problem = problem_of(kind, options)
        reduced, z, dz = PetscFunction(ReducedObjective(problem)), random_design(problem, 1), random_design(problem, 2)
        g, h = z.duplicate(), z.duplicate()
        value = reduced.value_and_gradient(z, g)
        reduced.hvp(z, dz, h)
        found.append(torch.cat([torch.tensor([value]), entries(g), entries(h)]))
    assert torch.allclose(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_solves_are_those_of_substitution_on_several_ranks(ranks):
    check("propagator", ranks)


@pytest.mark.parametrize(
    "main, words",
    [
        (burgers.main, ["-nx", "16", "-nt", "32"]),
        pytest.param(heat.main, ["-nx", "6", "-ny", "2", "-nt", "32"], marks=pytest.mark.slow),
    ],
)
def test_scripts_reach_the_same_optimum(main, words):
    values = [main([*words, "-solver", "tao", "-propagator", kind]) for kind in ("serial", "mgrit")]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_steps_without_a_pattern_are_refused():
    problem = small_heat(6)
    jacobian = problem.at(problem.create_primal()).jacobian
    propagator = Propagator(problem.grid, PropagatorSettings("mgrit"))
    bare = type(jacobian).__mro__[1](problem.constraint, *jacobian.point[:3], jacobian.steps)
    with pytest.raises(InputError, match="without a sparsity pattern"):
        propagator.forward(bare, torch.zeros(6, problem.n, dtype=torch.float64))


def test_what_does_not_converge_says_so():
    problem = small_heat(6)
    jacobian = problem.at(problem.create_primal()).jacobian
    r = torch.full((6, problem.n), torch.nan, dtype=torch.float64)
    with pytest.raises(SolveFailure, match="propagator serial"):
        Propagator(problem.grid, PropagatorSettings("mgrit")).forward(jacobian, r)


def setting(name, seed=0):
    problem = examples.EXAMPLES[name]()
    draw = torch.Generator().manual_seed(seed)
    x = problem.create_primal()
    x.setArray(0.5 * torch.randn(x.getLocalSize(), generator=draw, dtype=torch.float64).numpy())
    r = torch.randn(problem.grid.n_local, problem.n, generator=draw, dtype=torch.float64)
    F_u = jacfwd(Oracle(problem).F)(entries(x))[:, : problem.layout.state_size]
    return problem, problem.at(x).jacobian, r, F_u


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_forward_inverts_the_state_jacobian(name):
    problem, jacobian, r, F_u = setting(name)
    expected = torch.linalg.solve(F_u, r.ravel())
    assert torch.allclose(substitute_forward(problem.grid, jacobian, r).ravel(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_backward_inverts_its_transpose(name):
    problem, jacobian, r, F_u = setting(name)
    expected = torch.linalg.solve(F_u.T, r.ravel())
    assert torch.allclose(substitute_backward(problem.grid, jacobian, r).ravel(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_forward_and_backward_are_adjoint(name):
    problem, jacobian, r, _ = setting(name)
    w = r.flip(0) + 1
    x, y = substitute_forward(problem.grid, jacobian, r), substitute_backward(problem.grid, jacobian, w)
    assert abs(float((x * w).sum() - (r * y).sum())) <= 1e-12 * float(x.norm() * w.norm() + r.norm() * y.norm())


def test_a_singular_step_is_a_solve_failure():
    problem, jacobian, r, _ = setting("dense")
    jacobian.blocks["A"].values[2] = 0.0
    for sweep in (substitute_forward, substitute_backward):
        with pytest.raises(SolveFailure, match="singular"):
            sweep(problem.grid, jacobian, r)
