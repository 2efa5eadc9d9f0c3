"""Spectra by Lanczos against dense eigenvalues, and Gauss quadrature against moments."""

import numpy as np
import pytest
import torch
from torch import nn

from nn_adapters.curvature.layers import curved_layers
from nn_adapters.curvature.likelihoods import CrossEntropy
from nn_adapters.curvature.products import FisherMatrix
from nn_adapters.curvature.spectrum import HessianMatrix, lanczos, largest_eigenvalue, spectral_density
from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import serial_network
from pdeopt.core.errors import InputError
from tests.helpers.curvature import dense_fisher, problem


def symmetric(size=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return A + A.T


def dense_hessian(network, loss, x, y):
    """By second derivatives of the loss as a function of one flat vector, row by row: `torch.func.hessian` is wrong
    where a LayerNorm has inputs and scales that both depend on it (PyTorch 2.13)."""
    shapes = {name: p.shape for name, p in network.named_parameters()}

    def value(theta):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        values = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts)}
        return loss(torch.func.functional_call(network, values, (x,)), y)

    theta = nn.utils.parameters_to_vector(network.parameters()).detach()
    return torch.autograd.functional.hessian(value, theta)


def test_products_with_the_hessian_are_those_of_the_dense_one():
    """In parts of unlike sizes; a layer that the loss does not see has zeros."""
    network, x, y = problem()
    H = dense_hessian(network, CrossEntropy(), x, y)
    matrix = HessianMatrix(network, CrossEntropy(), [(x[:30], y[:30]), (x[30:], y[30:])])
    found = torch.stack([matrix.times(e) for e in torch.eye(matrix.size, dtype=torch.float64)])
    assert float((found - H).abs().max()) <= 1e-12 * float(H.abs().max())
    linear = HessianMatrix(nn.Linear(2, 1).double(), lambda out, y: out.mean() + out.square().mean(), [(x[:, :2], y)])
    assert linear.times(torch.ones(3).double()).shape == (3,)
    assert all(p.grad is None for p in network.parameters())


def test_running_means_stay_and_parallel_layers_are_refused():
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    _, x, y = problem()
    before = [each.clone() for each in network.buffers()]
    matrix = HessianMatrix(network, CrossEntropy(), [(x, y)])
    v, w = torch.randn(2, matrix.size).double()
    assert float(v @ matrix.times(w)) == pytest.approx(float(w @ matrix.times(v)))
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), before))
    parallel = nn.Sequential(LayerParallel(None, lambda: dense(4), 8), nn.Linear(4, 3)).double()
    with pytest.raises(InputError, match="serial_network"):
        HessianMatrix(parallel, CrossEntropy(), [(x, y)])
    HessianMatrix(serial_network(parallel), CrossEntropy(), [(x, y)])


def test_sharpness_is_the_largest_eigenvalue_of_the_hessian():
    network, x, y = problem()
    expected = float(torch.linalg.eigvalsh(dense_hessian(network, CrossEntropy(), x, y))[-1])
    matrix = HessianMatrix(network, CrossEntropy(), [(x, y)])
    found = largest_eigenvalue(matrix.times, torch.randn(matrix.size).double(), rtol=1e-8)
    assert found.converged and found.products < matrix.size
    assert found.value == pytest.approx(expected, rel=1e-8) and found.value <= expected * (1 + 1e-12)
    rough = largest_eigenvalue(matrix.times, torch.randn(matrix.size).double(), rtol=1e-8, max_products=4)
    assert not rough.converged and rough.products == 4 and abs(rough.value - expected) <= 10 * rough.error


def test_it_is_the_largest_and_not_the_largest_in_absolute_value():
    A = torch.diag(torch.tensor([-9.0, -3.0, 1.0, 2.0]).double())
    found = largest_eigenvalue(lambda v: A @ v, torch.ones(4).double(), rtol=1e-10)
    assert found.value == pytest.approx(2.0) and found.converged


@pytest.mark.parametrize("steps", [3, 7])
def test_the_points_are_a_gauss_quadrature(steps):
    """Exact for polynomials of degree 2 steps - 1."""
    A, q = symmetric(), torch.randn(30, dtype=torch.float64)
    values, vectors = lanczos(lambda v: A @ v, q, steps).eigen()
    power = q / q.norm()
    for degree in range(2 * steps):
        expected = float(power @ q / q.norm())
        scale = np.abs(values).max() ** degree
        assert abs(vectors[0] ** 2 @ values**degree - expected) <= 1e-11 * scale
        power = A @ power


def test_invariant_subspaces_end_it():
    A = torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0]).double())
    found = lanczos(lambda v: A @ v, torch.ones(5).double(), 5)
    assert found.rest == 0.0 and np.allclose(found.eigen()[0], [1.0, 5.0])
    zero = largest_eigenvalue(lambda v: 0.0 * v, torch.ones(5).double())
    assert zero.value == 0.0 and zero.converged and zero.products == 1


def test_the_spectrum_of_a_fisher_matrix():
    """Moments and shares are those of the dense eigenvalues."""
    network, x, _ = problem()
    values = torch.linalg.eigvalsh(dense_fisher(network, CrossEntropy(), x))
    matrix, size = FisherMatrix(network, curved_layers(network), CrossEntropy(), [(x,)]), len(values)
    found = spectral_density(matrix.times, size, steps=8, probes=15)
    assert found.weights.sum() == pytest.approx(1.0) and found.size == size
    for power in (1, 2):
        assert found.moment(power) == pytest.approx(float((values**power).mean()), rel=0.15)
    edge = 0.3 * float(values[-1])
    assert found.share_above(edge) == pytest.approx(float((values > edge).double().mean()), abs=1.5 / size)
    assert found.values[-1] == pytest.approx(float(values[-1]), rel=1e-4)
    assert found.values[0] >= -1e-10 * found.values[-1]


def test_half_of_a_spectrum():
    """Random matrices have Wigner's semicircle: half of the eigenvalues are above 0."""
    A = symmetric(200) / 200**0.5
    found = spectral_density(lambda v: A @ v, 200, steps=20, probes=20)
    assert found.share_above(0.0) == pytest.approx(0.5, abs=0.05)
    single = spectral_density(lambda v: A.float() @ v, 200, steps=20, probes=20, like=torch.empty(0))
    assert single.moment(2) == pytest.approx(found.moment(2), rel=1e-4)


def test_what_is_refused():
    with pytest.raises(InputError, match="start"):
        lanczos(lambda v: v, torch.zeros(3), 2)
    with pytest.raises(InputError, match="finite"):
        lanczos(lambda v: v * float("nan"), torch.ones(3), 2)
    with pytest.raises(InputError, match="probes"):
        spectral_density(lambda v: v, 3, probes=0)
