"""Layer-parallel networks against PyTorch's own."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from nn_adapters.layers.batching import NOTHING_GIVEN, batched
from nn_adapters.layers.blocks import ACTIVATIONS, Direct, LayerStack, conv, dense, weight_norm
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import exactly, measure_bias
from nn_adapters.training.nested import deepen, refine_weights
from nn_adapters.training.regularize import smoothness, tikhonov
from pdeopt.core.errors import InputError

BLOCKS = {
    "dense": (lambda: dense(4), (6, 4)),
    "relu": (lambda: dense(4, "relu"), (6, 4)),
    "sigmoid": (lambda: dense(4, "sigmoid"), (6, 4)),
    "by autograd": (lambda: dense(4, "gelu"), (6, 4)),
    "more axes": (lambda: dense(4), (2, 3, 4)),
    "more axes, by autograd": (lambda: dense(4, "smooth_relu"), (2, 3, 4)),
    "no bias": (lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh()), (6, 4)),
    "convolution": (lambda: conv(2), (3, 2, 5, 5)),
    "signal": (lambda: conv(2, dim=1), (3, 2, 7)),
    "two layers": (lambda: nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)), (6, 4)),
    "normalized weights": (lambda: weight_norm(dense(4)), (6, 4)),
    "by vmap": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh()), (6, 4)),
    "feedforward": (lambda: Direct(dense(4)), (6, 4)),
}


def data(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def networks(block, layers=24, Tf=2.0, **words):
    """A layer-parallel network and the same one in series."""
    torch.manual_seed(0)
    network = LayerParallel(None, block, layers, Tf, **{"serial": "never", **words}).double()
    return network, network.serial()


def gradients(network, x):
    x = x.clone().requires_grad_()
    value = (network(x) * data(x.shape, 5)).sum()
    return torch.autograd.grad(value, [x, *network.parameters()])


def in_series(network, found):
    """Gradients of a `LayerStack` as those of the layer-parallel network."""
    count = len(network.names)
    return [found[0], *(torch.stack(found[1 + at :: count]) for at in range(count))]


@pytest.mark.parametrize("name", BLOCKS)
def test_converged_values_and_gradients_are_those_of_autograd(name):
    block, shape = BLOCKS[name]
    network, serial = networks(block, 21, coarsening="4", levels=3, cycles=12, adjoint_cycles=12)
    x = data(shape)
    assert torch.allclose(network(x), serial(x), rtol=0, atol=1e-12)
    for found, expected in zip(gradients(network, x), in_series(network, gradients(serial, x))):
        assert torch.allclose(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "layers, coarsening, levels",
    [(1, "4", 2), (2, "2", 2), (16, "4", 2), (17, "4", 2), (30, "3", 4), (33, "4,2", 3), (64, "64", 2)],
)
def test_depths_factors_and_levels_that_divide_or_do_not(layers, coarsening, levels):
    network, serial = networks(
        lambda: dense(3), layers, coarsening=coarsening, levels=levels, cycles=34, adjoint_cycles=34
    )
    x = data((2, 3))
    for found, expected in zip(gradients(network, x), in_series(network, gradients(serial, x))):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["dense", "by autograd"])
def test_intervals_that_go_through_in_parts_change_nothing(name):
    block, shape = BLOCKS[name]
    x, found = data((40, *shape[1:])), []
    for cache in (1, 1024):
        network, _ = networks(block, 45, coarsening="4,2", levels=3, cache=cache)
        found.append([network(x), *gradients(network, x)])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(*found))


def test_one_level_is_one_layer_after_the_other():
    network, serial = networks(lambda: dense(4), levels=1)
    x = data((6, 4))
    assert torch.allclose(network(x), serial(x), rtol=0, atol=1e-14)


def test_few_cycles_converge_to_the_gradient_as_more_are_made():
    errors = []
    for cycles in (1, 2, 3, 4):
        network, _ = networks(lambda: dense(4), 64, coarsening="8", cycles=cycles, adjoint_cycles=cycles)
        network.scale(0.1)
        errors.append(measure_bias(network, lambda net=network: (net(data((6, 4))) ** 2).sum()))
    assert all(after < 0.5 * before for before, after in pairwise(errors)) and errors[-1] < 1e-5


def test_measuring_the_bias_leaves_gradients_and_solver_alone():
    network, _ = networks(lambda: dense(4), coarsening="4", rtol=1e-30)
    x = data((6, 4))
    (network(x) ** 2).sum().backward()
    before = [p.grad.clone() for p in network.parameters()]
    assert measure_bias(network, lambda: (network(x) ** 2).sum()) > 0
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), before))
    network(x)
    assert len(network.residuals[0]) == 1  # solved by MGRIT again


def test_inside_exactly_nothing_is_approximated():
    network, serial = networks(lambda: dense(4), coarsening="8")
    x = data((6, 4))
    assert not torch.allclose(network(x), serial(x), rtol=0, atol=1e-12)
    with exactly(network):
        assert torch.allclose(network(x), serial(x), rtol=0, atol=1e-14)


def test_a_backward_pass_may_come_after_another_forward_pass():
    network, serial = networks(lambda: dense(4), coarsening="4", cycles=8, adjoint_cycles=8)
    x, y = data((6, 4)), data((3, 4), 2)
    first, second = network(x), network(y)
    (first.sum() + 2 * second.sum()).backward()
    (serial(x).sum() + 2 * serial(y).sum()).backward()
    expected = [p.grad for p in serial.parameters()]
    for found, whole in zip(network.stacks, [torch.stack(expected[at::2]) for at in range(2)]):
        assert torch.allclose(found.grad, whole, atol=1e-12)


def test_a_second_backward_pass_needs_retain_graph_as_in_pytorch():
    network, _ = networks(lambda: dense(4))
    loss = network(data((6, 4))).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in network.parameters()]
    loss.backward()
    assert all(torch.allclose(p.grad, 2 * g, atol=1e-13) for p, g in zip(network.parameters(), once))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_and_a_single_sample(dtype):
    network, serial = networks(lambda: dense(4))
    network, serial = network.to(dtype), serial.to(dtype)
    assert network(data((0, 4), dtype=dtype)).shape == (0, 4)
    with exactly(network):
        assert torch.allclose(network(data((1, 4), dtype=dtype)), serial(data((1, 4), dtype=dtype)), atol=1e-6)


def test_the_state_is_that_of_the_serial_network():
    network, serial = networks(lambda: dense(4))
    state = network.state_dict()
    assert list(state) == list(serial.state_dict())
    assert all(torch.equal(state[key], value) for key, value in serial.state_dict().items())
    torch.manual_seed(9)
    other = LayerStack(lambda: dense(4), 24, 2.0).double()
    network.load_state_dict(other.state_dict())
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in other.state_dict().items())
    inside = nn.Sequential(nn.Linear(4, 4), network)
    assert "1.layers.23.0.weight" in inside.state_dict()
    inside.load_state_dict(inside.state_dict())


def test_states_that_do_not_fit_are_named():
    network, _ = networks(lambda: dense(4))
    state = network.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing.*layers\.3\.0\.weight"):
        network.load_state_dict({key: value for key, value in state.items() if key != "layers.3.0.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected.*layers\.24\.0\.weight"):
        network.load_state_dict({**state, "layers.24.0.weight": state["layers.0.0.weight"]})
    with pytest.raises(RuntimeError, match="shape"):
        network.load_state_dict({**state, "layers.3.0.weight": torch.zeros(5, 5)})


def test_an_optimizer_of_pytorch_trains_it_as_it_trains_the_serial_network():
    network, serial = networks(lambda: dense(4), 16, coarsening="4", cycles=4, adjoint_cycles=4)
    x, y = data((20, 4)), data((20, 4), 3)
    losses = []
    for net in (network, serial):
        optimizer, curve = torch.optim.Adam(net.parameters(), lr=1e-2), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_the_trajectory_and_its_gradient():
    network, serial = networks(lambda: dense(4), 10, coarsening="4", cycles=4, adjoint_cycles=4)
    x, w = data((6, 4)).requires_grad_(), data((10, 6, 4), 7)
    states, u = [], x
    for layer in serial.layers:
        u = u + serial.dt * layer(u)
        states.append(u)
    found = network.trajectory(x)
    assert torch.allclose(found, torch.stack(states), atol=1e-13)
    own = torch.autograd.grad((found * w).sum(), [x, *network.parameters()])
    expected = torch.autograd.grad((torch.stack(states) * w).sum(), [x, *serial.parameters()])
    for a, b in zip(own, in_series(network, list(expected))):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    "block, words",
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU()), "RReLU"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.FeatureAlphaDropout(0.1)), "FeatureAlphaDropout"),
    ],
)
def test_blocks_that_are_no_function_are_refused(block, words):
    with pytest.raises(InputError, match=words):
        LayerParallel(None, block, 8)


def test_settings_and_keywords_exclude_each_other():
    network, _ = networks(lambda: dense(2), 4)
    with pytest.raises(InputError, match="one of the two"):
        LayerParallel(None, lambda: dense(2), 4, 1.0, network.settings, levels=2)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("more axes", "feedforward")])
def test_batched_modules_are_the_modules(name):
    block, shape = BLOCKS[name]
    torch.manual_seed(1)
    modules = [block().double() for _ in range(3)]
    u = data((3, *shape))
    theta = [torch.stack(rows) for rows in zip(*(list(module.parameters()) for module in modules))]
    expected = torch.stack([module(rows) for module, rows in zip(modules, u)])
    assert torch.allclose(batched(modules[0])(u, theta, NOTHING_GIVEN), expected, atol=1e-13)


def test_an_unknown_activation_is_refused():
    with pytest.raises(InputError, match="smooth_relu"):
        dense(3, "relux")


def test_the_smooth_relu_has_a_continuous_derivative():
    act = ACTIVATIONS["smooth_relu"]()
    x = torch.linspace(-0.3, 0.3, 60001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(act(x).sum(), x)
    assert float((slope[1:] - slope[:-1]).abs().max()) < 1e-4 and slope.min() >= 0 and slope.max() <= 1


def test_regularization_and_its_gradient():
    network, _ = networks(lambda: dense(3), 6, 1.5)
    stacks = [stack.detach() for stack in network.stacks]
    dt = 1.5 / 6
    assert float(tikhonov(network).detach()) == pytest.approx(0.5 * sum(float((s**2).sum()) for s in stacks))
    expected = 0.5 * sum(float(((s[1:] - s[:-1]) ** 2).sum()) for s in stacks) / dt**2
    assert float(smoothness(network).detach()) == pytest.approx(expected)
    W = network.stacks[0]
    (gradient,) = torch.autograd.grad(smoothness(network), W)
    by_hand = torch.zeros_like(stacks[0])
    by_hand[1:] += (stacks[0][1:] - stacks[0][:-1]) / dt**2
    by_hand[:-1] -= (stacks[0][1:] - stacks[0][:-1]) / dt**2
    assert torch.allclose(gradient, by_hand)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_interpolated_weights(factor):
    coarse = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)[:, None]
    assert torch.equal(refine_weights(coarse, factor)[::factor], coarse)
    linear = refine_weights(coarse, factor, "linear")
    assert linear.shape == (5 * factor, 1)
    inside = slice(factor // 2, len(linear) - factor // 2)  # beyond the outer middles they are constant
    steps = (linear[1:] - linear[:-1])[inside][: -factor or None]
    assert torch.allclose(steps, steps[:1].expand_as(steps))
    with pytest.raises(InputError, match="constant"):
        refine_weights(coarse, 2, "cubic")


def test_a_deeper_network_of_constant_weights_solves_the_same_equation_better():
    torch.manual_seed(0)
    shallow, deep, deepest = (LayerParallel(None, lambda: dense(4), n, 2.0, levels=1).double() for n in (8, 16, 32))
    deepen(shallow, deep)
    deepen(deep, deepest)
    x = data((6, 4))
    outputs = [net(x).detach() for net in (shallow, deep, deepest)]
    first, second = (float((a - b).norm()) for a, b in pairwise(outputs))
    assert second == pytest.approx(first / 2, rel=0.2)  # Euler's method is of first order
    with pytest.raises(InputError, match="a multiple of 16"):
        deepen(deep, LayerParallel(None, lambda: dense(4), 24, 2.0))
