"""Batch normalization and other buffers in depth-parallel networks, against PyTorch's own modules."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import Direct
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import approximately, measure_bias
from pdeopt.core.errors import InputError
from tests.helpers.layers import X, alike, converged, same


class Own(nn.Module):
    """A block that goes through vmap: a batch norm, dropout, and a constant of its own."""

    def __init__(self, p=0.0):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.Dropout(p)
        self.register_buffer("shift", torch.randn(4), persistent=False)
        self.register_buffer("at", torch.randperm(4))

    def forward(self, u):
        return torch.tanh(self.drop(self.norm(self.linear(u)))[..., self.at] + self.shift)


BLOCKS = {
    "dense": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Tanh()), (6, 4)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.SiLU()), (3, 2, 5, 5)),
    "feedforward": (lambda: Direct(nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4))), (6, 4)),
    "by the batch alone": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (6, 4)),
    "by vmap": (Own, (6, 4)),
}


def averages(network):
    return [value for key, value in network.state_dict().items() if "running" in key or "tracked" in key]


@pytest.mark.parametrize("name", BLOCKS)
def test_training_and_evaluation_are_those_of_the_serial_network(name):
    block, shape = BLOCKS[name]
    network = converged(block, cycles=3, adjoint_cycles=3).double()
    serial = network.serial()
    x = torch.randn(2, *shape, dtype=torch.float64)
    alike(network, x[0], 1e-10)  # with a copy in series
    (network(x[1]).sum() + network(x[0]).sum()).backward()
    for part in (x[0], x[1], x[0]):
        serial(part)
    same(averages(network), averages(serial), 1e-12)
    network.eval(), serial.eval()
    alike(network, x[1], 1e-10)
    with approximately(network):
        same([network(x[1])], [serial(x[1])], 1e-10)
    for each in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(each(x[1]), network(x[1]))


def test_averages_move_once_a_call_by_the_last_states():
    network = converged(BLOCKS["dense"][0], layers=16, cycles=0, adjoint_cycles=0).double()
    x = X.double()
    states = torch.cat([x[None], network.trajectory(x).detach()])  # those that count, of coarse points that are off
    found = averages(network[3])
    seen = nn.functional.linear(states[3], network[3][0].weight, network[3][0].bias)
    same(found[:2], [0.3 * seen.mean(0), 0.7 + 0.3 * seen.var(0)], 1e-12)
    before = [each.clone() for each in averages(network)]
    assert measure_bias(network, lambda: network(x).square().sum()) > 1e-4
    assert all(map(torch.equal, averages(network), before))
    value = network(x).sum()
    after = [each.clone() for each in averages(network)]
    value.backward(retain_graph=True)
    value.backward()  # evaluates once more
    assert all(map(torch.equal, averages(network), after)) and not torch.equal(after[0], before[0])


def test_states_go_both_ways_with_buffers():
    network, other = (converged(BLOCKS["by vmap"][0]).double() for _ in range(2))
    network(X.double())
    serial = network.serial()
    assert list(network.state_dict()) == list(serial.state_dict()) == list(network.full_state_dict())
    for state in (serial.state_dict(), network.full_state_dict()):
        other.load_state_dict(state)
        assert all(torch.equal(other.state_dict()[key], value) for key, value in state.items())
        with torch.no_grad():
            other.apply(lambda m: m.reset_parameters() if isinstance(m, (nn.Linear, nn.BatchNorm1d)) else None)
        assert other[2].norm.num_batches_tracked == 0
    with pytest.raises(RuntimeError, match=r"layers\.10\.norm\.running_var"):
        network.load_state_dict({k: v for k, v in serial.state_dict().items() if "10.norm.running_var" not in k})


class Moving(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.norm = kind, nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, u):
        if self.kind == "in place":
            self.calls += 1
        elif self.kind == "anew":
            self.calls = self.calls + 1
        else:
            u = self.norm(self.norm(u))
        return u


@pytest.mark.parametrize(
    "block, words",
    [
        (lambda: Moving("in place"), "calls that a call changes"),
        (lambda: Moving("anew"), "calls that a call changes"),
        (lambda: Moving("twice"), "2 calls of the batch norm 'norm'"),
        (
            lambda: nn.Sequential(
                nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
            ),
            "1.running_mean",
        ),
    ],
)
def test_changes_of_buffers_that_would_be_lost_are_refused(block, words):
    with pytest.raises(InputError, match=words):
        converged(block)(X)


def test_one_sample_is_refused_as_in_pytorch():
    network = converged(BLOCKS["dense"][0])
    with pytest.raises(ValueError, match="more than 1 value"):
        network(X[:1])
    assert network.eval()(X[:1]).shape == (1, 4) and isinstance(network.train(), LayerParallel)
