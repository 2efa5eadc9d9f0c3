"""Plans, one after the other: a shifted result is the tail of the last one, and where the next one starts."""

import numpy as np
import pytest
import torch

import pdeopt as po
from tests.helpers import examples
from tests.helpers.support import entries


def test_a_shifted_result_is_the_tail_and_its_last_row_again():
    problem = examples.dense()
    result = po.solve(problem, method="newton", max_it=2)
    later = po.shifted(problem, result, 2)
    (u, z, p), (v, y, q) = problem.unpack(result), problem.unpack(later)
    z, y = (part.reshape(-1, problem.m) for part in (z, y))
    lam, mu = (entries(each.multiplier).reshape(-1, problem.n) for each in (result, later))
    for before, after in ((u, v), (z, y), (lam, mu)):
        assert torch.equal(after, torch.cat([before[2:], before[-1:], before[-1:]]))
    assert torch.equal(p, q)
    with pytest.raises(po.InputError, match="steps"):
        po.shifted(problem, result, problem.grid.num_steps + 1)


def test_an_optimal_plan_goes_on_from_its_own_states():
    """Without a target that moves, on a long horizon, the tail of a plan nearly is the next one: two iterations."""
    base = examples.burgers(nx=8, nt=64)
    first = po.solve(base, method="newton")
    states, _, _ = base.unpack(first)
    problem = po.ControlProblem(base.constraint, base.objective, base.grid, initial_state=states[0].numpy())
    found = po.solve(problem, method="newton", start=po.shifted(problem, first))
    scratch = po.solve(problem, method="newton")
    assert found.converged and found.iterations < scratch.iterations
    assert found.objective == pytest.approx(scratch.objective, rel=1e-9)


def test_an_initial_state_may_be_given_as_numbers_and_is_copied():
    base, u0 = examples.burgers(), np.linspace(0, 1, examples.burgers().n)
    problem = po.ControlProblem(base.constraint, base.objective, base.grid, initial_state=u0)
    u0[:] = 7.0
    assert np.allclose(problem.initial_state(torch.empty(0)).numpy(), np.linspace(0, 1, base.n))
    with pytest.raises(po.InputError, match="initial_state"):
        po.ControlProblem(base.constraint, base.objective, base.grid, initial_state=u0[1:])
