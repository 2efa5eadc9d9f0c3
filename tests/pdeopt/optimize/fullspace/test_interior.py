"""Inequalities on states, controls and paths: optima of IPOPT, optimality and complementarity, what has no solution."""

import re

import numpy as np
import pytest
import torch

import pdeopt as po
from pdeopt.optimize.parts.inequalities import Inequalities
from problems.benchmarks import plates
from tests.helpers.inequalities import CASES, INF, iterations, mixed, reaction_diffusion, van_der_pol
from tests.helpers.support import entries

# -- optima -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bound", *(pytest.param(each, marks=pytest.mark.slow) for each in ("mixed", "both"))])
def test_the_optimum_is_that_of_ipopt(name):
    problem, words, value = CASES[name]
    result = po.solve(problem(), **words)
    assert result.converged and result.method == "interior", result.message
    assert result.objective == pytest.approx(value, abs=1e-8)
    assert iterations(result) <= 15
    assert all(each.violation <= 1e-8 for each in result.inequalities.values())


@pytest.mark.slow
@pytest.mark.parametrize("make, value", [(plates.plate, 0.014835170301), (plates.wind, 0.039138838741)])
def test_in_the_plane_it_is_that_of_ipopt_too(make, value):
    """By `python -m problems.benchmarks.plates`."""
    case = make()
    result = po.solve(case.problem(), **case.words())
    assert result.objective == pytest.approx(value, abs=1e-8) and iterations(result) <= 15
    assert all(each.violation <= 1e-8 and each.active > 0 for each in result.inequalities.values())


def test_the_optimality_system_holds():
    problem, limit = reaction_diffusion(15, 20), 0.4
    result = po.solve(problem, state_upper=limit, upper=2.0)
    u, z, _ = problem.unpack(result)
    state, control = (result.inequalities[name] for name in ("state_upper", "control_upper"))
    assert (u <= limit + 1e-8).all() and (z <= 2.0 + 1e-8).all()
    assert state.active > 0 and control.active > 0
    assert (state.density >= 0).all() and (state.density * (limit - u)).abs().max() <= 1e-8
    assert (control.density.flatten() * (2.0 - z)).abs().max() <= 1e-8
    weight = problem.grid.steps.dt[:, None] / 16
    gradient = problem.at(problem.join(result.state, result.design)).lagrangian_gradient(result.multiplier)
    nu = torch.cat([(weight * state.density).flatten(), (weight * control.density).flatten()])
    assert (entries(gradient) + nu).abs().max() <= 1e-9
    assert state.integral == pytest.approx(float((weight * state.density).sum()), rel=1e-12)
    assert state.density[state.step - 1, state.component] == state.density.max()


@pytest.mark.slow
def test_integrals_of_multipliers_stand_refinement():
    """They are measures: what their densities lose in width they gain in height."""
    found = [po.solve(van_der_pol(steps), state_lower=[-0.25, -INF]).inequalities["state_lower"] for steps in (50, 100)]
    assert found[1].density.max() > 1.03 * found[0].density.max()
    assert found[1].integral == pytest.approx(found[0].integral, rel=0.05)


def test_iterations_find_what_factors_find():
    problem = reaction_diffusion(31, 40)
    direct, wathen = (po.solve(problem, state_upper=0.5, precond=way) for way in ("direct", "wathen"))
    assert wathen.objective == pytest.approx(direct.objective, rel=1e-8)
    krylov = wathen.history["krylov"][-iterations(wathen) :]
    assert max(krylov) <= 2 * 10


@pytest.mark.slow
def test_inactive_inequalities_leave_the_optimum_as_it_is():
    problem = reaction_diffusion(15, 20)
    free, result = po.solve(problem, method="newton"), po.solve(problem, state_upper=5.0)
    assert result.objective == pytest.approx(free.objective, rel=1e-9)
    assert result.inequalities["state_upper"].integral <= 1e-6


