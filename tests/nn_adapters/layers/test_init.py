"""Box keeps its boxes; He and Glorot have their variances; no layer is passed over in silence."""

import itertools
import math

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import Direct, LayerStack, conv, dense
from nn_adapters.layers.init import box_linear, box_neurons, box_stack, box_weights, initialize
from pdeopt.core.errors import InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def corners(side, dim):
    """All corners of [0, side]^dim, (2^dim, dim)."""
    return side * torch.tensor(list(itertools.product((0.0, 1.0), repeat=dim)), dtype=torch.float64)


def samples(side, dim, count=500):
    """Points of [0, side]^dim, its corners among them."""
    inside = side * torch.rand(count, dim, generator=seeded(9), dtype=torch.float64)
    return torch.cat([corners(side, dim), inside])


# -- the theorem ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, width, dt", [(1, 1, 1.0), (3, 4, 1.0), (50, 6, 0.02), (128, 2, 1.0)])
def test_the_largest_value_of_each_neuron_is_the_boxs_share(layers, width, dt):
    """A linear function is largest in a corner."""
    W, b = box_weights(layers, width, seeded(), dt=dt)
    assert W.shape == (layers, width, width) and b.shape == (layers, width)
    for index in range(layers):
        m = (1 + 1 / layers) ** index
        largest = dt * (corners(m, width) @ W[index].T + b[index]).amax(0)
        torch.testing.assert_close(largest, torch.full_like(largest, m / layers), rtol=1e-10, atol=0)
        assert m <= math.e


def test_every_neuron_is_cut_inside_the_box():
    W, b = box_weights(20, 5, seeded())
    for index in range(20):
        values = corners(1.05**index, 5) @ W[index].T + b[index]
        assert (values.amin(0) < 0).all() and (values.amax(0) > 0).all()


@pytest.mark.parametrize("depth, width, Tf", [(1, 3, 1.0), (8, 5, 1.0), (64, 4, 64.0), (128, 2, 0.5)])
def test_the_image_stays_in_the_box_of_each_layer(depth, width, Tf):
    stack = LayerStack(lambda: dense(width, "relu"), depth, Tf).double()
    box_stack(stack, seeded(1))
    u = samples(1.0, width)
    for index, block in enumerate(stack.layers):
        u = u + stack.dt * block(u)
        assert u.min() >= 0 and u.max() <= (1 + 1 / depth) ** (index + 1) * (1 + 1e-12)
    assert torch.equal(u, stack(samples(1.0, width))) and u.max() <= math.e


@pytest.mark.parametrize("inputs", [1, 3, 10])
def test_a_first_layer_maps_the_unit_cube_onto_the_unit_interval(inputs):
    layer = nn.Linear(inputs, 7).double()
    box_linear(layer, seeded(2))
    values = layer(corners(1.0, inputs)).detach()
    torch.testing.assert_close(values.amax(0), torch.ones(7, dtype=torch.float64), rtol=1e-10, atol=0)
    assert (values.amin(0) < 0).all()


def test_a_feedforward_stack_keeps_the_unit_cube():
    stack = LayerStack(lambda: Direct(dense(4, "relu")), 12).double()
    box_stack(stack, seeded(3))
    u = samples(1.0, 4)
    for block in stack.layers:
        u = block.step(u, stack.dt)
        assert u.min() >= 0 and u.max() <= 1 + 1e-12


def test_points_are_uniform_and_directions_have_no_preference():
    """In one dimension the cut is p = -b / w, and w as often positive as negative."""
    one = torch.ones(1, dtype=torch.float64)
    W, b = box_neurons(one, one, 20000, 1, seeded(4))
    cuts = (-b / W[..., 0])[0].sort().values
    uniform = torch.linspace(0, 1, 20000, dtype=torch.float64)
    assert (cuts - uniform).abs().max() < 0.02  # Kolmogorov-Smirnov: 0.014 at 1e-3
    assert abs(float((W > 0).double().mean()) - 0.5) < 0.02


# -- a whole network -----------------------------------------------------------------------------------------


def network():
    stack = LayerStack(lambda: dense(6, "relu"), 5, Tf=5.0)
    return nn.Sequential(nn.Linear(2, 6), nn.ReLU(), stack, nn.Linear(6, 3)).double()


def test_box_knows_first_layer_stack_and_head():
    net = network()
    initialize(net, "box", seeded(5))
    first, _, stack, head = net
    u = first(samples(1.0, 2)).relu()
    assert u.min() >= 0 and u.max() <= 1 + 1e-12 and stack(u).max() <= math.e
    assert not head.bias.any() and head.weight.abs().max() <= math.sqrt(6 / 9)


@pytest.mark.parametrize("kind", ["he", "glorot", "box"])
def test_a_seed_gives_the_same_weights_and_another_seed_others(kind):
    nets = [network() for _ in range(3)]
    for net, seed in zip(nets, (7, 7, 8)):
        initialize(net, kind, seeded(seed))
    one, same, other = ([p for p in net.parameters() if p.dim() == 2] for net in nets)
    assert all(torch.equal(p, q) for p, q in zip(one, same))
    assert not any(torch.equal(p, q) for p, q in zip(one, other))


@pytest.mark.parametrize("kind, variance", [("he", 2 / 300), ("glorot", 2 / 400)])
def test_variances(kind, variance):
    layer = nn.Linear(300, 100)
    initialize(layer, kind, seeded())
    assert float(layer.weight.detach().var()) == pytest.approx(variance, rel=0.05) and not layer.bias.any()


def test_convolutions_have_he_and_glorot_too():
    stack = LayerStack(lambda: conv(30), 1)
    initialize(stack, "he", seeded())
    assert float(stack.layers[0][0].weight.detach().var()) == pytest.approx(2 / 270, rel=0.1)
    with pytest.raises(InputError, match="one linear layer"):
        initialize(stack, "box")


def test_weights_need_no_gradient_history():
    net = network()
    initialize(net, "box")
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "bad, legal",
    [
        (lambda: initialize(network(), "xavier"), r"he \| glorot \| box"),
        (lambda: initialize(nn.GRUCell(3, 3), "he"), "linear layers and convolutions"),
        (lambda: initialize(nn.Conv1d(3, 3, 3), "box"), "stacks of dense blocks"),
        (lambda: initialize(nn.Linear(2, 2, bias=False), "box"), "with a bias"),
        (lambda: box_stack(LayerStack(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 2)), "one linear layer"),
        (lambda: box_weights(0, 2), "layers, width >= 1"),
        (lambda: box_weights(2, 2, dt=0.0), "dt > 0"),
    ],
)
def test_what_is_not_legal_is_named(bad, legal):
    with pytest.raises(InputError, match=legal):
        bad()
