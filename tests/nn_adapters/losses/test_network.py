"""A network's loss as a smooth function of a flat vector."""

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.losses.network import NetworkLoss
from pdeopt.core.errors import InputError
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.smooth import Restriction


def function(samples=12, **words):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    return NetworkLoss(network.double(), nn.functional.cross_entropy, x, torch.arange(samples) % 2, **words)


def test_value_and_gradient_are_those_of_autograd():
    f = function(tikhonov=0.1)
    theta = f.parameters()
    value, gradient = f.value_and_gradient(theta)
    loss = nn.functional.cross_entropy(f.network(f.x), f.y)
    loss = loss + 0.05 * sum((p**2).sum() for p in f.network.parameters())
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(f.network.parameters()))])
    assert value == pytest.approx(float(loss.detach()), rel=1e-14) == f.value(theta)
    assert torch.allclose(gradient, expected, rtol=1e-13, atol=1e-15)
    assert (f.tally.values, f.tally.gradients, f.tally.work) == (1, 1, pytest.approx(4 / 3))


def test_hessian_products_are_derivatives_of_the_gradient_and_symmetric():
    f = function(tikhonov=0.1)
    theta, (d, e) = f.parameters(), torch.randn(2, f.size, generator=torch.Generator().manual_seed(2)).double()
    h = 1e-6
    slope = (f.value_and_gradient(theta + h * d)[1] - f.value_and_gradient(theta - h * d)[1]) / (2 * h)
    product = f.hvp(theta, d)
    assert (product - slope).norm() <= 1e-8 * slope.norm()
    assert float(product @ e) == pytest.approx(float(f.hvp(theta, e) @ d), rel=1e-12)


def test_chunks_do_not_change_anything():
    whole, parts = function(), function(chunk=5)
    theta, d = whole.parameters(), torch.ones(whole.size, dtype=torch.float64)
    assert whole.value(theta) == pytest.approx(parts.value(theta), rel=1e-14)
    assert torch.allclose(whole.value_and_gradient(theta)[1], parts.value_and_gradient(theta)[1], atol=1e-15)
    assert torch.allclose(whole.hvp(theta, d), parts.hvp(theta, d), atol=1e-14)


def test_a_mean_of_subsets_is_the_whole_and_costs_as_much():
    f = function(tikhonov=0.1)
    theta, subsets = f.parameters(), [f.subset(torch.arange(s, 12, 3)) for s in range(3)]
    value, gradient = f.value_and_gradient(theta)
    found = [g.value_and_gradient(theta) for g in subsets]
    assert sum(v for v, _ in found) / 3 == pytest.approx(value, rel=1e-14)
    assert torch.allclose(sum(g for _, g in found) / 3, gradient, atol=1e-15)
    assert (f.tally.gradients, f.tally.work) == (4, pytest.approx(2.0))


def test_layers_are_blocks_of_a_decomposition():
    f = function()
    assert f.layers == [16, 25, 12] and sum(f.layers) == f.size
    parts = Decomposition.blocks(f.layers, 3)
    theta = f.parameters()
    local = f.local(parts, 1, theta)
    _, gradient = local.value_and_gradient(torch.zeros(25, dtype=torch.float64))
    assert torch.equal(gradient, f.value_and_gradient(theta)[1][16:41])


def test_single_precision_inside_double_outside():
    f, single = function(), function(precision=torch.float32)
    theta = f.parameters()
    value, gradient = single.value_and_gradient(theta)
    assert gradient.dtype == torch.float64 and single.x.dtype == torch.float32
    assert value == pytest.approx(f.value(theta), rel=1e-6)
    assert not torch.equal(gradient, f.value_and_gradient(theta)[1])


def test_parameters_go_into_the_network_and_predict_does_not_need_them():
    f = function()
    theta = torch.linspace(-1, 1, f.size, dtype=torch.float64)
    outputs = f.predict(theta, f.x)
    assert not torch.equal(f.parameters(), theta)
    f.assign(theta)
    assert torch.equal(f.parameters(), theta) and torch.allclose(f.network(f.x), outputs, atol=1e-15)


def test_bad_samples_are_named():
    x, y = torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match="3 and 2"):
        NetworkLoss(nn.Linear(2, 2), nn.functional.cross_entropy, x, y)
    with pytest.raises(InputError, match="without parameters"):
        NetworkLoss(nn.Tanh(), nn.functional.cross_entropy, x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="at least one"):
        function().subset(torch.arange(0))


@pytest.mark.parametrize("sequential", [True, False])
def test_a_part_of_the_layers_costs_less_and_gives_the_same(sequential):
    f = function(tikhonov=0.1)
    if not sequential:
        f.network = nn.ModuleList([f.network])
        f.network.forward = f.network[0].forward
        f = NetworkLoss(f.network, f.loss, f.x, f.y, tikhonov=0.1)
    theta, parts = f.parameters(), f.decompose(3)
    for part, indices in enumerate(parts.parts):
        local, plain = f.local(parts, part, theta), Restriction(f, indices, theta)
        d = torch.linspace(-1, 1, len(indices), dtype=torch.float64)
        value, gradient = local.value_and_gradient(d)
        assert value == pytest.approx(plain.value(d), rel=1e-14) == local.value(d)
        assert torch.allclose(gradient, plain.value_and_gradient(d)[1], rtol=1e-12, atol=1e-15)
        assert torch.allclose(local.hvp(d, d), plain.hvp(d, d), rtol=1e-12, atol=1e-14)
        assert (local.costs.gradient < 1) == (sequential and part < 3) or part == 0
    assert local.costs.gradient < 0.5 or not sequential
    if sequential:  # features are kept for the same weights only
        before = f.tally.work
        f.local(parts, 2, theta)
        assert f.tally.work == before
        other, d = theta + 0.1, torch.zeros(12, dtype=torch.float64)
        assert f.local(parts, 2, other).value(d) == pytest.approx(f.value(other), rel=1e-14)


def test_a_layer_that_is_used_twice_and_layers_in_parallel_have_their_gradients():
    torch.manual_seed(0)
    x, y = torch.randn(9, 4), torch.randn(9, 4)
    twice = nn.Linear(4, 4)
    parallel = LayerParallel(None, lambda: dense(4), 24, 2.0, coarsening="8")
    for network in (nn.Sequential(twice, nn.Tanh(), twice), nn.Sequential(nn.Linear(4, 4), parallel)):
        own = list(network.parameters())
        f = NetworkLoss(network, nn.functional.mse_loss, x, y)
        theta, h = f.parameters(), 1e-6
        value, gradient = f.value_and_gradient(theta)
        assert value == f.value(theta)
        difference = (f.value(theta + h * gradient) - f.value(theta - h * gradient)) / (2 * h)
        assert difference == pytest.approx(float(gradient @ gradient), rel=1e-6)
        assert all(a is b for a, b in zip(own, network.parameters(), strict=True))  # the network's own are as they were


def test_dropout_in_training_mode_is_no_function():
    network, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.ones(3, 4)
    with pytest.raises(InputError, match="Dropout in training mode"):
        NetworkLoss(network, nn.functional.mse_loss, x, x)
    f = NetworkLoss(network.eval(), nn.functional.mse_loss, x, x)
    assert f.value(f.parameters()) == f.value(f.parameters())
