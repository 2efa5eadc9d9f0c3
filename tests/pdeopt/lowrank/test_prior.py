"""Gaussian priors: their precision, price and samples are those of the covariance; as the metric of a problem."""

import numpy as np
import pytest
import torch

import pdeopt as po
from pdeopt.lowrank import GaussianPrior, Matern
from tests.helpers.examples import Dense
from tests.helpers.support import relative


def test_precision_price_and_samples_belong_to_the_covariance():
    x = np.random.default_rng(0).random((300, 1))
    prior, covariance = GaussianPrior(Matern(0.3), x, nugget=1e-4), Matern(0.3).block(x, x) + 1e-4 * np.eye(300)
    assert relative(prior.precision @ covariance, np.eye(300)) < 1e-7
    p = torch.from_numpy(np.sin(6.0 * x[:, 0])).requires_grad_()
    value = prior.penalty(p)
    expected = np.linalg.solve(covariance, p.detach().numpy())
    assert np.isclose(float(value.detach()), 0.5 * float(p.detach().numpy() @ expected), rtol=1e-7)
    assert relative(torch.autograd.grad(value, p)[0].numpy(), expected) < 1e-6
    S = np.stack([prior.sample(column) for column in np.eye(300)], axis=1)
    assert relative(S @ S.T, covariance) < 1e-9 and torch.equal(prior.field(torch.eye(300).double()), prior.root)
    assert relative(prior.root.numpy(), S) < 1e-12


def test_its_covariance_is_the_riesz_map_of_parameters():
    prior = GaussianPrior(Matern(0.5), [[0.0], [0.3]], nugget=1e-3)
    constraint = Dense()
    constraint.param_mass = prior.precision
    problem = po.ControlProblem(constraint, po.Tracking(np.zeros(constraint.state_dim)), po.TimeGrid.uniform(4, T=1.0))
    metric = po.RieszMetric(problem)
    g = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    covariance = Matern(0.5).block(np.array([[0.0], [0.3]]), np.array([[0.0], [0.3]])) + 1e-3 * np.eye(2)
    assert torch.allclose(metric.parameters.solve(g)[0], torch.from_numpy(covariance) @ g[0], rtol=1e-10)


@pytest.mark.parametrize("words", [{"nugget": 0.0}, {"points": np.zeros(3)}])
def test_bad_input_is_named(words):
    with pytest.raises(po.InputError, match="legal"):
        GaussianPrior(Matern(1.0), **{"points": np.zeros((3, 1)), **words})
    with pytest.raises(po.InputError, match="noise"):
        GaussianPrior(Matern(1.0), np.zeros((3, 1))).sample(np.zeros(2))
