"""Poisson's equation: the optimum in closed form, projection and shrinkage node by node, and all solvers."""

import numpy as np
import pytest
import torch

import pdeopt as po
from problems.poisson import PoissonCase, PoissonSettings, main

SPARSE = dict(n=10, alpha=1e-5, beta=1e-3, target="waves")
TIGHT = {"opt_tol": 1e-13, "feas_tol": 1e-13}


def solve(method="newton", lower=None, upper=None, words=None, **settings):
    case = PoissonCase(PoissonSettings(**settings))
    low, high = case.bounds(lower, upper)
    result = po.solve(case.problem, method=method, lower=low, upper=high, **(TIGHT if words is None else words))
    assert result.converged, result.message
    return case, result


def adjoint(case, result):
    """lam, for which alpha D z - D lam is zero without bounds and L1 cost."""
    lam, _, _ = case.problem.fields(case.problem.join(result.multiplier, result.design))
    return lam[0]


@pytest.mark.parametrize("alpha", [1.0, 1e-4, 1e-8])
def test_the_optimum_in_closed_form(alpha):
    case, result = solve(n=12, alpha=alpha)
    J, factor = case.optimum()
    d = torch.from_numpy(case.target)
    u, _, _ = case.problem.unpack(result)
    assert result.objective == pytest.approx(J, rel=1e-9)
    assert torch.allclose(case.control(result), factor * d, rtol=1e-8, atol=1e-9)
    assert torch.allclose(u[0], factor / case.eigenvalue * d, rtol=1e-8, atol=1e-10)


def test_the_optimum_converges_to_that_of_the_continuous_problem():
    """Of second order, with the eigenvalue 2 pi^2."""
    price = 1e-4 * (2 * np.pi**2) ** 2
    J = price / (1 + price) / 8
    errors = [abs(PoissonCase(PoissonSettings(n=n)).optimum()[0] - J) for n in (8, 16, 32)]
    assert np.log2(np.array(errors[:-1]) / errors[1:]) == pytest.approx(2.0, abs=0.05)


def test_derivatives_are_those_of_the_residual():
    case = PoissonCase(PoissonSettings(**SPARSE | {"n": 5}))
    po.assert_consistent(case.problem)
    z, dz = (po.randomize(case.problem.create_design(), seed) for seed in (1, 2))
    remainders = po.taylor_remainders(po.ReducedObjective(case.problem), z, dz)
    assert po.taylor_rates(remainders["gradient"])[-1] == pytest.approx(2, abs=1e-3)
    assert max(remainders["hessian"]) <= 1e-12 * max(remainders["value"])  # the problem is quadratic


def test_all_solvers_agree():
    _, result = solve(n=8, target="waves")
    for method in ("sqp", "active_set", "tao", "lbfgs", "ssbroyden", "tr"):
        words = {"opt_tol": 1e-10} | ({"feas_tol": 1e-10} if method in ("sqp", "active_set") else {"max_it": 300})
        other = solve(method, n=8, target="waves", words=words)[1]
        assert other.objective == pytest.approx(result.objective, rel=1e-8), method


def test_bounds_are_met_and_their_multipliers_have_a_sign():
    """z = P(lam / alpha) at each node, and the same optimum by projected steps."""
    words = dict(n=8, target="waves", alpha=1e-4)
    case, result = solve("active_set", lower=-5.0, upper=2.0, **words)
    z = case.control(result)
    assert float(z.min()) == -5.0 and float(z.max()) == 2.0
    lin = case.problem.at(case.problem.join(result.state, result.design))
    mu = -case.problem.fields(lin.lagrangian_gradient(result.multiplier))[1]
    low, high = z == -5.0, z == 2.0
    assert (mu[low] <= 1e-14).all() and (mu[high] >= -1e-14).all() and mu[~low & ~high].abs().max() <= 1e-14
    assert torch.allclose(z, (adjoint(case, result) / 1e-4).clamp(-5.0, 2.0), atol=1e-8)
    projected = solve("tao", -5.0, 2.0, {"opt_tol": 1e-8, "max_it": 500}, **words)[1]
    assert projected.objective == pytest.approx(result.objective, rel=1e-8)


