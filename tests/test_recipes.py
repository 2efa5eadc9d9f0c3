"""Every recipe runs, prints what its page shows, and what it finds is right."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from petsc4py import PETSc
from scipy.integrate import solve_bvp, trapezoid
from torch import nn

import nn_adapters as nna
import pdeopt as po
from tests.helpers.pages import RECIPES, assert_printed, run_program


def run(name: str) -> SimpleNamespace:
    """The variables of a recipe after its run; its output is that of the page."""
    page = RECIPES / f"{name}.md"
    names, printed = run_program(page)
    assert_printed(page, printed)
    return SimpleNamespace(**names)


def test_free_final_time_is_that_of_the_exact_solution():
    """min T + 6 / T^3, which is the least energy for the time T: T^4 = 18."""
    r = run("free_final_time")
    T = 18**0.25
    s = r.problem.grid.steps.t_mid
    assert abs(r.T - T) < 1e-3
    assert abs(r.result.objective - 4 / 3 * T) < 1e-3
    assert torch.allclose(r.z, 6 * (1 - 2 * s) / T**2, atol=1e-2)


def test_minimum_time_is_two_and_bang_bang():
    r = run("minimum_time")
    assert abs(r.T - 2.0) < 1e-4 and r.result.iterations <= 15
    assert torch.allclose(r.z, torch.where(r.problem.grid.steps.t_mid < 0.5, 1.0, -1.0).double(), atol=1e-3)


def test_a_periodic_orbit_does_not_know_where_it_begins():
    """From a quarter of the period on, the wave has the same orbit, a quarter on: equal steps see no difference."""
    r = run("periodic")
    wave = lambda s: 1.5 * np.sin(2 * np.pi * s) + 0.5 * np.cos(4 * np.pi * s)  # noqa: E731
    later, torque = r.orbit(lambda s: wave(s + 0.25))
    assert torch.allclose(later[:-1], torch.roll(r.u[:-1], -12, 0), atol=1e-6)
    assert torch.allclose(torque, torch.roll(r.z, -12, 0), atol=1e-6)


def test_bdf2_has_order_two_and_derivatives():
    r = run("multistep")
    ends = {}
    for num_steps in (100, 200):
        problem = r.problem_of(num_steps)
        ends[num_steps] = float(problem.layout.rows(problem.solve_state(problem.create_design()))[-1, 0])
    assert (ends[100] - r.exact) / (ends[200] - r.exact) == pytest.approx(4.0, abs=0.1)
    po.assert_consistent(r.problem)


def test_the_price_of_a_budget_is_the_derivative_by_it():
    r = run("integral_constraints")
    assert r.price == pytest.approx(-r.gain.item(), rel=1e-6) and float(r.u[-1, 2]) <= 1.0 + 1e-8
    values = []
    for size in (1e-3, -1e-3):
        richer = po.PathConstraint(
            lambda u, z, steps, E=1.0 + size: torch.where(steps.index == steps.num_steps, u[:, 2] - E, -torch.inf)
        )
        values.append(po.solve(r.problem, path=richer, start=r.result).objective)
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(r.gain.item(), rel=1e-4)


def test_the_pendulum_is_upright_though_it_hangs_at_a_stationary_point():
    r = run("pendulum")
    assert abs(np.cos(float(r.u[-1, 0])) + 1) < 1e-2 and abs(float(r.u[-1, 1])) < 0.1
    assert r.z.abs().max() < 1  # too weak to lift it
    hanging = r.problem.join(r.problem.solve_state(r.problem.create_design()), r.problem.create_design())
    assert r.problem.at(hanging).value > 20 * r.result.objective
    assert r.problem.at(hanging).lagrangian_gradient(r.problem.solve_adjoint(r.problem.at(hanging))).norm() < 1e-12


def test_sensitivities_predict_and_explain():
    r = run("sensitivities")
    assert r.dJ_dk.item() == pytest.approx(difference(lambda k: r.problem_of(k, r.u0), 1.0), rel=1e-6)
    assert r.missed < 0.1 * r.miss and abs(r.k.item() - r.k_expert) < 1e-4


def difference(problem_of, q, step=1e-4):
    """The derivative of the optimal value by solutions at both sides."""
    values = [po.solve(problem_of(q + size), opt_tol=1e-11).objective for size in (step, -step)]
    return (values[0] - values[1]) / (2 * step)


def test_the_posterior_covers_the_truth_and_its_rank_is_enough():
    r = run("posterior")
    assert (r.after < r.before).all() and r.draws.shape == (5, 200)
    finer = po.Posterior(r.problem, r.result, np.eye(200), tol=1e-7)
    exact = np.sqrt((r.S * finer.covariance(r.S.T).T).sum(axis=1))
    assert len(finer.eigenvalues) > 11 and np.allclose(r.after, exact, rtol=2e-3)


def test_van_der_pol_agrees_with_pontryagins_principle():
    r = run("van_der_pol")
    reference = pontryagin()
    t = r.problem.grid.times
    x, y, a, _ = reference(t)
    error = r.u.numpy() - np.stack([x, y], axis=1)[1:]
    assert np.abs(error).max() < 1e-3
    middle = r.problem.grid.steps.t_mid.numpy()
    assert np.abs(r.z.numpy() + 0.5 * reference(middle)[2]).max() < 1e-3
    fine = np.linspace(0, 5, 2001)
    x, y, a, _ = reference(fine)
    J = trapezoid(x**2 + y**2 + a**2 / 4, fine)
    assert abs(J - 2.866953) < 1e-6  # as the page says
    halved = po.ControlProblem(r.VanDerPol(), r.objective, po.TimeGrid.uniform(200, T=5.0))
    finer = po.SQPSolver(halved, type="newton").solve().objective
    assert (r.result.objective - J) / (finer - J) == pytest.approx(4.0, abs=0.1)


def pontryagin():
    """(x, y, a, b)(t) with the adjoints a, b and z = -a / 2, by SciPy."""

    def f(t, w):
        x, y, a, b = w
        return np.stack([(1 - y**2) * x - y - a / 2, x, -2 * x - a * (1 - y**2) - b, -2 * y + a * (1 + 2 * x * y)])

    def ends(w0, w5):
        return np.array([w0[0], w0[1] - 1, w5[2], w5[3]])

    t = np.linspace(0, 5, 51)
    solution = solve_bvp(f, ends, t, np.zeros((4, t.size)), tol=1e-8)
    assert solution.success
    return solution.sol


def test_plans_of_a_receding_horizon_are_solutions_and_start_near_them():
    r = run("receding_horizon")
    assert max(r.iterations[1:]) < r.iterations[0] and r.error < 0.15
    again = po.solve(r.problem, method="newton")  # from zero
    assert again.objective == pytest.approx(r.result.objective, rel=1e-10)


def test_the_field_is_recovered_within_the_noise():
    r = run("inverse_problem")
    assert np.linalg.norm(r.k - r.k_true) < 0.05 * np.linalg.norm(r.k_true)
    misfit = r.problem.unpack(r.result)[0][:, r.sensors].numpy() - r.data[1:]
    assert np.std(misfit) == pytest.approx(np.std(r.noise), rel=0.15)  # neither over- nor underfitted


def test_the_control_without_time_is_the_projected_multiplier():
    """z = min(lam / alpha, 10), where (A + 30 h u^2) lam = h (d - u)."""
    r = run("stationary")
    u, d = r.u[0].numpy(), r.target
    A = np.diag(np.full(r.n, 2.0)) - np.diag(np.ones(r.n - 1), 1) - np.diag(np.ones(r.n - 1), -1)
    lam = np.linalg.solve(A / r.h + np.diag(30 * r.h * u**2), r.h * (d - u))
    assert np.abs(A / r.h @ u + r.h * (10 * u**3 - r.z.numpy())).max() < 1e-9
    assert np.abs(r.z.numpy() - np.minimum(lam / r.alpha, 10)).max() < 1e-5
    J = 0.5 * r.h * (np.sum((u - d) ** 2) + r.alpha * np.sum(r.z.numpy() ** 2))
    assert abs(r.result.objective - J) < 1e-14


def test_bounds_hold_and_multipliers_have_their_signs():
    r = run("control_bounds")
    assert r.z.min() >= -1e-12 and r.z.max() <= 2 + 1e-12
    assert r.low.any() and r.high.any()
    assert (r.mu[r.low] <= 1e-10).all() and (r.mu[r.high] >= -1e-10).all()
    assert r.mu[~r.low & ~r.high].abs().max() < 1e-8


def test_the_bound_on_the_state_is_missed_by_the_inverse_of_the_weight():
    r = run("state_penalties")
    missed = [-0.25 - float(r.problem(1.0).unpack(each)[0][:, 0].min()) for each in r.results[1:]]
    assert missed[0] / missed[1] == pytest.approx(10, rel=0.4) and missed[1] / missed[2] == pytest.approx(10, rel=0.4)
    assert r.results[-1].objective == pytest.approx(r.cold.objective, rel=1e-9)
    objectives = [each.objective for each in r.results[1:]] + [r.exact.objective]
    assert objectives == sorted(objectives) and r.least >= -0.25  # penalties are outside, the interior point is inside
    gaps = [objectives[-1] - each for each in objectives[:-1]]
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.1)


def test_the_flow_has_no_divergence_and_follows_its_target():
    pytest.importorskip("skfem")
    r = run("navier_stokes")
    assert (r.velocity @ r.flow.D).abs().max() < 1e-14
    last = r.velocity[-1] - torch.from_numpy(r.vortex)
    assert last.norm() < 0.05 * np.linalg.norm(r.vortex)
    assert po.assert_consistent(r.problem)


def test_controls_are_constant_over_blocks_and_no_better_than_free_ones():
    r = run("control_shapes")
    rows = r.z.reshape(r.blocks, -1, r.rod.control_dim)
    assert (rows - rows[:, :1]).abs().max() == 0.0
    assert torch.allclose(rows[:, 0], r.q.reshape(r.blocks, 4) @ torch.from_numpy(r.hats).T, atol=1e-14)
    assert r.free.objective < r.result.objective


@pytest.mark.skipif(not PETSc.Sys.hasExternalPackage("mumps"), reason="this PETSc has no MUMPS, which the page shows")
def test_the_kkt_system_by_hand_is_one_matrix_in_two_forms():
    """And a step of it solves the linear equations of Newton's method."""
    r = run("kkt_by_hand")
    assert po.symmetry_error(r.shell) < 1e-13
    x, by_entries, by_product = (r.right.duplicate() for _ in range(3))
    po.randomize(x, 1)
    r.assembled.mult(x, by_entries)
    r.shell.mult(x, by_product)
    by_product.axpy(-1.0, by_entries)
    assert by_product.norm() < 1e-12 * by_entries.norm()
    r.shell.destroy(), r.operator.free()


