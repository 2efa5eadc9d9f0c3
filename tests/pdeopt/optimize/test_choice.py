"""One call: every method finds the same optimum, and says which it was; bounds and starts in all forms are the same."""

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import pdeopt as po
from pdeopt.core.arrays import copy
from pdeopt.optimize.choice import DESCENT, FULL_SPACE, ON_PATHS, TAO
from pdeopt.optimize.parts.bounds import Bounds
from tests.helpers import examples

n, steps, h = 5, 10, 1 / 6
mass = h * sp.eye(n)
second_difference = po.StepMatrix.constant(sp.diags([1.0, -2.0, 1.0], [-1, 0, 1], (n, n)) / h**2)


class ReactionDiffusion(po.TimeDependentConstraint):
    """u_t = D u_xx + u(1 - u) + z, as in the README."""

    state_dim = control_dim = n
    state_mass = control_mass = mass

    def initial_state(self, p):
        return torch.zeros(n, dtype=torch.float64)

    def residual(self, u_old, u_new, z, steps):
        return h * (u_new - u_old - steps.dt[:, None] * (0.02 * second_difference(u_new) + u_new * (1 - u_new) + z))


@pytest.fixture(scope="module")
def problem():
    objective = po.Tracking(np.sin(np.pi * h * np.arange(1, n + 1)), mass) + po.ControlCost(0.1, mass)
    return po.ControlProblem(ReactionDiffusion(), objective, po.TimeGrid.uniform(steps, T=1.0))


@pytest.fixture(scope="module")
def optimum(problem):
    return po.solve(problem)


@pytest.mark.parametrize("method", [*(name for name in FULL_SPACE if name not in ON_PATHS), *TAO, *DESCENT])
def test_every_method_finds_the_same_optimum(problem, optimum, method):
    assert optimum.method == "newton"
    result = po.solve(problem, method, opt_tol=1e-5, max_it=300)
    assert result.converged and result.method == method
    assert result.objective == pytest.approx(optimum.objective, rel=1e-7)
    for name in ("design", "state", "multiplier"):
        found, expected = copy(getattr(result, name)), copy(getattr(optimum, name))
        assert float((found - expected).norm() / expected.norm()) <= 1e-2


def vec(problem, value):
    design = problem.create_design()
    design.set(value)
    return design


FORMS = {
    "number": lambda problem, value: value,
    "list": lambda problem, value: [value] * problem.control_size,
    "array of rows": lambda problem, value: np.full((steps, n), value),
    "tensor": lambda problem, value: torch.full((problem.control_size,), value, requires_grad=True),
    "vector": vec,
}


@pytest.mark.parametrize("form", FORMS)
def test_bounds_in_all_forms_are_the_same(problem, form):
    bounds = Bounds.of(problem, FORMS[form](problem, -0.5), FORMS[form](problem, 0.75))
    assert bounds.lower.tolist() == [-0.5] * problem.control_size
    assert bounds.upper.tolist() == [0.75] * problem.control_size


def test_methods_with_bounds_find_the_same_optimum(problem, optimum):
    sets, tao = (po.solve(problem, method, upper=0.2, opt_tol=1e-7) for method in ("auto", "tao"))
    assert sets.method == "active_set" and sets.converged and tao.converged
    assert sets.objective == pytest.approx(tao.objective, rel=1e-9) and sets.objective > optimum.objective + 1e-6
    assert torch.allclose(copy(sets.design), copy(tao.design), atol=1e-4) and float(copy(tao.design).max()) <= 0.2


@pytest.mark.parametrize("form", FORMS)
def test_starts_in_all_forms_are_the_same(problem, form):
    result = po.solve(problem, start=FORMS[form](problem, 0.5), max_it=0)
    x = problem.join(problem.constant_state(vec(problem, 0.5)), vec(problem, 0.5))
    assert result.objective == problem.at(x).value


