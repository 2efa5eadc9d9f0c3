"""Newton's method, where it begins again, and where the composite step goes on."""

import json

import pytest

from pdeopt.optimize.fullspace import handover
from pdeopt.optimize.fullspace.composite import CompositeSettings, CompositeStep
from pdeopt.optimize.fullspace.handover import NewtonThenComposite
from pdeopt.optimize.fullspace.newton import NewtonKKT
from pdeopt.optimize.fullspace.sqp import SQPSolver
from tests.helpers import examples
from tests.helpers.support import entries, relative


@pytest.fixture
def poor(monkeypatch):
    """Says after how many poor steps Newton's method begins again, and ends; a first step counts as poor."""

    def set_to(at_start, most):
        monkeypatch.setattr(handover, "POOR_AT_START", at_start)
        monkeypatch.setattr(handover, "MAX_POOR", most)

    return set_to


def notes(result):
    return [record.note for record in result.history.records]


def test_good_steps_are_newtons_to_the_end():
    solver = SQPSolver(examples.burgers())
    result = solver.solve()
    assert result.converged and solver.kind == "newton"
    assert result.history["objective"] == SQPSolver(examples.burgers(), type="newton").solve().history["objective"]


def test_poor_first_steps_begin_again_once_from_the_state_of_the_first_control(poor):
    """From there on the iterates are those of -sqp_start state."""
    poor(0, 100)
    result = SQPSolver(examples.burgers()).solve()
    expected = SQPSolver(examples.burgers(), type="newton", start="state").solve()
    assert result.converged and sum("again" in note for note in notes(result)) == 1
    assert result.history["objective"][1:] == expected.history["objective"]


def test_a_start_that_is_a_state_does_not_begin_again(poor):
    poor(0, 100)
    assert not any("again" in note for note in notes(SQPSolver(examples.burgers(), start="state").solve()))


def test_poor_steps_hand_over_to_the_composite_step(poor):
    poor(100, 0)
    solver = SQPSolver(examples.burgers())
    result = solver.solve()
    assert result.converged and solver.kind == "composite" and "composite step from here" in notes(result)[1]
    expected = SQPSolver(examples.burgers(), type="newton").solve()
    assert relative(entries(result.design), entries(expected.design)) <= 1e-6


@pytest.mark.parametrize("limits, kind", [((0, 100), "newton"), ((100, 0), "composite")])
def test_a_restart_keeps_the_choice(poor, limits, kind):
    poor(*limits)
    problem = examples.burgers()

    def create(x, lam):
        return NewtonThenComposite(
            lambda x, lam: NewtonKKT(problem, x, lam),
            lambda x, lam: CompositeStep(problem, x, lam, CompositeSettings()),
            x,
            lam,
            1e-8,
        )

    first = create(SQPSolver(problem).start(), problem.create_multiplier())
    for iteration in range(2):
        first.record(iteration)
        first.step()
    second = create(first.x.copy(), first.lam.copy())
    second.recall(json.loads(json.dumps(first.memory())))
    assert second.kind == first.kind == kind
    expected, found = first.record(2), second.record(2)
    assert found.objective == expected.objective and found.optimality == pytest.approx(expected.optimality, rel=1e-6)
    first.step(), second.step()
    assert entries(second.x).sub(entries(first.x)).abs().max() <= 1e-10
    first.destroy(), second.destroy()
