"""The posterior of a small inverse problem is that of dense matrices: covariance, variances, samples; of low rank."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import pdeopt as po
from pdeopt.optimize.solutions.precision import Precision
from problems.benchmarks.posterior import measure
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries, python, relative

NOISE = 1e-2


def conductor(n=7):
    """Misfit of measurements with noise, and the prior's precision, (n + 1, n + 1)."""
    rod = examples.Rod(n)
    P = (0.1 * rod.param_mass).tocsc()
    misfit = po.Tracking(0.1 * np.ones(n), weight=NOISE**-2)
    prior = po.TerminalLoss(lambda u, p: 0.5 * p @ torch.from_numpy(P.toarray()) @ p)
    return po.ControlProblem(rod, misfit + prior, po.TimeGrid.uniform(6, 1.0)), P


def source(num_steps=5):
    """Controls with a price, which is their prior: dt alpha Q."""
    problem = examples.heat(num_steps=num_steps)
    cost = po.ControlCost(1e-3, problem.control_mass)
    problem = po.ControlProblem(problem.constraint, po.Tracking(np.ones(problem.n), weight=1.0) + cost, problem.grid)
    return problem, 1e-3 / num_steps * sp.kron(sp.eye(num_steps), problem.control_mass.as_csr())


def dense_hessian(problem, result, gauss_newton):
    """(d/dd of the reduced gradient), by dense derivatives of all steps."""
    oracle = Oracle(problem)
    x = torch.cat([entries(result.state), entries(result.design)])
    lam = 0.0 if gauss_newton else entries(result.multiplier)
    W = torch.func.hessian(lambda y: oracle.J(y) + (lam * oracle.F(y)).sum())(x)
    F, states = torch.func.jacfwd(oracle.F)(x), problem.layout.state_size
    S = torch.cat([-torch.linalg.solve(F[:, :states], F[:, states:]), torch.eye(len(x) - states, dtype=x.dtype)])
    return (S.T @ W @ S).numpy()


@pytest.mark.parametrize("make", [conductor, source])
@pytest.mark.parametrize("gauss_newton", [True, False])
def test_it_is_the_inverse_of_the_dense_hessian(make, gauss_newton):
    problem, P = make()
    result = po.solve(problem, method="newton", opt_tol=1e-9)
    posterior = po.Posterior(problem, result, P, tol=0.0, gauss_newton=gauss_newton)
    H = dense_hessian(problem, result, gauss_newton)
    covariance = np.linalg.inv(H)
    assert relative(posterior.covariance(np.eye(len(H))), covariance) < 1e-8
    assert relative(posterior.variance(), covariance.diagonal()) < 1e-8
    mu, V = posterior.eigenvalues, posterior.directions
    assert relative(V.T @ (P @ V), np.eye(len(mu))) < 1e-10 and (np.diff(mu) <= 0).all()
    sign, logarithm = np.linalg.slogdet(np.linalg.solve(P.toarray(), H))
    assert sign > 0 and posterior.information() == pytest.approx(0.5 * logarithm, rel=1e-8)


def test_samples_have_mean_and_covariance():
    """The map from white noise to samples is a root of the covariance; and many samples show it."""
    problem, P = conductor()
    posterior = po.Posterior(problem, po.solve(problem, method="newton"), P, tol=0.0)
    covariance = posterior.covariance(np.eye(len(posterior.mean)))
    x, V, mu = posterior.prior.sample(np.eye(len(posterior.mean))), posterior.directions, posterior.eigenvalues
    root = x - (V * (1 - (1 + mu) ** -0.5)) @ (V.T @ (P @ x))
    assert relative(root @ root.T, covariance) < 1e-10
    samples = posterior.sample(4000, seed=1)
    assert samples.shape == (4000, 8) and relative(np.cov(samples.T), covariance) < 0.1
    assert np.abs(samples.mean(0) - posterior.mean).max() < 5 * np.sqrt(covariance.diagonal().max() / 4000)