@pytest.mark.parametrize("method", ["sqp", "newton", "tao", "lbfgs"])
def test_a_result_is_a_start(problem, optimum, method):
    again = po.solve(problem, method, start=optimum, opt_tol=1e-6)
    assert again.converged and again.iterations == 0


@pytest.mark.parametrize("method", ["sqp", "tao", "lbfgs"])
def test_who_looks_on_sees_every_iteration(problem, method):
    records, results = [], []
    result = po.solve(problem, method, opt_tol=1e-3, monitor=records.append, callback=results.append)
    assert [record.iteration for record in records] == list(range(result.iterations + 1)) and result.iterations > 0
    assert [len(each.history) for each in results] == list(range(1, result.iterations + 2))
    assert {each.reason for each in results} == {po.Reason.ITERATING} and results[0].method == method
    assert float(copy(results[0].design).norm()) == 0.0  # a copy: the run went on
    assert torch.allclose(copy(results[-1].design), copy(result.design), rtol=1e-12)


def test_the_command_line_wins_and_the_choice_is_shown(problem, options, capfd):
    options(solve_method="newton", solve_view="")
    assert po.solve(problem, "lbfgs").method == "newton"
    assert "solve: method newton" in capfd.readouterr().out
    options(solve_method="auto", sqp_type="newton")
    assert po.solve(problem).method == "newton"


@pytest.mark.parametrize("method", ["sqp", "newton", "active_set", "tao", "lbfgs"])
def test_where_control_has_no_price_a_solver_that_fails_says_so(problem, method):
    loss = po.TerminalLoss(lambda u, p: ((u - 1.0) ** 2).sum())
    free = po.ControlProblem(ReactionDiffusion(), loss, po.TimeGrid.uniform(steps, T=1.0))
    failed = po.solve(free, method, max_it=1)
    assert not failed.converged and failed.message.count("add ControlCost") == 1
    assert "ControlCost" not in po.solve(problem, method, max_it=0).message


def test_linear_solvers_and_types_of_tao_are_settings(problem, optimum):
    for words in (
        dict(method="newton", precond="wathen"),
        dict(method="sqp", precond="multigrid"),
        dict(method="newton", form="coupled", window=3),
        dict(method="tao", tao_type="nls", gauss_newton=True),
        dict(method="tr", gauss_newton=True),
    ):
        assert po.solve(problem, opt_tol=1e-6, **words).objective == pytest.approx(optimum.objective, rel=1e-8)


BAD = {
    "method": (dict(method="bfgs"), r"auto \| sqp \| newton \| feasible"),
    "setting": (dict(method="newton", memory=3), "gauss_newton, kkt_rtol, mat_type, max_it"),
    "setting of tao": (dict(method="tao", precond="direct"), "tao_type"),
    "type of tao": (dict(method="tao", tao_type="nls", lower=0.0), "blmvm"),
    "setting of another method": (dict(method="lbfgs", radius=3.0), "max_gradients"),
    "no bounds": (dict(method="lbfgs", lower=0.0), r"auto \| active_set"),
    "crossed": (dict(lower=1.0, upper=0.0), "lower <= upper"),
    "no number": (dict(lower=float("nan")), "lower <= upper"),
    "text": (dict(method="tao", upper="1"), "real numbers"),
    "size": (dict(method="tao", upper=np.ones(3)), r"a number, or values of this rank, of shape \(10, 5\) \| \(50,\)"),
    "start": (dict(start=np.ones(3)), "one, or those of this rank, 50"),
    "infinite start": (dict(start=np.inf), "finite numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_what_is_legal(problem, case):
    words, legal = BAD[case]
    with pytest.raises(po.InputError, match=legal):
        po.solve(problem, **words)


def test_a_number_bounds_controls_and_not_parameters():
    problem = examples.dense()
    bounds = Bounds.of(problem, upper=1.0)
    assert bounds.upper.tolist() == [1.0] * problem.control_size + [math.inf] * problem.layout.param_size
    assert Bounds.of(problem, upper=vec(problem, 1.0)).upper.tolist() == [1.0] * problem.layout.design_size
