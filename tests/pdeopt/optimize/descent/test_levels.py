"""Quasi-Newton methods on levels that share their unknowns."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from pdeopt.core.monitor import History, Reason
from pdeopt.functions.hierarchy import Hierarchy, Transfer, sample_hierarchy
from pdeopt.optimize.descent.quasinewton import LBFGS, STEPS_BETWEEN_LOOKS, SSBroyden
from pdeopt.optimize.descent.schwarz import SPQN
from tests.helpers.functions import Quadratic, Rosenbrock, start
from tests.helpers.logistic import logistic_loss, newton_optimum
from tests.helpers.support import relative

METHODS = [(LBFGS, {}), (SSBroyden, {}), (SPQN, dict(parts=2, method="ssbroyden", local_it=2, every=3))]
N, n = 400, 6


def levels(seed=0, generator_seed=0):
    """All samples, a half, and a quarter of them."""
    f = logistic_loss(N, n, seed)
    return sample_hierarchy(f, [N // 2, N // 4], torch.Generator().manual_seed(generator_seed))


def zeros(size=n):
    return torch.zeros(size, dtype=torch.float64)


def same(functions):
    """A hierarchy with one space of unknowns."""
    transfer = Transfer.aggregates(np.arange(functions[0].size))
    return Hierarchy(functions, [transfer] * (len(functions) - 1))


@pytest.mark.parametrize("method", [LBFGS, SSBroyden])
def test_levels_that_are_all_alike_are_the_plain_method(method):
    """It stays on the coarsest level to the minimum, with the same iterates."""
    plain = method(Rosenbrock(12), gtol=1e-9).minimize(start(12))
    run = method(same([Rosenbrock(12) for _ in range(3)]), gtol=1e-9)
    found = run.minimize(start(12))
    assert found.converged and run.level == 0
    assert found.history["objective"][: plain.iterations + 1] == plain.history["objective"]
    assert torch.equal(found.design, plain.design)


@pytest.mark.parametrize("method, words", METHODS)
def test_it_ends_at_the_minimum_over_all_samples(method, words):
    h = levels()
    seen = []
    run = method(h, gtol=1e-9, **words)
    found = run.minimize(zeros(), observers=[lambda m, history: seen.append(getattr(m, "method", m).level)])
    assert set(seen) == {0, 1, 2} and all(b <= a for a, b in pairwise(seen)), "from coarse to fine"
    spent = found.history[-1]
    assert spent.gradients == h.tally.gradients and spent.work < spent.gradients
    assert found.converged and relative(found.design, newton_optimum(h.functions[0])) < 1e-6


def test_a_level_is_left_where_its_own_error_is_most_of_what_is_left():
    """The fine function has twice the coarse value everywhere: its excess is once the value."""
    slow = Quadratic.random(6, 1e4)
    fine, coarse = Quadratic(2.0 * slow.A, zeros()), Quadratic(slow.A, zeros())
    for gap, visited in ((0.9, {0, 1}), (1.1, {1})):
        run, seen = LBFGS(same([fine, coarse]), memory=0, max_it=3 * STEPS_BETWEEN_LOOKS, gap=gap), []
        run.minimize(start(n), observers=[lambda m, history, seen=seen: seen.append(getattr(m, "method", m).level)])
        assert seen[:STEPS_BETWEEN_LOOKS] == [1] * STEPS_BETWEEN_LOOKS and set(seen) == visited


@pytest.mark.parametrize("method, words", METHODS)
def test_a_restart_goes_on_with_the_same_iterates(method, words):
    for stop in (2, 9, 15):
        saved = {}

        def save(run, history, stop=stop, saved=saved):
            if history[-1].iteration == stop:
                saved.update(memory=run.memory(), records=list(history.records))

        def new():
            return method(levels(), max_it=30, gtol=1e-12, gap=0.05, **words)

        whole = new().minimize(zeros(), observers=[save])
        rest = new().minimize(zeros(), memory=saved["memory"], history=History(saved["records"]))
        assert rest.history["objective"] == whole.history["objective"] and torch.equal(rest.design, whole.design)


def test_a_coarse_level_that_misleads_does_not_end_above_the_start():
    A = torch.eye(4, dtype=torch.float64)
    far = torch.full((4,), 50.0, dtype=torch.float64)
    run = LBFGS(same([Quadratic(A, zeros(4)), Quadratic(A, far)]), max_it=1, gap=0.0)
    found = run.minimize(start(4))
    assert run.level == 1 and torch.equal(found.design, start(4))


def test_targets_and_tolerances_are_those_of_the_finest_level():
    A = torch.eye(4, dtype=torch.float64)
    fine, coarse = Quadratic(A, zeros(4)), Quadratic(A, torch.ones(4, dtype=torch.float64))
    run = SSBroyden(same([fine, coarse]), gtol=1e-9, target=-1.0)
    found = run.minimize(start(4))
    assert found.reason == Reason.CONVERGED_OPTIMALITY and run.level == 0 and found.design.norm() < 1e-8


def test_limits_hold_on_coarse_levels():
    found = LBFGS(levels(), max_work=2.0, gtol=1e-14).minimize(zeros())
    assert found.reason == Reason.WORK_DONE and found.history[-1].work < 3.0