# -- sparse controls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(None, None), (-30.0, 30.0), (1.0, 30.0)], ids=str)
def test_sparse_controls_are_shrunk_and_projected_adjoints(bounds):
    """z = P(sign(q) max(|q| - beta, 0) / alpha), the subgradient condition, with zeros to the last bit."""
    case, result = solve("active_set", *bounds, **SPARSE)
    z, q = case.control(result), adjoint(case, result)
    low, high = (-np.inf if bounds[0] is None else bounds[0]), (np.inf if bounds[1] is None else bounds[1])
    shrunk = torch.sign(q) * (q.abs() - case.settings.beta).clamp(min=0) / case.settings.alpha
    assert torch.allclose(z, shrunk.clamp(low, high), atol=1e-7)
    if low < 0 < high:
        zero = z == 0
        assert 0.3 < float(zero.double().mean()) < 0.95 and q[zero].abs().max() <= case.settings.beta * (1 + 1e-9)
    parts = case.problem.unpack(result)[1].reshape(2, -1)
    assert (parts.amin(0) == 0).all()  # no node has both signs


def test_a_high_price_makes_all_controls_zero():
    """beta > max |A^-1 D d| = 1 / lam (G. Stadler, Comput. Optim. Appl. 44, 2009, Lemma 3.1)."""
    dear = 1.0 / PoissonCase(PoissonSettings(n=8)).eigenvalue
    case, result = solve("active_set", n=8, beta=1.01 * dear)
    assert not case.control(result).any() and result.objective == pytest.approx(1 / 8, rel=1e-12)
    case, result = solve("active_set", n=8, beta=0.99 * dear)
    assert case.control(result).any() and result.objective < 1 / 8


@pytest.mark.slow
def test_the_sparse_optimum_by_projected_steps():
    words = SPARSE | {"n": 8}
    newton = solve("active_set", -30.0, 30.0, **words)[1]
    projected = solve("tao", -30.0, 30.0, {"opt_tol": 1e-8, "max_it": 1000}, **words)[1]
    assert projected.objective == pytest.approx(newton.objective, rel=1e-8)


# -- time per unknown does not depend on mesh and weight --------------------------------------------------------


def test_iterations_do_not_depend_on_mesh_and_weight():
    """The eigenvalues of the matched Schur complement lie in [1/2, 1]."""
    for n in (8, 24):
        for alpha in (1.0, 1e-8):
            words = {"precond": "wathen", "kkt_rtol": 1e-8}
            _, result = solve(n=n, alpha=alpha, target="waves", words=words)
            assert result.iterations <= 2 and max(result.history["krylov"]) <= 8


# -- the script ----------------------------------------------------------------------------------------------


def test_what_is_written(tmp_path, capfd):
    file = tmp_path / "s.npz"
    words = ["-n", "6", "-beta", "1e-3", "-lower", "-3", "-output", str(file), "-summary", str(tmp_path / "s.json")]
    objective = main([*words, "-target", "waves"])
    found = np.load(file)
    assert {name: found[name].shape for name in found} == {
        **dict.fromkeys(("x", "y", "target", "state", "control", "multiplier"), (49,)),
        "cells": (72, 3),
        "objective": (),
    }
    assert found["objective"] == objective and found["control"].min() >= -3.0
    assert "exact optimum" not in capfd.readouterr().out
    assert main(["-n", "6"]) == pytest.approx(PoissonCase(PoissonSettings(n=6)).optimum()[0], rel=1e-9)
    assert "exact optimum" in capfd.readouterr().out


BAD = {
    "n": (("-n", "1"), "-n", ">= 2"),
    "alpha": (("-alpha", "0"), "-alpha", "> 0"),
    "beta": (("-beta", "-1"), "-beta", ">= 0"),
    "target": (("-target", "two"), "-target", "sine | waves"),
    "L1 cost without bounds on the parts": (("-beta", "1", "-solver", "newton"), "bounds", "-solver active_set"),
    "L1 cost by windows of time": (("-beta", "1", "-solver", "admm"), "bounds", "-solver tao"),
    "bounds that cross": (("-beta", "1", "-lower", "2", "-upper", "1"), "-lower", "lower <= upper"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_what_is_legal(case):
    words, name, legal = BAD[case]
    with pytest.raises(po.InputError) as error:
        main(["-n", "4", *words])
    assert name in str(error.value) and legal in str(error.value)