def test_a_second_network_takes_away_what_the_first_leaves():
    r = run("multi_stage")
    assert r.less < 0.02 * r.error and r.less < 0.1 * r.alone


def test_the_own_optimizer_finds_newtons_optimum():
    r = run("own_optimizer")
    newton = po.solve(r.problem, method="newton").objective
    for result in r.results.values():
        assert result.objective == pytest.approx(newton, rel=1e-8)
    few = r.BarzilaiBorwein(po.ReducedObjective(r.problem), values=1, max_it=3).minimize(r.start)
    assert few.reason == po.Reason.DIVERGED_MAX_IT and few.iterations == 3  # limits are those of every Minimizer


def test_layers_in_parallel_train_as_layers_in_series():
    r = run("training_loop")
    assert r.right == 1.0
    serial = nn.Sequential(r.network[0], r.layers.serial(), r.network[2])
    torch.manual_seed(1)
    fresh = nna.LayerParallel(None, lambda: nna.dense(r.width), r.depth, r.Tf, coarsening="4", cycles=8)
    features = r.network[0](r.points).detach()
    assert torch.allclose(
        fresh(features), fresh.serial()(features), atol=1e-5
    )  # C-points settle after N / (2 m) cycles
    assert serial.state_dict().keys() == r.network.state_dict().keys()


