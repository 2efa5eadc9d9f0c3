"""Newton's method, where a feasible path begins, and where the composite step goes on."""

import json

import pytest

from pdeopt.core.errors import SolveFailure
from pdeopt.optimize.fullspace import handover
from pdeopt.optimize.fullspace.composite import CompositeSettings, CompositeStep
from pdeopt.optimize.fullspace.feasible import FeasibleNewton
from pdeopt.optimize.fullspace.handover import NewtonThenComposite
from pdeopt.optimize.fullspace.newton import NewtonKKT
from pdeopt.optimize.fullspace.sqp import SQPSolver
from tests.helpers import examples
from tests.helpers.support import entries, python, relative


@pytest.fixture
def limits(monkeypatch):
    """Sets which part of the residual the first step may leave, and how many poor steps there may be."""

    def set_to(bends, most):
        monkeypatch.setattr(handover, "BENDS", bends)
        monkeypatch.setattr(handover, "MAX_POOR", most)

    return set_to


def notes(result):
    return [record.note for record in result.history.records]


def test_good_steps_are_newtons_to_the_end():
    solver = SQPSolver(examples.burgers())
    result = solver.solve()
    assert result.converged and solver.kind == "newton"
    assert result.history["objective"] == SQPSolver(examples.burgers(), type="newton").solve().history["objective"]


def test_equations_that_bend_are_followed_by_a_feasible_path_from_the_first_control(limits):
    """Whose iterates are those of -sqp_type feasible."""
    limits(0.0, 100)
    solver = SQPSolver(examples.burgers())
    result, expected = solver.solve(), SQPSolver(examples.burgers(), type="feasible").solve()
    assert result.converged and solver.kind == "feasible" and "feasible path" in notes(result)[1]
    assert result.history["objective"][1:] == pytest.approx(expected.history["objective"], rel=1e-12)


def test_a_start_that_is_a_state_does_not_begin_again(limits):
    limits(0.0, 100)
    assert not any("feasible" in note for note in notes(SQPSolver(examples.burgers(), start="state").solve()))


@pytest.mark.parametrize("has_states, kind", [(True, "feasible"), (False, "composite")])
def test_poor_steps_hand_over_at_the_present_point(limits, monkeypatch, has_states, kind):
    """To the composite step where no state is found."""
    limits(100.0, 0)
    problem = examples.burgers()
    if not has_states:
        monkeypatch.setattr(problem, "solve_state", raise_failure)
    solver = SQPSolver(problem)
    result = solver.solve()
    assert result.converged and solver.kind == kind and "from here" in notes(result)[1]
    expected = SQPSolver(examples.burgers(), type="newton").solve()
    assert relative(entries(result.design), entries(expected.design)) <= 1e-6


def raise_failure(*_):
    raise SolveFailure("no state", "another control")


@pytest.mark.parametrize(
    "values, kind", [((100.0, 100), "newton"), ((0.0, 100), "feasible"), ((100.0, 0), "composite")]
)
def test_a_restart_keeps_the_choice(limits, monkeypatch, values, kind):
    limits(*values)
    problem = examples.burgers()
    if kind == "composite":
        monkeypatch.setattr(problem, "solve_state", raise_failure)

    def create(x, lam):
        return NewtonThenComposite(
            lambda x, lam: NewtonKKT(problem, x, lam),
            lambda x, lam: FeasibleNewton(problem, x, lam),
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


DECISIONS = """
import pdeopt as po
from problems.burgers import BurgersCase, BurgersSettings
from tests.pdeopt.optimize.fullspace.test_curvature import hanging
sizes = (16, 1e-2), (24, 1e-3)
problems = [BurgersCase(BurgersSettings(nx=n, nt=n, nu=nu)).problem for n, nu in sizes] + [hanging(20)]
for problem in problems:
    solver = po.SQPSolver(problem)
    result = solver.solve()
    notes = [record.note for record in result.history.records][:3]
    if problem.grid.mpi.rank == 0:
        first, last = result.history["objective"][1], result.objective
        print(solver.kind, f"{first:.9e} {last:.7e}", notes, flush=True)
"""


@pytest.mark.mpi
def test_decisions_do_not_depend_on_the_number_of_ranks():
    """Newton's method, a feasible path, and the composite step off a saddle."""
    outputs = [python("-c", DECISIONS, ranks=ranks) for ranks in (1, 2)]
    assert [done.returncode for done in outputs] == [0, 0], outputs[1].stderr
    assert outputs[0].stdout == outputs[1].stdout
    assert [line.split()[0] for line in outputs[0].stdout.splitlines()] == ["newton", "feasible", "composite"]
