"""Long steps that earlier batches have taught: exact for affine intervals, and transposed in the adjoint."""

import copy
import pickle

import pytest
import torch
from torch import nn

import nn_adapters as nna
from nn_adapters.layers import EncoderBlock, conv, dense
from nn_adapters.layers.given import layer_step
from nn_adapters.layers.parts.intervalfit import FADE, FittedSteps, IntervalFit, feature_axis
from pdeopt.core import InputError


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(block, layers=16, **words):
    torch.manual_seed(1)
    words = {"coarsening": "4", "long_steps": "fitted", "serial": "never", "fused": "never"} | words
    net = nna.LayerParallel(None, block, layers, 4.0, **words).double()
    with torch.no_grad():
        for stack in net.stacks:
            stack.mul_(0.5)
    return net


def errors(net, x, batches=3):
    """Of the gradient, before each of some batches."""
    found = []
    for _ in range(batches):
        found.append(nna.measure_bias(net, lambda: net(x).square().mean()))
        net(x).square().mean().backward()
    return found


@pytest.mark.parametrize(
    "block, shape",
    [(lambda: nn.Linear(4, 4), (50, 4)), (lambda: nn.Conv2d(3, 3, 1), (5, 3, 4, 4))],
    ids=["last axis", "channels"],
)
def test_affine_intervals_are_learned_from_one_batch(block, shape):
    untaught, taught, again = errors(network(block, cycles=0), randn(*shape))
    assert untaught > 0.1 and taught < 1e-3 and again <= taught


@pytest.mark.parametrize(
    "block, shape",
    [(lambda: dense(4), (50, 4)), (lambda: EncoderBlock(8, 2, 16), (10, 6, 8)), (lambda: conv(3), (5, 3, 8, 8))],
    ids=["dense", "encoder", "conv"],
)
def test_rough_layers_are_better_off_than_with_two_stages(block, shape):
    """Weights that are independent from layer to layer, 1/1 cycles."""
    words = {"cycles": 1, "adjoint_cycles": 1}
    *_, fitted = errors(network(block, **words), randn(*shape))
    *_, staged = errors(network(block, long_steps="stages", **words), randn(*shape))
    assert fitted < 0.3 * staged


def test_as_many_cycles_as_intervals_are_exact_whatever_was_learned():
    net = network(lambda: dense(4), 15, cycles=3, adjoint_cycles=3)  # the last interval has three layers
    assert max(errors(net, randn(20, 4))) < 1e-13


@pytest.mark.parametrize(
    "block, shape", [(dense(4), (2, 4, 5)), (EncoderBlock(4, 2, 8), (2, 3, 5, 4)), (conv(3), (2, 2, 3, 4, 4))]
)
def test_the_adjoint_step_is_the_transpose(block, shape):
    torch.manual_seed(0)
    step = layer_step(block.double())
    theta = [p.detach().expand(2, *p.shape).clone() for p in block.parameters()]
    u, w = randn(*shape), randn(*shape, seed=1)
    fit = IntervalFit().learned((randn(*shape, seed=2), randn(*shape, seed=3), randn(*shape, seed=4)), step.axis)
    steps = FittedSteps(step.linearize(theta, (), lambda rows: 0.5), fit, step.axis)
    leaf = u.clone().requires_grad_()
    v = step(leaf, theta, (), 0.5)
    expected = torch.autograd.grad(fit.add(v, leaf, slice(None), step.axis), leaf, w)[0]
    steps.states = u
    for rows in (slice(None), slice(1, 2)):
        assert torch.allclose(steps.pullback(w[rows], rows), expected[rows], rtol=0, atol=1e-12)


def test_the_map_is_that_of_least_squares_and_earlier_batches_fade():
    batches = [tuple(randn(1, 40, 3, seed=10 * k + j) for j in range(3)) for k in range(2)]
    fit = IntervalFit().learned(batches[0], -1).learned(batches[1], -1)
    rows, targets = [], []
    for weight, (u, v, e) in zip((FADE**0.5, 1.0), batches):
        rows.append(weight * torch.cat([torch.ones(40, 1).double(), u[0], v[0] - u[0]], 1))
        targets.append(weight * (e - v)[0])
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution
    assert torch.allclose(fit.maps[0], expected, rtol=0, atol=1e-3)


