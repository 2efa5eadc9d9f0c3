"""Parallel layers captured as a CUDA graph, by a stand-in for tensors of the host, and on a GPU where there is one."""

import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import conv, dense
from nn_adapters.layers.layerlist import LayerList
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import exactly
from nn_adapters.layers.parts.attention import EncoderBlock
from nn_adapters.layers.recurrent import GRUParallel
from pdeopt.core.errors import InputError
from tests.helpers.graphs import HostGraph

WORDS = {"coarsening": "2", "adjoint_cycles": 1, "serial": "never", "fused": "never"}


def parallel(block, layers=5, **words):
    return LayerParallel(None, block, layers, 2.0, **{**WORDS, **words})


def noisy():
    return nn.Sequential(conv(2), nn.BatchNorm2d(2), nn.Dropout(0.2))


def unlike():
    blocks = [lambda: dense(4), lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Dropout(0.2))]
    return LayerList(None, blocks * 3, **WORDS)


def unlike_with_buffers():
    blocks = [noisy, lambda: nn.Sequential(conv(2), nn.BatchNorm2d(2, momentum=None)), lambda: conv(2)]
    return LayerList(None, blocks * 2, **WORDS)


def splines():
    return parallel(lambda: dense(4), 6).use_splines(degree=1, points=3)


CASES = {
    "dense": (lambda: parallel(lambda: dense(4)), (6, 4)),
    "dense, three levels, FCF": (lambda: parallel(lambda: dense(4), 11, levels=3, relaxation="FCF"), (6, 4)),
    "batch norm and dropout": (lambda: parallel(noisy), (3, 2, 5, 5)),
    "group norm": (lambda: parallel(lambda: nn.Sequential(conv(2), nn.GroupNorm(1, 2))), (3, 2, 5, 5)),
    "attention": (lambda: parallel(lambda: EncoderBlock(4, 2, 8, 0.1, True)), (2, 3, 4)),
    "by vmap": (lambda: parallel(lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU())), (6, 4)),
    "in series": (lambda: LayerParallel(None, lambda: nn.Sequential(conv(2), nn.BatchNorm2d(2)), 4), (3, 2, 5, 5)),
    "in turn, with dropout": (lambda: LayerParallel(None, noisy, 4, levels=1), (3, 2, 5, 5)),
    "unlike": (unlike, (6, 4)),
    "unlike, with buffers": (unlike_with_buffers, (3, 2, 5, 5)),
    "splines": (splines, (6, 4)),
    "units": (lambda: GRUParallel(None, 3, 4, 7, 2, coarsening="2", adjoint_cycles=1), (5, 7, 3)),
    "classic units": (lambda: GRUParallel(None, 3, 4, 7, 1, "classic", coarsening="3", cycle="F"), (5, 7, 3)),
}


def gradient(network, x):
    value = network(x).square().sum()
    return [value, *torch.autograd.grad(value, [x, *network.parameters()])]


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    make, shape = CASES[name]
    return make().to(dtype), torch.randn(shape, dtype=dtype).requires_grad_()


def captured(network, x):
    """The graph of value and gradient, and its results; before the capture comes a call, as PyTorch asks for it."""
    gradient(network, x)
    graph = HostGraph()
    with graph.capture():
        found = gradient(network, x)
    return graph, found


@torch.no_grad()
def change(network, x):
    """Other samples and weights, in the same memory."""
    x.copy_(torch.randn_like(x))
    for parameter in network.parameters():
        parameter.mul_(0.9).add_(0.03 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "attention")) for n in CASES])
