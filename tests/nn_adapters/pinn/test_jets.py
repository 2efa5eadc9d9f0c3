"""Jets through networks, against nested differentiation by torch."""

import pytest
import torch
from torch.func import grad, vmap

from nn_adapters.pinn.activations import ACTIVATION_NAMES, writing
from nn_adapters.pinn.jets import JetBasis
from nn_adapters.pinn.network import JetSweep, Network, absorb_slopes
from pdeopt.core.errors import InputError
from tests.helpers.networks import network_by_formula
from tests.helpers.support import relative

ALL = {
    1: ("x", "xx", "xxxx"),
    2: ("x", "t", "xx", "xt", "tt", "xxt"),
    3: ("x", "y", "t", "xy", "xt", "yt", "xx", "yy", "tt"),
}
NAMES = {1: "x", 2: "xt", 3: "xyt"}


def points(n, inputs, seed=0):
    return torch.randn(n, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(network, seed=1):
    generator = torch.Generator().manual_seed(seed)
    theta = network.initial(seed)
    return theta + 0.2 * torch.randn(len(theta), generator=generator, dtype=torch.float64)


def test_first_derivatives_under_a_second_one_come_along():
    basis = JetBasis("xt", ("xx", "tx"))
    assert basis.first == (0, 1) and basis.keys == ((), (0,), (1,), (0, 0), (0, 1)) and len(basis) == 5
    assert basis.rows == {"": 0, "xx": 3, "tx": 4}
    assert len(JetBasis("xt")) == 1 and JetBasis("xt", ("xtx",)).keys[1:] == ((0,), (1,), (0, 0), (0, 1), (0, 0, 1))


@pytest.mark.parametrize("name", ["z", "xxxxx", "xz", ""])
def test_unknown_derivatives_are_named(name):
    with pytest.raises(InputError, match=r"legal: x \| t \| xx \| xt \| tt"):
        JetBasis("xt", (name,))


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activations_have_their_derivatives(name):
    plain = {"tanh": torch.tanh, "sin": torch.sin}.get(name) or getattr(torch.nn.functional, name)
    z = torch.linspace(-3, 3, 60, dtype=torch.float64)  # without 0, where torch's gelu has no fourth derivative
    found = torch.empty(6, 60, dtype=torch.float64)
    writing(name)(z, *found)
    expected = plain
    for row in found:
        assert relative(row, vmap(expected)(z)) < 1e-12
        expected = grad(expected)


@pytest.mark.parametrize("inputs", [1, 2, 3])
@pytest.mark.parametrize(
    "body, adaptive, activation, scale",
    [
        ("mlp", False, "tanh", 1.0),
        ("resnet", True, "tanh", 5.0),
        ("mlp", True, "sin", 2.0),
        ("mlp", True, torch.atan, 2.0),
    ],
)
def test_sweeps_agree_with_nested_differentiation(inputs, body, adaptive, activation, scale):
    """Jets, and the gradient of a functional of them, forwards from every layer and back to it."""
    network = Network(inputs, (5, 5, 5), body, activation, adaptive, scale)
    basis, x, theta = JetBasis(NAMES[inputs], ALL[inputs]), points(7, inputs), perturbed(network)
    w = points(len(basis), 7, seed=3)
    layers, sweep = absorb_slopes(network.layers(theta)), JetSweep(network, basis, 7)
    jets = sweep.forward(layers, basis.of_inputs(x)).clone()
    assert relative(jets[:, 0], basis.of_function(network_by_formula(network, theta), x)) < 1e-13
    assert relative(network.jets(theta, basis, basis.of_inputs(x)), jets) < 1e-13

    def functional(theta):
        return (w * basis.of_function(network_by_formula(network, theta), x)).sum()

    expected = network.layers(grad(functional)(theta))
    for first in range(len(layers)):
        for last in range(first, len(layers)):
            before = sweep.through(layers[:first], basis.of_inputs(x)).clone()
            part = absorb_slopes(network.layers(theta)[first:])
            assert relative(sweep.forward(part, before, first), jets) < 1e-14
            sums = [(torch.zeros_like(layer.W), torch.zeros_like(layer.b)) for layer in layers[first : last + 1]]
            sweep.backward(part[-1], w[:, None], sums, last)
            for layer, (W, b) in zip(range(first, last + 1), sums):
                slope = network.layers(theta)[layer].slope
                assert relative(slope * W, expected[layer].W) < 1e-12
                assert relative(slope * b, expected[layer].b) < 1e-12


def test_layers_of_several_widths():
    network, basis, x = Network(2, (3, 6, 4)), JetBasis("xt", ("x", "tt")), points(9, 2)
    theta = perturbed(network)
    found = JetSweep(network, basis, 9).forward(network.layers(theta), basis.of_inputs(x))
    assert relative(found[:, 0], basis.of_function(network_by_formula(network, theta), x)) < 1e-13


def test_the_product_rule():
    basis, x = JetBasis("xyt", (*ALL[3], "xxyt", "yyy")), points(6, 3)

    def f(x):
        return torch.sin(x[:, 0] * x[:, 1]) + x[:, 2] ** 2

    def g(x):
        return torch.exp(x[:, 0] - x[:, 2]) * x[:, 1]

    product = (basis.multiplication(basis.of_function(f, x)) * basis.of_function(g, x)).sum(1)
    assert relative(product, basis.of_function(lambda x: f(x) * g(x), x)) < 1e-13


def test_the_start_is_glorot_and_of_the_seed():
    network = Network(2, (50, 50), adaptive=True, slope_scale=4.0)
    layer = network.layers(network.initial(3))[1]
    assert float(layer.W.var()) == pytest.approx(2 / 100, rel=0.1) and layer.b.count_nonzero() == 0
    assert layer.slope == 1.0 and network.size == sum(network.sizes)
    assert torch.equal(network.initial(3), network.initial(3))
    assert not torch.equal(network.initial(3), network.initial(4))


@pytest.mark.parametrize(
    "words, message",
    [
        (dict(hidden=()), "layers"),
        (dict(hidden=(3, 0)), "widths"),
        (dict(hidden=(3, 4), body="resnet"), "one width"),
        (dict(hidden=(3,), body="unet"), r"mlp \| resnet"),
        (dict(hidden=(3,), activation="relu"), r"tanh \| sin"),
        (dict(hidden=(3,), activation=torch.relu), "order 1 jumps, near"),
        (dict(hidden=(3,), activation=torch.nn.functional.elu), "order 2 jumps, near"),
        (dict(hidden=(3,), activation=lambda z: z.softmax(0)), "entry by entry"),
        (dict(hidden=(3,), activation=lambda z: z.abs().sqrt()), "not finite|jumps"),
        (dict(hidden=(3,), slope_scale=0.0), "> 0"),
        (dict(inputs=0, hidden=(3,)), "inputs"),
        (dict(hidden=(3,), outputs=0), "fields"),
    ],
)
def test_networks_that_are_none(words, message):
    with pytest.raises(InputError, match=message):
        Network(**{"inputs": 2, **words})