def test_what_is_not_known_is_the_first_layer_alone():
    """Samples that say nothing, zeros, teach nothing."""
    zeros = torch.zeros(1, 5, 3)
    fit, u, v = IntervalFit().learned((zeros, zeros, zeros), -1), torch.randn(1, 5, 3), torch.randn(1, 5, 3)
    assert torch.allclose(fit.add(v, u, slice(None), -1), v)


def test_measuring_learns_nothing_and_copies_learn_for_themselves():
    net, x = network(lambda: dense(4)), randn(20, 4)
    net(x).sum().backward()
    solver, fit = net.solvers[0], net.solvers[0].fit
    nna.measure_bias(net, lambda: net(x).sum())
    assert solver.fit is fit
    twin = copy.deepcopy(net)
    twin(2 * x).sum().backward()
    assert solver.fit is fit and not torch.equal(twin.solvers[0].fit.squares, fit.squares)


def test_without_gradients_nothing_is_learned():
    net = network(lambda: dense(4))
    with nna.approximately(net), torch.no_grad():
        net(randn(20, 4))
    assert net.solvers[0].fit.squares is None


def test_samples_of_tests_teach_nothing():
    net, x = network(lambda: dense(4)), randn(20, 4)
    net(x).sum().backward()
    fit = net.solvers[0].fit
    with nna.approximately(net):
        net.eval()(x).sum().backward()
    assert net.solvers[0].fit is fit


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_batch_that_is_not_finite_teaches_nothing(bad):
    net, x = network(lambda: nn.Linear(4, 4)), randn(20, 4)
    net(x).sum().backward()
    before = net.solvers[0].fit
    net(torch.full_like(x, bad)).sum().backward()
    after = net.solvers[0].fit
    assert torch.equal(after.squares, before.squares) and torch.equal(after.targets, before.targets)


def test_an_interval_that_overflows_does_not_spoil_what_others_learn():
    good = tuple(randn(2, 30, 3, seed=j) for j in range(3))
    bad = tuple(torch.stack([state[0], torch.full_like(state[1], torch.inf)]) for state in good)
    fit, first = IntervalFit().learned(good, -1), IntervalFit().learned(bad, -1)
    assert (
        first.squares.isfinite().all() and (first.maps[1] == 0).all() and torch.equal(first.squares[0], fit.squares[0])
    )
    both = fit.learned(bad, -1)
    assert torch.equal(both.squares[1], fit.squares[1]) and torch.allclose(
        both.squares[0], (1 + FADE) * fit.squares[0], rtol=1e-14
    )


@pytest.mark.filterwarnings("ignore:the forward cycles over 16 layers diverged")
def test_where_cycles_diverge_the_exact_repetition_teaches():
    """What it teaches is what solved cycles would."""
    nets = [network(lambda: nn.Linear(4, 4), 16, cycles=cycles, adjoint_cycles=4) for cycles in (0, 4)]
    for net in nets:
        with torch.no_grad():
            for stack in net.stacks:
                stack.mul_(3)
        net(randn(20, 4)).sum().backward()
    assert [net.solvers[0].repeats for net in nets] == [1, 0]
    (found, expected) = (net.solvers[0].fit for net in nets)
    scale = expected.squares.abs().amax((1, 2), keepdim=True)
    assert ((found.squares - expected.squares).abs() <= 1e-10 * scale).all()


def test_a_second_backward_pass_does_not_teach_again():
    net = network(lambda: dense(4))
    loss = net(randn(20, 4)).sum()
    fit = net.solvers[0].fit
    loss.backward(retain_graph=True)
    loss.backward()
    assert net.solvers[0].fit is fit and fit.squares is not None


