"""Problems without time: natural weights, nothing counted twice, all solvers, and clear words for what is not one."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import pdeopt as po
from pdeopt.optimize.splitting import ADMM, CONTROL_DEFAULTS, TimeSplitting

n, alpha = 7, 1e-3
h = 1 / (n + 1)
x = h * np.arange(1, n + 1)
mass = h * sp.eye(n, format="csr")
stiffness = sp.diags([-1.0, 2.0, -1.0], [-1, 0, 1], (n, n), format="csr") / h
K, M = po.StepMatrix.constant(stiffness), po.StepMatrix.constant(mass)
target = np.sin(np.pi * x) + x


def linear(u, z):
    return K(u) - M(z)


def cubic(u, z):
    return K(u) + h * u**3 - M(z)


def costs():
    """The same objective in three ways; the second would count u_0 at any grid in time."""
    d = torch.from_numpy(target)

    def J(u, z):
        return 0.5 * h * (u - d).square().sum(1) + 0.5 * alpha * h * z.square().sum(1)

    control = po.ControlCost(alpha, mass)
    return {
        "terms": po.Tracking(target, mass) + control,
        "weight": po.Tracking(target, mass, weight=1.0) + control,
        "J": J,
    }


def problem(residual=cubic, objective=None, **words):
    words = {"state_mass": mass, "control_mass": mass} | words
    return po.stationary(residual, objective or costs()["terms"], n, n, **words)


@pytest.mark.parametrize("name", ["terms", "weight", "J"])
def test_the_optimum_is_that_of_the_normal_equations(name):
    """u = S z with S = K^-1 M: J = h/2 |S z - d|^2 + alpha h/2 |z|^2, whatever u_0 is."""
    S = np.linalg.solve(stiffness.toarray(), mass.toarray())
    z = np.linalg.solve(S.T @ S + alpha * np.eye(n), S.T @ target)
    J = 0.5 * h * (np.sum((S @ z - target) ** 2) + alpha * np.sum(z**2))
    start = np.full(n, 3.0)
    found = problem(linear, costs()[name], start=start)
    result = po.solve(found, method="newton")
    u, control, p = found.unpack(result)
    assert result.objective == pytest.approx(J, rel=1e-10)
    assert np.allclose(control, z, atol=1e-9) and np.allclose(u[0], S @ z, atol=1e-9) and not len(p)


METHODS = ["sqp", "newton", "active_set", "tao", "lbfgs", "ssbroyden", "spqn", "tr", "apts", "mgopt", "rmtr"]


def test_all_methods_find_the_same():
    reference = po.solve(problem(), method="newton", opt_tol=1e-13, feas_tol=1e-13).objective
    for method in METHODS:
        full = method in METHODS[:3]
        tight = {"opt_tol": 1e-10} | ({"feas_tol": 1e-10} if full else {"max_it": 200})
        result = po.solve(problem(), method=method, **tight)
        assert result.converged and result.objective == pytest.approx(reference, abs=1e-12), method
    split = ADMM(TimeSplitting(problem()), **CONTROL_DEFAULTS).solve()
    assert split.objective == pytest.approx(reference, abs=1e-10)


def test_bounds_on_the_state_need_not_hold_where_its_solve_begins():
    """0.5 <= u with a start of 0, which is no u_0."""
    result = po.solve(problem(), state_lower=0.5)
    u, z, _ = problem().unpack(result)
    assert result.converged and u.min() == pytest.approx(0.5, abs=1e-7) and u.max() > 0.6
    assert torch.allclose(K(u)[0] + h * u[0] ** 3, h * torch.as_tensor(z), atol=1e-8)


@pytest.mark.parametrize("precond", ["direct", "wathen", "reduced", "multigrid"])
def test_kkt_systems_by_preconditioners_of_time(precond):
    result = po.solve(problem(), method="newton", precond=precond)
    assert result.converged and max(result.history["krylov"]) <= 12


def test_derivatives_with_parameters():
    """F and J that depend on p, by all the checks; J_0 is no part of them."""

    def residual(u, z, p):
        return p[0].exp() * K(u) + h * u**3 - M(z) * (1 + p[1] ** 2)

    def J(u, z, p):
        return 0.5 * h * u.square().sum(1) + h * (z - 1).square().sum(1) + (p.square().sum() * u[:, 0])

    found = problem(residual, J, param_dim=2)
    assert max(po.assert_consistent(found).values()) <= 1e-6
    reduced = po.ReducedObjective(found)
    z, dz = (po.randomize(found.create_design(), seed) for seed in (1, 2))
    remainders = po.taylor_remainders(reduced, z, dz)
    for name, rate in (("value", 1), ("gradient", 2), ("hessian", 3)):
        assert po.taylor_rates(remainders[name])[-1] == pytest.approx(rate, abs=0.25)


def test_a_declared_pattern_is_that_of_the_equation():
    curved = sp.diags([1.0] * n + [0.0] * n, format="csr")
    curved.eliminate_zeros()
    declared = problem(pattern=(stiffness, mass, curved))
    assert problem(linear, pattern=(stiffness, mass)).constraint.pattern.W.nnz == 0
    for name in ("A", "B", "C"):
        given, found = (getattr(p.constraint.pattern, name).csr for p in (declared, problem()))
        assert (given != found).nnz == 0
    assert po.solve(declared).objective == pytest.approx(po.solve(problem()).objective, rel=1e-12)
    with pytest.raises(po.InputError, match="misses nonzero derivatives"):
        po.solve(problem(pattern=(sp.eye(n), mass, curved)))


def test_an_equation_without_time_as_one_step_is_refused():
    """Its tracking term would be halved, in silence."""

    class Step(po.TimeDependentConstraint):
        state_dim = control_dim = n

        def initial_state(self, p):
            return torch.zeros(n, dtype=torch.float64)

        def residual(self, u_old, u_new, z, steps):
            return cubic(u_new, z)

    grid = po.TimeGrid.uniform(1, 1.0)
    with pytest.raises(po.InputError, match=r"pdeopt\.stationary"):
        po.ControlProblem(Step(), costs()["terms"], grid)
    weighted = po.Tracking(target, mass, times=[1.0], weight=1.0) + po.ControlCost(alpha, mass)
    as_one_step = po.ControlProblem(Step(), weighted, grid)
    words = {"method": "newton", "opt_tol": 1e-12, "feas_tol": 1e-12}
    assert po.solve(as_one_step, **words).objective == pytest.approx(po.solve(problem(), **words).objective, rel=1e-12)


BAD = {
    "residual": (dict(residual=3), "function of u and z"),
    "objective": (dict(objective=4.0), "Objective, or a function"),
    "pattern": (dict(pattern=(stiffness,)), "1 sparsities"),
    "shapes of a pattern": (dict(pattern=(stiffness, sp.eye(3))), "shapes"),
    "start": (dict(start=[1.0]), "shape"),
    "rows of a target": (dict(objective=po.Tracking(np.zeros((5, n)))), "target"),
    "a residual that forgets the batch": (dict(residual=lambda u, z: cubic(u, z)[0]), "residual"),
    "an objective that forgets the batch": (dict(objective=lambda u, z: u.sum()), "StationaryCost"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    words, message = BAD[case]
    with pytest.raises(po.InputError, match=message):
        problem(**words)