def test_few_directions_are_enough_and_found_with_their_tolerance():
    """Three sensors at six times see few directions of 25."""
    problem, P = conductor(24)
    misfit = po.Tracking(0.1 * np.ones(3), observe=[5, 11, 17], weight=NOISE**-2)
    problem = po.ControlProblem(problem.constraint, misfit + problem.objective.terms[1], problem.grid)
    result = po.solve(problem, method="tao", tao_type="nls", gauss_newton=True)
    exact, few = (po.Posterior(problem, result, P, tol=tol) for tol in (0.0, 1e-3))
    assert len(few.eigenvalues) < 20 and few.products < exact.products
    kept = exact.eigenvalues[: len(few.eigenvalues)]
    assert np.allclose(few.eigenvalues, kept, rtol=1e-6, atol=1e-5) and (exact.eigenvalues[len(kept) :] < 1.01e-3).all()
    error = (few.variance() - exact.variance()) / few.prior.variance()
    assert error.min() > -1e-9 and error.max() < 2e-3
    assert len(po.Posterior(problem, result, P, rank=4).eigenvalues) == 4


@pytest.mark.slow
def test_what_data_say_does_not_depend_on_the_mesh():
    coarse, fine = (measure(side, 1) for side in (40, 80))
    assert fine["information"] == pytest.approx(coarse["information"], rel=1e-2)
    assert all(abs(fine[name] - coarse[name]) <= 1 for name in ("newton", "directions"))
    assert fine["cg"] <= 1.1 * coarse["cg"]


@pytest.mark.parametrize("dense", [True, False])
def test_a_precision_is_factored_and_sampled(dense):
    P = sp.diags([-1.0, 2.7, -1.0], [-1, 0, 1], shape=(60, 60)) + sp.diags([0.3, 0.3], [-30, 30], shape=(60, 60))
    P = sp.csr_matrix(P.toarray() + 1e-3) if dense else P
    precision = Precision(P, 60)
    covariance, root = np.linalg.inv(P.toarray()), precision.sample(np.eye(60))
    assert relative(root @ root.T, covariance) < 1e-12 and relative(precision.solve(np.eye(60)), covariance) < 1e-12
    assert relative(precision.whiten(np.eye(60)), root.T) < 1e-12
    assert relative(precision.variance(), covariance.diagonal()) < 1e-12


@pytest.mark.parametrize(
    "words, match",
    [
        ({"precision": -np.eye(8)}, "precision"),
        ({"precision": np.eye(3)}, "precision"),
        ({"precision": 1e6 * np.eye(8)}, "part of the objective"),
        ({"max_it": 1}, "converged"),
    ],
)
def test_what_is_refused(words, match):
    problem, P = conductor()
    result = po.solve(problem, method="newton", max_it=words.get("max_it", 50))
    with pytest.raises(po.InputError, match=match):
        po.Posterior(problem, result, words.get("precision", P))


ON_RANKS = """
import numpy as np
import pdeopt as po
from petsc4py import PETSc
from tests.pdeopt.optimize.solutions.test_posterior import conductor

problem, P = conductor()
posterior = po.Posterior(problem, po.solve(problem, method="newton", opt_tol=1e-10), P, tol=0.0)
numbers = [*posterior.variance(), *posterior.sample(1)[0], posterior.information()]
PETSc.Sys.Print(" ".join(f"{x:.8e}" for x in numbers))
"""


@pytest.mark.mpi
@pytest.mark.slow
def test_two_ranks_have_the_same_posterior():
    outputs = [python("-c", ON_RANKS, ranks=ranks) for ranks in (1, 2)]
    assert [done.returncode for done in outputs] == [0, 0], outputs[1].stderr
    one, two = (np.array(done.stdout.split(), dtype=float) for done in outputs)
    assert len(one) == 17 and np.allclose(one, two, rtol=1e-6)