@pytest.mark.slow
def test_early_steps_and_some_components_may_be_free():
    problem = van_der_pol(60)
    late = po.solve(problem, state_lower=lambda t: np.where(np.asarray(t) > 2, [[-0.05], [-INF]], -INF).T)
    on_path = po.solve(problem, path=lambda u, z, steps: torch.where(steps.t_new > 2, -0.05 - u[:, 0], -INF))
    x = problem.unpack(late)[0][:, 0]
    assert x[problem.grid.steps.t_new > 2].min() >= -0.05 - 1e-8 and x.min() < -0.1
    assert late.objective == pytest.approx(on_path.objective, rel=1e-8)


@pytest.mark.slow
def test_curved_paths_have_the_optimum_of_ipopt():
    result = po.solve(van_der_pol(60), path=lambda u, z, steps: u[:, 0].square() + z[:, 0].square() - 0.7)
    assert result.converged and result.objective == pytest.approx(1.6319578704, abs=1e-7)  # IPOPT relaxes c by 1e-8


# -- no optimum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ({"state_lower": [-0.25, -INF], "path": lambda u, z, steps: u[:, 0] + 0.4}, "path"),
        ({"lower": -0.1, "upper": 0.1, "state_lower": lambda t: np.where(np.asarray(t) > 2, [[0.9], [-INF]], -INF).T},
         "state_lower is missed by 1.* in component 0 at step 13, t = 2.16"),
        ({"path": lambda u, z, steps: u[:, 0].square() + 0.01}, "path is missed by 0.01 in component 0"),
    ],
)  # fmt: skip
def test_what_has_no_feasible_point_says_so_and_where(words, place):
    result = po.solve(van_der_pol(60), **words)
    assert result.reason == po.Reason.DIVERGED_INFEASIBLE and result.iterations <= 20
    assert re.search(place, result.message), result.message
    assert max(each.violation for each in result.inequalities.values()) >= 0.005


# -- at the border -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "inequalities: got none"),
        ({"state_lower": 1.0, "state_upper": 0.0}, "state bounds: .*above the upper"),
        ({"state_upper": float("nan")}, "state bounds"),
        ({"state_upper": [1.0, 2.0, 3.0]}, "state_upper: got shape"),
        ({"state_upper": 0.5}, "fixed initial state outside them: component 1 is 1"),
        ({"lower": np.zeros(7)}, "control_lower: got shape"),
        ({"state_upper": INF}, "all infinite"),
        ({"path": 3.0}, "path: got float"),
        ({"path": [po.PathConstraint(mixed), po.PathConstraint(mixed)]}, "two inequalities of the name path"),
        ({"path": lambda u, z, steps: u.numpy().sum(1)}, r"path\(u, z, steps\): got ndarray"),
        ({"path": lambda u, z, steps: u.sum()}, r"path\(u, z, steps\): got shape \(\)"),
        ({"path": lambda u, z, steps: (u - 2).log()}, "NaN"),
        ({"path": po.PathConstraint(mixed, weight=-1.0, name="sum")}, "weight of sum"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(words, message):
    with pytest.raises(po.InputError, match=message):
        Inequalities(van_der_pol(10), **words)


def test_other_methods_refuse_inequalities_on_states():
    with pytest.raises(po.InputError, match=r"auto \| interior"):
        po.solve(van_der_pol(10), method="newton", state_lower=-3.0)


# -- interrupted ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 6])
def test_an_interrupted_run_goes_on_with_the_same_iterates(stop):
    words = {"state_lower": [-0.25, -INF]}
    whole = po.SQPSolver(van_der_pol(60), **words).solve()
    memory = {}

    def observe(method, history):
        memory.update(x=method.x.copy(), lam=method.lam.copy(), memory=method.memory(), history=history)

    po.SQPSolver(van_der_pol(60), max_it=stop, **words).solve(observers=[observe])
    rest = po.SQPSolver(van_der_pol(60), **words).solve(**memory)
    assert rest.history["objective"] == pytest.approx(whole.history["objective"], rel=1e-10)
