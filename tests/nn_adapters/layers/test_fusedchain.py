"""All layers of a dense network by one compiled loop."""

import copy

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parts import fusedchain
from nn_adapters.layers.parts.fusedchain import FusedChain, fused_kind, is_cheaper
from pdeopt.core.errors import InputError

pytest.importorskip("numba", reason="the loops are compiled by Numba: pip install 'pdeopt[fast]'")


def gradients(function, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(value)
    return value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)


def chain(width, layers, samples, dtype):
    torch.manual_seed(0)
    W, b = torch.randn(layers, width, width) / width**0.5, torch.randn(layers, width)
    return [tensor.to(dtype) for tensor in (torch.randn(width, samples), W, b)]


@pytest.mark.parametrize(
    "act, function, width, samples, dtype, tol",
    [
        ("relu", torch.relu, 11, 70, torch.float32, 2e-6),
        ("tanh", torch.tanh, 8, 70, torch.float64, 1e-13),
        pytest.param("silu", nn.functional.silu, 16, 3, torch.float32, 2e-6, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_the_layers_in_turn(act, function, width, samples, dtype, tol):
    def in_turn(u, W, b):
        for i in range(len(W)):
            u = u + 0.1 * function(W[i] @ u + b[i][:, None])
        return u

    tensors = chain(width, 30, samples, dtype)
    found = gradients(lambda *t: FusedChain.apply(act, 0.1, *t), *tensors)
    for a, b in zip(found, gradients(in_turn, *tensors)):
        assert float((a - b).norm() / b.norm()) < tol
    with torch.no_grad():
        assert torch.equal(FusedChain.apply(act, 0.1, *tensors), found[0])


@pytest.mark.slow
def test_extreme_features_saturate():
    u, W, b = torch.zeros(8, 4), torch.zeros(1, 8, 8), torch.tensor([[1e-6, -1e-6, 0.3, -9, 50, -500, 1e10, -1e10]])
    for act, function in (("tanh", torch.tanh), ("silu", nn.functional.silu)):
        found = FusedChain.apply(act, 1.0, u, W, b)[:, 0]
        torch.testing.assert_close(found, function(b[0]), rtol=3e-6, atol=1e-20)
    assert bool(FusedChain.apply("relu", 1.0, u, W, b * torch.nan).isnan().all())


@pytest.fixture
def network(monkeypatch):
    """A network of any size goes through the loops."""
    monkeypatch.setattr(fusedchain, "LEAST_WORK", 1)
    torch.manual_seed(0)
    return LayerParallel(None, lambda: dense(8, "relu"), 32, 2.0, cycles=0, adjoint_cycles=0)


def test_a_network_takes_them_where_they_are_cheaper(network):
    x = torch.randn(20, 3, 8)
    exact, found = network.serial()(x), network(x)
    assert network.solvers[0].misfits == (0.0, 0.0)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    copied = copy.deepcopy(network)
    torch.testing.assert_close(
        torch.autograd.grad(copied(x).sum(), copied.stacks), torch.autograd.grad(network(x).sum(), network.stacks)
    )
    never = LayerParallel(None, lambda: dense(8, "relu"), 32, 2.0, fused="never", cycles=0, adjoint_cycles=0)
    never.load_state_dict(network.state_dict())
    assert float((never(x) - exact).detach().abs().max()) > 1e-5  # the cycles
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(network(x).sum(), network.stacks, create_graph=True)
    with pytest.raises(InputError, match=r"transform of torch\.func"):
        torch.func.vmap(network)(x)


def test_which_chains_they_take(network, monkeypatch):
    x, stacks = torch.zeros(10, 8), network.stacks
    assert is_cheaper(x, stacks, (1, 1)) and is_cheaper(x, stacks, None)
    assert not is_cheaper(x.double(), stacks, (1, 1)) and not is_cheaper(x.to("meta"), stacks, (1, 1))
    wide = [torch.zeros(2, 64, 64), torch.zeros(2, 64)]
    assert is_cheaper(torch.zeros(10, 64), wide, (1, 1)) and not is_cheaper(torch.zeros(10, 64), wide, None)
    assert not is_cheaper(torch.zeros(10, 65), [torch.zeros(2, 65, 65), torch.zeros(2, 65)], (9, 9))
    monkeypatch.setattr(fusedchain, "has_compiler", lambda: False)
    assert not is_cheaper(x, stacks, (1, 1)) and network(x).shape == x.shape
    kinds = [fused_kind(dense(8, act)) for act in ("relu", "tanh", "silu", "gelu")]
    assert (
        kinds == ["relu", "tanh", "silu", None]
        and fused_kind(nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU())) is None
    )


@pytest.mark.parametrize(
    "act, words",
    [
        ("relu", {"coarsening": "8", "adjoint_cycles": 0}),
        ("tanh", {"coarsening": "4", "levels": 3, "relaxation": "FCF", "adjoint_cycles": 1}),
        ("relu", {"levels": 1}),
    ],
)
def test_cycles_with_the_loop_inside_of_intervals_are_those_without(act, words, monkeypatch):
    monkeypatch.setattr(fusedchain, "LEAST_WORK", 1)
    x, found = torch.randn(70, 11, dtype=torch.float64), []
    for fused in ("intervals", "never"):
        torch.manual_seed(0)
        each = LayerParallel(None, lambda: dense(11, act), 37, 2.0, fused=fused, serial="never", **words).double()
        served = []
        monkeypatch.setattr(fusedchain.FusedIntervals, "_forward", counted(fusedchain.FusedIntervals._forward, served))
        found.append(gradients(lambda u, net=each: net(u), x))
        found[-1] += torch.autograd.grad(each(x).square().sum(), each.stacks)
        assert bool(served) == (fused == "intervals")
        assert (each.solvers[0].misfits[0] > 1e-6) == (words.get("levels") != 1)
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-14


def counted(function, calls):
    def call(*args, **words):
        calls.append(1)
        return function(*args, **words)

    return call
