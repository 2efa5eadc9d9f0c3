"""Long steps in the place of intervals of layers: their order, their derivatives, their weights."""

import pytest
import torch
from mpi4py import MPI

from nn_adapters.layers.blocks import dense
from nn_adapters.layers.coarsening import ROUGH, coarse_controls, roughness, two_stages
from nn_adapters.layers.densestep import DenseStep
from nn_adapters.layers.given import layer_step
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import measure_bias
from nn_adapters.layers.parts.grugates import GRU_STEPS

generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layers_of(m, dt, value, u, theta):
    for _ in range(m):
        u = u + dt * value(u, theta)
    return u


@pytest.mark.parametrize("m", [2, 8])
def test_a_long_step_is_its_layers_to_second_order(m):
    value, u, theta = DenseStep(dense(4)).value, randn(1, 4, 6), (randn(1, 4, 4), randn(1, 4))
    errors = []
    for M in (0.1, 0.05):
        short = layers_of(m, M / m, value, u, theta)
        errors.append([float((two_stages(value, M / m, u, theta, M) - short).norm())])
        errors[-1].append(float((u + M * value(u, theta) - short).norm()))
    (fine, euler), (fine_half, euler_half) = errors
    assert 7 < fine / fine_half < 9 and 3.5 < euler / euler_half < 4.5
    assert torch.allclose(two_stages(value, 0.1, u, theta, 0.1), u + 0.1 * value(u, theta), rtol=0, atol=1e-15)


@pytest.mark.parametrize("act", ["tanh", "relu"])
@pytest.mark.parametrize("dt", [0.4, torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64)])
def test_the_derivative_by_hand_is_that_of_autograd(act, dt):
    u, w, theta = randn(3, 4, 5), randn(3, 4, 5), (randn(3, 4, 4), randn(3, 4))
    long = layer_step(dense(4, act)).over_intervals(0.1)
    steps = long.linearize(theta, (), lambda rows: dt if isinstance(dt, float) else dt[rows])
    steps.states, leaf = u, u.clone().requires_grad_()
    expected = torch.autograd.grad(long(leaf, theta, (), dt), leaf, w)[0]
    for rows in (slice(None), slice(0, None, 2)):
        assert torch.allclose(steps.pullback(w[rows], rows), expected[rows], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", GRU_STEPS)
def test_a_long_step_of_a_gru_is_its_steps_where_the_gates_are_held(kind):
    h, gates, step = randn(1, 3, 4), randn(1, 3, 12), GRU_STEPS[kind]
    shared = [torch.zeros(12, 4).double(), randn(12)]  # gates do not see h
    end = h
    for _ in range(7):
        end = step(end, [gates], shared, 1.0)
    assert torch.allclose(step(h, [gates], shared, 7.0), end, rtol=0, atol=1e-14)
    assert torch.allclose(step(h, [gates], shared, torch.tensor([7.0])), end, rtol=0, atol=1e-14)


def test_means_are_those_of_the_finest_rows_on_every_level():
    rows = randn(23, 2)
    levels = coarse_controls([rows], [4, 3], means=True)
    assert [len(level[0]) for level in levels] == [23, 6, 2]
    assert torch.allclose(levels[1][0][5], rows[20:].mean(0)) and torch.allclose(levels[2][0][1], rows[12:].mean(0))
    middles = coarse_controls([rows], [4, 3], means=False)
    assert torch.equal(middles[1][0], rows[[2, 6, 10, 14, 18, 22]])


def test_roughness_tells_noise_from_smooth_weights():
    noise, t = randn(512, 5, 5), torch.linspace(0, 1, 512).double()[:, None, None]
    smooth = torch.cos(3 * t) * randn(1, 5, 5)
    found = [roughness([smooth + share * noise], 16, MPI.COMM_SELF) for share in (0.0, 0.1, 10.0)]
    assert found[0] < 1e-3 < found[1] < ROUGH < 0.8 < found[2] < 1.3
    assert roughness([torch.zeros(8, 2)], 4, MPI.COMM_SELF) == 0.0


@pytest.mark.parametrize("noise, limit", [(0.1, 2e-3), (5.0, 0.25)])
def test_the_choice_of_weights_follows_their_roughness(noise, limit):
    """Noise of a tenth: means; of five times the weights: middles, where means would leave twice the error."""
    torch.manual_seed(0)
    network = LayerParallel(None, lambda: dense(4, "relu"), 256, 2.0, coarsening="16", adjoint_cycles=1).double()
    t = torch.linspace(0, 1, 256).double()
    with torch.no_grad():
        for stack in network.stacks:
            shape = stack.shape[1:]
            stack.copy_(torch.einsum("t,...->t...", torch.cos(3 * t), randn(*shape)) + noise * randn(*stack.shape))
            stack.mul_(0.5 / (1 + noise))
    x = randn(8, 4)
    error = measure_bias(network, lambda: network(x).square().sum())
    assert error < limit and (network.solvers[0].roughness < ROUGH) == (noise < 1)
