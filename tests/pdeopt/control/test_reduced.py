import math

import pytest
import torch
from torch.func import jacfwd

from pdeopt.control import problem as control_problem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.control.stepjacobian import SparseStepJacobian
from pdeopt.control.verify import randomize, taylor_rates, taylor_remainders
from pdeopt.functions.petsc import PetscFunction
from pdeopt.functions.smooth import Tally
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries, random_design, relative


def test_taylor_remainders_shrink_with_orders_1_2_3(problem):
    reduced, z, dz = ReducedObjective(problem), random_design(problem, 1, 0.3), random_design(problem, 2)
    remainders = taylor_remainders(reduced, z, dz, start=2e-2, number=4)
    for name, order in (("value", 1), ("gradient", 2), ("hessian", 3)):
        rates, errors = taylor_rates(remainders[name]), remainders[name]
        quadratic = name == "hessian" and max(errors) <= 1e-13 * abs(reduced.value(entries(z)))  # no third derivative
        assert quadratic or rates[-1] >= order - 0.1, (name, rates, errors)


def test_the_gradient_is_that_of_implicit_differentiation(problem):
    """J_z - J_u F_u^-1 F_z by dense matrices of the loop over steps."""
    z = random_design(problem, 1, 0.3)
    _, g = ReducedObjective(problem).value_and_gradient(entries(z))
    oracle, n = Oracle(problem), problem.layout.state_size
    x = torch.cat([entries(problem.solve_state(z)), entries(z)])
    F, J = jacfwd(oracle.F)(x), jacfwd(oracle.J)(x)
    expected = J[n:] - F[:, n:].T @ torch.linalg.solve(F[:, :n].T, J[:n])
    assert relative(g, expected) <= 1e-11


def test_stretches_of_steps_change_nothing_but_memory(problem, monkeypatch):
    z, dz = random_design(problem, 1, 0.3), random_design(problem, 2)
    whole = ReducedObjective(problem)
    value, g = whole.value_and_gradient(entries(z))
    state, lam, h = (
        entries(whole.state(entries(z))),
        entries(whole.multiplier(entries(z))),
        whole.hvp(entries(z), entries(dz)),
    )
    monkeypatch.setattr(control_problem, "STRETCH_UNKNOWNS", 2 * problem.n)
    monkeypatch.setattr(control_problem, "FEWEST_STRETCHES", 2)
    del problem.stretches
    cut = ReducedObjective(problem)
    found, g_cut = cut.value_and_gradient(entries(z))
    jacobian = problem.at(problem.create_primal()).jacobian
    alike = isinstance(jacobian, SparseStepJacobian) and all(b.is_constant for b in jacobian.blocks.values())
    assert (len(problem.stretches) == 1) == (alike or problem.constraint.pattern is None)
    assert found == pytest.approx(value, rel=1e-12)
    assert relative(g_cut, g) <= 1e-11
    assert relative(entries(cut.state(entries(z))), state) <= 1e-12
    assert relative(entries(cut.multiplier(entries(z))), lam) <= 1e-11
    rows = torch.randn(lam.reshape(-1, problem.n).shape, generator=torch.Generator().manual_seed(0), dtype=lam.dtype)
    lin, lin_cut = whole.linearization(entries(z)), cut.linearization(entries(z))
    for part, expected in zip(lin_cut.vjp_fields(rows), lin.vjp_fields(rows)):
        assert torch.allclose(part, expected, rtol=1e-11, atol=1e-12)
    assert relative(cut.hvp(entries(z), entries(dz)), h) <= 1e-11
    assert cut.value(entries(dz)) == pytest.approx(whole.value(entries(dz)), rel=1e-11)


def hessian_products(reduced, z, dz):
    return PetscFunction(reduced).hvp(z, dz, z.duplicate())


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_the_hessian_is_symmetric(problem, gauss_newton):
    reduced = ReducedObjective(problem, gauss_newton)
    z, a, b = (random_design(problem, seed, 0.5) for seed in (1, 2, 3))
    left, right = hessian_products(reduced, z, a).dot(b), hessian_products(reduced, z, b).dot(a)
    assert left == pytest.approx(right, rel=1e-11)


def test_gauss_newton_is_exact_for_a_linear_constraint():
    problem = examples.heat()
    z, dz = random_design(problem, 1), random_design(problem, 2)
    full, gn = (hessian_products(ReducedObjective(problem, flag), z, dz) for flag in (False, True))
    assert full.equal(gn)


def test_gauss_newton_is_another_hessian_for_a_nonlinear_one():
    problem = examples.burgers()
    z, dz = random_design(problem, 1), random_design(problem, 2)
    full, gn = (hessian_products(ReducedObjective(problem, flag), z, dz) for flag in (False, True))
    assert relative(entries(gn), entries(full)) > 1e-6


def test_the_value_does_not_depend_on_what_was_asked_before(problem):
    z, y = random_design(problem, 1, 0.5), random_design(problem, 2, 0.5)
    fresh, used = (PetscFunction(ReducedObjective(problem)) for _ in range(2))
    used.value(y)
    assert used.value(z) == pytest.approx(fresh.value(z), rel=1e-12)
    z.copy(y)  # the same vector with other entries is another design
    used.value(y)
    y.scale(0.5)
    assert used.value(y) == pytest.approx(ReducedObjective(problem).value(entries(y)), rel=1e-12)


def test_a_design_without_a_state_costs_infinity_and_can_be_left_again():
    from tests.helpers.failing import blow_up

    problem = blow_up()
    reduced, g = PetscFunction(ReducedObjective(problem)), problem.create_design()
    bad, good = problem.create_design(), problem.create_design()
    bad.set(1e6)
    assert reduced.value_and_gradient(bad, g) == math.inf
    assert math.isfinite(reduced.value_and_gradient(good, g)) and g.norm() > 0
    assert reduced.value_and_gradient(bad, g) == math.inf
    assert math.isfinite(reduced.value_and_gradient(randomize(good, 0), g))


def test_sweeps_are_counted():
    problem = examples.heat()
    reduced, z = ReducedObjective(problem), entries(random_design(problem, 1))
    reduced.value(z)
    reduced.value_and_gradient(z)
    reduced.hvp(z, z)
    assert reduced.tally == Tally(values=1, gradients=1, hessian_products=1, work=2.5)