def test_the_ported_network_is_the_serial_one():
    r = run("from_torchbraid")
    features = r.network.open_nn(r.images).detach()
    parallel, serial = r.network.parallel_nn(features), r.network.parallel_nn.serial()(features)
    assert torch.allclose(parallel, serial, atol=1e-5)  # two cycles with FCF relaxation are exact for four intervals


def test_the_ported_problem_has_the_optimum_of_a_loop_over_time():
    r = run("from_pyadjoint")
    assert r.together.objective == pytest.approx(loop_over_time(r), rel=1e-10)
    assert r.best.objective == pytest.approx(r.together.objective, rel=1e-6)


def loop_over_time(r):
    """min J of the same quadratic problem from states that are stepped through one by one, J = |G z - e|^2 / 2."""
    dt, N, n, m = 1 / 20, 20, r.n - 1, r.n + 1
    step = np.linalg.inv((r.M + dt * r.A).toarray())
    state = np.zeros((N * m, n))  # of unit controls, transposed
    rows = []
    for k in range(N):
        force = np.zeros((N * m, m))
        force[k * m : (k + 1) * m] = np.eye(m)
        state = (state @ r.M.toarray() + dt * force @ r.B.toarray().T) @ step
        rows.append(state.T)
    M, Q = (np.linalg.cholesky(form.toarray()).T for form in (r.M, r.Q))
    G = np.sqrt(dt) * np.vstack([M @ row for row in rows] + [np.sqrt(r.alpha) * np.kron(np.eye(N), Q)])
    e = np.sqrt(dt) * np.concatenate([M @ r.Misfit.d.numpy()] * N + [np.zeros(N * m)])
    z = np.linalg.lstsq(G, e, rcond=None)[0]
    return 0.5 * np.sum((G @ z - e) ** 2)
