"""Solves over all steps that are parallel in time, and as exact as serial ones."""

import pytest
import torch

from pdeopt.control.propagator import Propagator, PropagatorSettings
from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.functions.petsc import PetscFunction
from problems import burgers, heat
from tests.helpers import examples
from tests.helpers.krylov import heat as small_heat
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
