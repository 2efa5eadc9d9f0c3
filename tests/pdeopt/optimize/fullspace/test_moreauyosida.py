"""Moreau-Yosida path-following: a dense oracle, theorems on the path, optima of IPOPT, what has no solution."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

import pdeopt as po
from pdeopt.control.verify import randomize
from pdeopt.core.arrays import copy
from pdeopt.optimize.fullspace import MoreauYosida, MoreauYosidaSettings, full_space_test
from pdeopt.optimize.parts.inequalities import Inequalities
from pdeopt.optimize.parts.loop import iterate
from problems.benchmarks import plates
from tests.helpers.inequalities import CASES, INF, iterations, reaction_diffusion, van_der_pol
from tests.helpers.parallel_time import RANKS, check

UPPER, STEPS, T = 0.3, 8, 1.0


class Line(po.TimeDependentConstraint):
    """Three linear equations; two controls."""

    state_dim, control_dim = 3, 2
    A = torch.tensor([[-1.0, 0.5, 0.0], [0.2, -1.5, 0.5], [0.0, 0.3, -1.0]], dtype=torch.float64)
    C = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)

    def initial_state(self, p):
        return torch.zeros(3, dtype=torch.float64)

    def residual(self, u_old, u_new, z, steps):
        return u_new - u_old - steps.dt[:, None] * (u_new @ self.A.T + z @ self.C.T)


def line():
    objective = po.Tracking(np.ones(3)) + po.ControlCost(0.1)
    return po.ControlProblem(Line(), objective, po.TimeGrid.uniform(STEPS, T))


def dense():
    """H, g, J(0), S and weights w of integrals of u: J = z.Hz/2 + g.z + J(0), u = Sz, step by step."""
    dt, A, C = T / STEPS, Line.A.numpy(), Line.C.numpy()
    inverse, S = np.linalg.inv(np.eye(3) - dt * A), np.zeros((STEPS, 3, 2 * STEPS))
    for k in range(STEPS):
        S[k] = inverse @ (S[k - 1] if k else S[k])
        S[k, :, 2 * k : 2 * k + 2] = dt * inverse @ C
    S, seen = S.reshape(3 * STEPS, -1), np.repeat(np.r_[np.full(STEPS - 1, dt), dt / 2], 3)
    H = S.T @ (seen[:, None] * S) + 0.1 * dt * np.eye(2 * STEPS)
    return H, -S.T @ seen, 0.5 * seen.sum() + 0.25 * dt * 3, S, np.full(3 * STEPS, dt)


def dense_minimum(price=math.inf):
    """J, z and multipliers of S z <= UPPER by active sets, or with a price of max(Sz - UPPER, 0)^2 / 2 instead."""
    H, g, J0, S, w = dense()
    free, nu = np.linalg.solve(H, -g), np.zeros(len(S))
    for _ in range(50):
        z = free - np.linalg.solve(H, S.T @ (w * nu))
        on = nu + (S @ z - UPPER) > 0
        K = S[on] @ np.linalg.solve(H, S[on].T * w[on]) + np.eye(on.sum()) / price
        nu = np.zeros(len(S))
        nu[on] = np.linalg.lstsq(K, S[on] @ free - UPPER, rcond=None)[0]  # more states than controls on the way
    z = free - np.linalg.solve(H, S.T @ (w * nu))
    assert (nu >= 0).all() and on.any() and (np.maximum(S @ z - UPPER, 0) <= nu / price + 1e-12).all()
    return 0.5 * z @ H @ z + g @ z + J0, z, nu


def method_for(problem, settings=None, **words):
    rows, design = Inequalities(problem, **words), problem.create_design()
    x = problem.join(problem.constant_state(design), design)
    return MoreauYosida(problem, x, problem.create_multiplier(), rows, settings)


def run(method):
    result = iterate(method, full_space_test(60, 1e-8, 1e-8))
    method.destroy()
    return result


# -- the path -----------------------------------------------------------------------------------------------------


def test_the_path_is_that_of_a_dense_oracle_and_nears_the_optimum_as_theory_says():
    """|c+| <= 2 |nu| / gamma and 0 <= J(x) + gamma/2 |c+|^2 <= J* <= J(x) + |nu| |c+|, from convexity."""
    best, _, nu = dense_minimum()
    w, values = dense()[-1], []
    size = math.sqrt(w @ nu**2)
    for gamma in (1e1, 1e3, 1e5):
        problem = line()
        method = method_for(problem, MoreauYosidaSettings(gamma=gamma, gamma_max=gamma, shift=False), state_upper=UPPER)
        result, price = run(method), method.gamma / UPPER**2
        J, z, _ = dense_minimum(price)
        assert result.reason == po.Reason.DIVERGED_STAGNATION and "-moreau_yosida_gamma_max" in result.message
        assert result.objective == pytest.approx(J, rel=1e-9)
        assert copy(result.design).numpy() == pytest.approx(z, abs=1e-6)
        excess = math.sqrt(w @ np.maximum(dense()[3] @ z - UPPER, 0) ** 2)
        assert excess <= 2 * size / price and J + 0.5 * price * excess**2 <= best <= J + size * excess
        assert result.inequalities["state_upper"].violation > 1e-8
        values.append(result.objective)
    assert values == sorted(values) and best - values[2] <= 1e-3 * (best - values[0])


def test_with_multipliers_that_move_it_ends_at_the_optimum():
    J, z, nu = dense_minimum()
    result = po.solve(line(), method="moreau_yosida", state_upper=UPPER)
    report = result.inequalities["state_upper"]
    assert result.converged and result.method == "moreau_yosida"
    assert result.objective == pytest.approx(J, rel=1e-9) and report.violation <= 1e-8
    assert copy(result.design).numpy() == pytest.approx(z, abs=1e-7)
    assert report.density.numpy().ravel() == pytest.approx(nu, abs=1e-6)
    assert report.active == (nu > 0).sum() and (report.slack > 0).all()
    steps = Counter(note.split(",")[0] for note in result.history["note"])
    assert len(steps) == 4 and max(steps.values()) <= 6  # each gamma begins at the solution before


def test_where_newton_fails_it_goes_back_and_raises_less(monkeypatch):
    method = method_for(line(), state_upper=UPPER)
    newton, calls = method._newton, []
    step = newton.step

    def fails_once():
        calls.append(method.gamma)
        return po.Reason.DIVERGED_LINE_SEARCH if calls.count(method.gamma) == 1 and len(set(calls)) == 2 else step()

    monkeypatch.setattr(newton, "step", fails_once)
    result, gammas = run(method), list(dict.fromkeys(calls))
    assert gammas[1] == pytest.approx(100 * gammas[0]) and gammas[2] == pytest.approx(10 * gammas[0])
    assert result.converged and result.objective == pytest.approx(dense_minimum()[0], rel=1e-9)


def test_where_newton_fails_after_multipliers_have_moved_it_lowers_the_price(monkeypatch):
    method, calls = method_for(line(), state_upper=UPPER), []
    step = method._newton.step

    def fails_once():
        calls.extend([method.gamma] if method.nu is not None else [])
        return po.Reason.DIVERGED_LINE_SEARCH if len(calls) == 1 and method.nu is not None else step()

    monkeypatch.setattr(method._newton, "step", fails_once)
    result = run(method)
    assert calls[1] == pytest.approx(0.1 * calls[0])
    assert result.converged and result.objective == pytest.approx(dense_minimum()[0], rel=1e-9)


def test_derivatives_of_the_penalty_are_consistent():
    """With known multipliers, for bounds and a curved path, whose blocks for bounds are those of colored products."""
    problem = van_der_pol(6)
    rows = Inequalities(problem, state_upper=[INF, 2.0], path=lambda u, z, steps: u[:, 0].square() + z[:, 0] - 0.3)
    nu = torch.linspace(0, 1, rows.kept.numel(), dtype=torch.float64).reshape(rows.kept.shape)
    problem.objective = problem.objective + rows.penalty(10.0, nu)
    po.assert_consistent(problem, seed=2)
    lin = problem.at(randomize(problem.create_primal(), 3))
    for term in rows.penalty(10.0, nu).terms:
        own = term.hessian_blocks(lin.u, lin.z_step, lin.steps)
        colored = po.Objective.hessian_blocks(term, lin.u, lin.z_step, lin.steps)
        for mine, other, field in zip(own, colored, (lin.u, lin.z_step)):
            assert mine.multiply(field) == pytest.approx(other.multiply(field), abs=1e-12)


# -- optima -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(each, marks=pytest.mark.slow) for each in CASES])
def test_the_optimum_is_that_of_ipopt(name):
    problem, words, value = CASES[name]
    result = po.solve(problem(), method="moreau_yosida", **words)
    assert result.converged and result.objective == pytest.approx(value, abs=1e-8)
    assert iterations(result) <= 15 and all(each.violation <= 1e-8 for each in result.inequalities.values())


@pytest.mark.slow
def test_in_the_plane_it_is_that_of_ipopt_too():
    case = plates.plate()
    result = po.solve(case.problem(), method="moreau_yosida", **case.words())
    assert result.objective == pytest.approx(0.014835170301, abs=1e-8) and iterations(result) <= 15


@pytest.mark.slow
def test_it_finds_what_the_interior_point_finds_and_so_do_iterations():
    problem, words = reaction_diffusion(31, 40), {"state_upper": 0.5, "upper": 2.0}
    interior = po.solve(problem, **words)
    for way in ("direct", "wathen"):
        result = po.solve(problem, method="moreau_yosida", precond=way, **words)
        assert result.objective == pytest.approx(interior.objective, rel=1e-8)
        for name, report in result.inequalities.items():
            assert report.integral == pytest.approx(interior.inequalities[name].integral, rel=1e-5)


def test_derivatives_of_the_solution_are_those_of_the_interior_point():
    target = torch.ones(3, dtype=torch.float64, requires_grad=True)
    objective = po.Tracking(target) + po.ControlCost(0.1)
    problem = po.ControlProblem(Line(), objective, po.TimeGrid.uniform(STEPS, T))
    found = []
    for method in ("interior", "moreau_yosida"):
        result = po.solve(problem, method, state_upper=UPPER, opt_tol=1e-11)
        how = po.Sensitivity(problem, result, [target], state_upper=UPPER)
        found.append(how.direct(torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)).control)
    assert found[1] == pytest.approx(found[0], abs=1e-5) and found[0].abs().max() > 0.1


# -- no optimum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ({"lower": -0.1, "upper": 0.1, "state_lower": lambda t: np.where(np.asarray(t) > 2, [[0.9], [-INF]], -INF).T},
         "state_lower is missed by 1.* in component 0 at step 13, t = 2.16"),
        ({"path": lambda u, z, steps: u[:, 0].square() + 0.01}, "path is missed by 0.01 in component 0"),
    ],
)  # fmt: skip
def test_what_has_no_feasible_point_says_so_and_where(words, place):
    result = po.solve(van_der_pol(60), method="moreau_yosida", **words)
    assert result.reason == po.Reason.DIVERGED_INFEASIBLE and result.iterations <= 20
    assert place.split(".*")[0] in result.message and place.split(".*")[-1] in result.message


# -- interrupted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [*(pytest.param(k, marks=pytest.mark.slow) for k in (2, 4)), 7])
def test_an_interrupted_run_goes_on_with_the_same_iterates(stop):
    """In the middle of a price, at its end, and where multipliers move."""
    words, memory = {"type": "moreau_yosida", "state_upper": UPPER, "opt_tol": 1e-13, "max_it": 9}, {}
    whole = po.SQPSolver(line(), **words).solve()

    def observe(method, history):
        memory.update(x=method.x.copy(), lam=method.lam.copy(), memory=method.memory(), history=history)

    po.SQPSolver(line(), **{**words, "max_it": stop}).solve(observers=[observe])
    rest = po.SQPSolver(line(), **words).solve(**memory)
    assert rest.history["objective"] == pytest.approx(whole.history["objective"], rel=1e-10)
    assert rest.history["note"] == whole.history["note"]


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_iterates_do_not_depend_on_the_ranks(ranks):
    check("inequalities", ranks)