def test_a_replay_is_a_call_with_other_samples_and_weights(name):
    network, x = made(name)
    graph, found = captured(network, x)
    for seed in (1, 2):
        change(network, x)
        reference = copy.deepcopy(network)
        torch.manual_seed(seed)  # of dropout
        graph.replay()
        torch.manual_seed(seed)
        expected = gradient(reference, x)
        for a, b in zip(found + list(network.buffers()), expected + list(reference.buffers()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        for own, other in zip(network.solvers, reference.solvers, strict=True):
            assert own.misfits == pytest.approx(other.misfits, rel=1e-12)
            assert own.roughness == pytest.approx(other.roughness, rel=1e-12)
            assert bool(own.captured) == (own.misfits[0] > 0)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_replay_chooses_the_weights_of_long_steps_as_they_are_then(noise):
    network, x = made("dense, three levels, FCF")
    graph, (_, _, of_W, _) = captured(network, x)
    assert network.solvers[0].roughness > 0.3  # PyTorch's first weights, independent of each other
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(p[:1] + noise * torch.randn_like(p) * p.std())
    graph.replay()
    assert (network.solvers[0].roughness > 0.3) == (noise > 0)
    torch.testing.assert_close(of_W, gradient(network, x)[2], rtol=1e-12, atol=1e-14)


def test_each_replay_drops_other_entries():
    network, x = made("in turn, with dropout")
    graph, (value, *_) = captured(network, x)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(float(value.detach()))
    assert len(set(seen)) == 3


def test_under_autocast_a_replay_has_the_casts_of_the_capture():
    network, x = made("dense", torch.float32)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        graph, found = captured(network, x)
    change(network, x)
    graph.replay()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = gradient(network, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_replay_that_diverges_says_so_and_repeats_nothing():
    network, x = parallel(lambda: dense(4, "relu"), 16), torch.randn(6, 4).requires_grad_()
    graph, (value, *_) = captured(network, x)
    network.scale(60.0)
    graph.replay()
    assert max(network.solvers[0].misfits) > 0.5
    with exactly(network):
        exact = network(x).square().sum()
    assert network.solvers[0].misfits == (0.0, 0.0)  # of the call in between
    graph.replay()
    gaps = [float(gap) for _, gap in network.solvers[0].captured]  # they are still with the graph
    assert len(gaps) == 2 and max(gaps) > 0.5 and network.solvers[0].repeats == 0
    assert not torch.allclose(value, exact, rtol=1e-2)
    with pytest.warns(RuntimeWarning, match="diverged"):
        torch.testing.assert_close(network(x).square().sum(), exact)


@pytest.mark.parametrize(
    ("words", "what"), [(dict(rtol=1e-3), "-layer_mgrit_rtol 0.001"), (dict(start="warm"), "-layer_mgrit_start warm")]
)
def test_what_a_replay_would_not_do_is_refused(words, what):
    network, x = parallel(lambda: dense(4), **words), torch.randn(6, 4).requires_grad_()
    with pytest.raises(InputError, match=what):
        captured(network, x)
    assert gradient(network, x)[0].isfinite()  # without a graph it goes on
    exact = LayerParallel(None, lambda: dense(4), 5, levels=1, fused="never", **words)  # no cycles, nothing to refuse
    captured(exact, x)


def test_layers_of_several_ranks_are_refused(monkeypatch):
    network, x = made("dense")
    monkeypatch.setattr(network.solvers[0].grid, "mpi", type("Two", (), {"size": 2, "rank": 0})())
    graph = HostGraph()
    with pytest.raises(InputError, match="layers on 2 ranks"), graph.capture():
        network(x)


def test_the_stand_in_refuses_what_a_capture_refuses():
    x = torch.arange(4.0)
    for bad in (lambda: x.sum().item(), lambda: x[x > 1], lambda: x + torch.tensor([1.0, 2.0, 3.0, 4.0])):
        with pytest.raises(RuntimeError, match="in a capture"), HostGraph().capture():
            bad()


def test_the_stand_in_changes_nothing_in_a_capture_and_draws_anew():
    x, total = torch.ones(3), torch.zeros(3)
    graph = HostGraph()
    torch.manual_seed(0)
    with graph.capture():
        total += x
        view = (2.0 * total)[1:]
        drawn = torch.rand(3)
        view += 1.0
    first = drawn.clone()
    assert torch.equal(total, torch.zeros(3)) and torch.equal(torch.rand(3), first)  # the generator is where it was
    x.fill_(2.0)
    graph.replay()
    graph.replay()
    assert torch.equal(total, torch.full((3,), 4.0)) and torch.equal(view, torch.full((2,), 9.0))
    assert not torch.equal(drawn, first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that PyTorch can use")
@pytest.mark.parametrize("name", CASES)
def test_a_graph_of_a_gpu_has_the_numbers_of_a_call(name):
    network, x = made(name)
    network, x = network.cuda(), x.detach().cuda().requires_grad_()
    drops = any(isinstance(part, nn.Dropout) for part in network.template.modules()) if "units" not in name else False
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradient(network, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradient(network, x)
    change(network, x)
    reference = copy.deepcopy(network)
    graph.replay()
    expected = gradient(reference, x)
    for a, b in zip(found, expected, strict=True):
        assert drops or torch.allclose(a, b, rtol=1e-9, atol=1e-11)
        assert bool(a.isfinite().all())


def made_by_pytorch(network, x):
    """`torch.cuda.make_graphed_callables`, PyTorch's own code, with stand-ins for streams and graphs."""
    there = {
        "CUDAGraph": HostGraph,
        "graph": lambda graph, pool: graph.capture(),
        "Stream": lambda: None,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
    }
    with mock.patch.multiple("torch.cuda", **there), mock.patch("torch.cuda.graphs.graph_pool_handle", lambda: None):
        return torch.cuda.make_graphed_callables(network, (x,))


@pytest.mark.filterwarnings("ignore:the adjoint cycles")  # of its first calls, by any cotangents
@pytest.mark.parametrize("name", ["dense", "in turn, with dropout", "unlike, with buffers", "units"])
def test_pytorch_makes_graphs_of_the_forward_and_of_the_backward_pass(name):
    network, x = made(name)
    reference = copy.deepcopy(network)
    graphed = made_by_pytorch(network, x)  # its calls before the captures move running averages
    for seed in (1, 2):
        change(network, x)
        reference.load_state_dict(network.state_dict())
        found = []
        for each in (graphed, reference):
            torch.manual_seed(seed)
            found.append(gradient(each, x))
        for a, b in zip(found[0] + list(network.buffers()), found[1] + list(reference.buffers()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        for own, other in zip(network.solvers, reference.solvers, strict=True):
            assert own.misfits == pytest.approx(other.misfits, rel=1e-12)
