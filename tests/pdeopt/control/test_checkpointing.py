"""Reduced gradients that keep few states are those that keep all, by as many sweeps as the schedule says."""

import numpy as np
import pytest
import torch

import pdeopt as po
from pdeopt.control import checkpointing
from pdeopt.control import problem as control_problem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.control.verify import taylor_rates
from pdeopt.core.errors import InputError, SolveFailure
from tests.helpers import examples
from tests.helpers.support import entries, random_design, relative

multistage = pytest.importorskip("checkpoint_schedules.multistage")


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    """Of one or two steps, where the library has 16,384 unknowns."""
    monkeypatch.setattr(control_problem, "STRETCH_UNKNOWNS", 16)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_gradients_states_and_adjoints_are_those_with_all_states(problem, where, tmp_path):
    z, whole = entries(random_design(problem, 1, 0.3)), ReducedObjective(problem)
    expected, g = whole.value_and_gradient(z)
    few = ReducedObjective(problem, checkpoints=2, checkpoints_disk=str(tmp_path) if where == "disk" else "")
    value, found = few.value_and_gradient(z)
    assert value == pytest.approx(expected, rel=1e-13) and few.value(0.5 * z) == pytest.approx(whole.value(0.5 * z))
    assert relative(found, g) <= 1e-13
    assert relative(entries(few.state(z)), entries(whole.state(z))) <= 1e-12
    assert relative(entries(few.multiplier(z)), entries(whole.multiplier(z))) <= 1e-12
    assert few.evaluation(z).feasibility <= 1e-12 and not any(tmp_path.iterdir())


def test_stretches_are_solved_for_as_often_as_the_schedule_says(tmp_path):
    problem = examples.burgers(nx=9, nt=24)  # 12 stretches of two steps
    z = entries(random_design(problem, 1, 0.3))
    _, g = ReducedObjective(problem).value_and_gradient(z)
    for kept in (1, 2, 5, 100):
        for folder in ("", str(tmp_path)):
            few = ReducedObjective(problem, checkpoints=kept, checkpoints_disk=folder)
            assert relative(few.value_and_gradient(z)[1], g) <= 1e-13
            assert len(few.sweeps.stretches) == 12
            assert few.sweeps.solved == multistage.optimal_steps_binomial(12, min(kept, 11))
    few.value_and_gradient(z)  # what was found is kept
    assert few.sweeps.solved == multistage.optimal_steps_binomial(12, 11)


def test_only_so_many_states_are_kept(monkeypatch):
    most = 0

    class Watched(checkpointing.InMemory):
        def __setitem__(self, k, state):
            nonlocal most
            super().__setitem__(k, state)
            assert self[k].data_ptr() != state.data_ptr()  # no view of a whole stretch
            most = max(most, len(self._places))

    monkeypatch.setattr(checkpointing, "InMemory", Watched)
    problem = examples.burgers(nx=9, nt=24)
    few = ReducedObjective(problem, checkpoints=5)
    few.value_and_gradient(entries(problem.create_design()))
    assert most == 5


def test_taylor_remainders_shrink_as_they_should(options):
    options(reduced_checkpoints=3)
    problem = examples.burgers(nx=9, nt=16)
    reduced = ReducedObjective(problem)
    assert reduced.sweeps is not None
    z, dz = entries(random_design(problem, 1, 0.3)), entries(random_design(problem, 2))
    value, g = reduced.value_and_gradient(z)
    errors = [abs(reduced.value(z + h * dz) - value - h * float(g @ dz)) for h in (2e-2, 1e-2, 5e-3)]
    assert taylor_rates(errors)[-1] >= 1.9


def test_solvers_find_the_same_optimum_and_its_state(options):
    problem = examples.burgers(nx=6, nt=8)
    expected = po.solve(problem, method="newton")
    options(reduced_checkpoints=2)
    result = po.solve(problem, method="tao")
    assert result.converged, result.message
    assert result.objective == pytest.approx(expected.objective, rel=1e-10)
    assert relative(entries(result.state), entries(expected.state)) <= 1e-5
    assert relative(entries(result.multiplier), entries(expected.multiplier)) <= 1e-4
    reduced, start = ReducedObjective(problem), entries(expected.design)
    found = po.minimize(reduced.value_and_gradient, 0.9 * start, jac=True, options={"rtol": 1e-3})
    assert found.success and found.fun == pytest.approx(expected.objective, rel=1e-4)


def test_what_needs_all_states_is_refused(options, monkeypatch, tmp_path):
    problem = examples.burgers(nx=9, nt=16)
    reduced = ReducedObjective(problem, checkpoints=2)
    z = torch.zeros(reduced.size, dtype=torch.float64)
    with pytest.raises(InputError, match=r"-reduced_checkpoints: got Hessian products.*lmvm"):
        reduced.hvp(z, z)
    with pytest.raises(InputError, match="all states at once"):
        reduced.linearization(z)
    with pytest.raises(InputError, match=r"-reduced_checkpoints_disk: got .*nowhere"):
        ReducedObjective(problem, checkpoints=2, checkpoints_disk=str(tmp_path / "nowhere"))
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"pdeopt\[checkpoints\]"):
        patch.setitem(__import__("sys").modules, "checkpoint_schedules", None)
        ReducedObjective(problem, checkpoints=2)
    options(propagator="mgrit", mgrit_window=4)
    with pytest.raises(InputError, match="-propagator with -reduced_checkpoints: got mgrit; legal: serial"):
        ReducedObjective(examples.burgers(nt=18), checkpoints=2)


def test_a_step_without_a_solution_is_a_value_of_infinity():
    problem = examples.burgers(nx=9, nt=16)
    reduced = ReducedObjective(problem, checkpoints=2)
    z = torch.full((reduced.size,), 1e300, dtype=torch.float64)
    value, g = reduced.value_and_gradient(z)
    assert value == np.inf == reduced.value(z) and not g.any()
    with pytest.raises(SolveFailure):
        reduced.state(z)