def test_pickles_keep_what_was_learned_and_state_dicts_have_none_of_it():
    net, x = network(lambda: dense(4)), randn(20, 4)
    keys = list(net.state_dict())
    net(x).sum().backward()
    twin = pickle.loads(pickle.dumps(net))
    assert torch.equal(twin.solvers[0].fit.squares, net.solvers[0].fit.squares) and list(net.state_dict()) == keys
    assert torch.equal(twin(x), net(x))


def test_frozen_layers_serve_and_learn_where_gradients_go_through_them():
    net, x = network(lambda: dense(4)).requires_grad_(False), randn(20, 4)
    net(x)
    assert net.solvers[0].fit.squares is None
    net(x.requires_grad_()).sum().backward()
    assert net.solvers[0].fit.squares is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("layers", [17, 18])
def test_the_last_interval_may_be_its_first_layer_alone(layers):
    net = network(lambda: dense(4), layers)
    found = errors(net, randn(20, 4))
    assert (net.solvers[0].fit.maps[-1] == 0).all() == (layers == 17) and found[-1] < 0.1 * found[0]


def test_batches_of_other_sizes_and_sequences_of_other_lengths():
    net = network(lambda: EncoderBlock(8, 2, 16), cycles=1, adjoint_cycles=1)
    before = nna.measure_bias(net, lambda: net(randn(3, 5, 8)).square().mean())
    for shape in ((10, 6, 8), (1, 9, 8)):
        net(randn(*shape)).square().mean().backward()
    assert nna.measure_bias(net, lambda: net(randn(3, 5, 8)).square().mean()) < 0.3 * before


def test_complex_features():
    net = network(lambda: nn.Linear(4, 4, dtype=torch.complex128))
    x = torch.complex(randn(50, 4), randn(50, 4, seed=1))
    found = []
    for _ in range(2):
        found.append(nna.measure_bias(net, lambda: net(x).abs().square().mean()))
        net(x).abs().square().mean().backward()
    assert found[0] > 0.1 and found[1] < 1e-2


@pytest.mark.parametrize("is_cast", [True, False], ids=["autocast", "own type"])
def test_half_precision(is_cast):
    net = network(lambda: EncoderBlock(8, 2, 16), cycles=1, adjoint_cycles=1)
    net, x = net.to(torch.float32 if is_cast else torch.bfloat16), randn(10, 6, 8)
    x = x.to(net.stacks[0].dtype)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            value = net(x)
        value.float().square().mean().backward()
    expected = net.double().serial()(x.double())
    fit = net.solvers[0].fit
    assert fit.squares.dtype == torch.float64 and fit.maps.isfinite().all()
    assert (value - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("cycles", [1, 4])
def test_layers_of_unlike_kinds(cycles):
    """Solved cycles give the gradient of the serial network; one cycle is better taught than by two stages."""

    def trained(long_steps):
        torch.manual_seed(1)
        words = {"coarsening": "4", "serial": "never", "cycles": cycles, "adjoint_cycles": cycles}
        blocks = [lambda: dense(4), lambda: EncoderBlock(4, 2, 8)] * 8
        return nna.LayerList(None, blocks, 4.0, long_steps=long_steps, **words).double()

    staged, fitted = (errors(trained(long_steps), randn(10, 6, 4))[-1] for long_steps in ("stages", "fitted"))
    assert fitted < (1e-12 if cycles == 4 else 0.3 * staged)


def test_sequences_of_gated_units_are_refused():
    with pytest.raises(InputError, match="fitted for GRUs"):
        nna.GRUParallel(None, 3, 4, 24, levels=2, long_steps="fitted")


def test_features_are_channels_for_convolutions():
    assert [feature_axis(block) for block in (conv(2), conv(2, dim=1), dense(2), nn.LayerNorm(2))] == [-3, -2, -1, -1]


def test_several_coarse_levels_are_refused():
    with pytest.raises(InputError, match="fitted with 3 levels"):
        network(lambda: dense(4), levels=3, coarsening="2")
