"""Layers of several kinds in parallel, against the same modules in series."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import Direct, dense
from nn_adapters.layers.layerlist import LayerList
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import exactly, measure_bias, parameter_groups
from pdeopt.core.errors import InputError
from tests.helpers.layers import X, same

KINDS = {
    "a": lambda: dense(4),
    "b": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 4)),
    "c": lambda: Direct(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2))),
    "d": lambda: nn.Tanh(),
}


def network(order, cycles=8, **words):
    torch.manual_seed(0)
    words = {"coarsening": "4", "cycles": cycles, "adjoint_cycles": cycles, "serial": "never", **words}
    return LayerList(None, [KINDS[kind] for kind in order], 2.0, **words).double()


def gradients(net, x):
    torch.manual_seed(3)
    leaves = [x.detach().requires_grad_(), *net.parameters()]
    value = net(leaves[0])
    return [value.detach(), *torch.autograd.grad(value.square().sum(), leaves)]


@pytest.mark.parametrize("order", ["aaaaaaaabbbbbbbb", "abababababababab", "aabdbbad", "aaaaccccbbbb", "bbbb"])
def test_values_and_gradients_are_those_of_the_serial_network(order):
    net, x = network(order), X.double()
    found = gradients(net, x)
    with exactly(net):
        same(found, gradients(net, x), 1e-10)
    if "c" in order:  # dropout is not PyTorch's own
        net.eval()
        found = gradients(net, x)
    serial = net.serial()
    expected = gradients(serial, x)
    same(found[:2], expected[:2], 1e-10)
    by_name = dict(zip([name for name, _ in serial.named_parameters()], expected[2:]))
    for shelf, stack in zip(net.shelves, net.stack):
        for name, stacked in zip(shelf.template.names, stack.parameters()):
            at = next(k for k, p in enumerate(net.parameters()) if p is stacked)
            whole = torch.stack([by_name[f"layers.{layer}.{name}"] for layer in shelf.layers])
            same([found[2 + at]], [whole], 1e-10)


def test_runs_of_like_blocks_converge_within_few_cycles():
    errors = [
        measure_bias(net, lambda net=net: net(X.double()).square().sum())
        for net in (network("a" * 32 + "b" * 32, cycles, coarsening="8") for cycles in (0, 2, 4))
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_states_copies_and_groups_are_as_the_serial_networks():
    net, other, x = network("abcab"), network("abcab"), X.double()
    other.scale(0.5)
    serial = net.serial()
    assert list(net.state_dict()) == list(serial.state_dict()) == list(net.full_state_dict())
    other.load_state_dict(serial.state_dict())
    for each in (other, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        same([each.eval()(x)], [serial.eval()(x)], 1e-10)
    groups = parameter_groups(net, 0.1)
    assert [len(group["params"]) for group in groups] == [4, 8]
    assert isinstance(net[-1][1], nn.Linear) and net[2].block[1].running_mean.shape == (4,)
    state = serial.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected.*layers\.0\.3\.weight"):
        net.load_state_dict({**state, "layers.0.3.weight": state["layers.1.3.weight"]})


@pytest.mark.parametrize(
    "blocks, words",
    [
        ([], "no blocks"),
        (lambda: dense(4), "a list of functions"),
        ([dense(4)], "a function that makes a module"),
        ([KINDS["a"], lambda: nn.Linear(4, 5)], "same shape"),
        ([KINDS["a"], lambda: nn.Linear(4, 4)], "one dtype"),
        ([KINDS["a"], lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU())], "RReLU"),
    ],
)
def test_what_cannot_be_in_a_list_is_refused_by_name(blocks, words):
    with pytest.raises(InputError, match=words):
        net = LayerList(None, blocks, coarsening="2")
        (net.stack[0] if words == "one dtype" else net).double()
        net(X.double())


def normalized():
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh())


@pytest.mark.parametrize("words", [{"cycles": 6, "adjoint_cycles": 6, "serial": "never"}, {"levels": 1}])
def test_under_autocast_batch_norms_and_unlike_blocks_are_as_in_series(words):
    other = [normalized, lambda: nn.Sequential(nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 1))]
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    for make in (lambda **w: LayerParallel(None, normalized, 6, **w), lambda **w: LayerList(None, other * 3, **w)):
        torch.manual_seed(0)
        layers = make(coarsening="2", **words)
        serial, values = layers.serial(), []
        for each in (layers, serial):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                values.append(each(x))
            values[-1].square().sum().backward()
        torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
        places = [layers._place(i) for i in range(6)]
        found = [p.grad[row] for shelf, row in places for p in shelf.template.find(shelf.stack)]
        torch.testing.assert_close(found, [p.grad for p in serial.parameters()], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dict(layers.state_dict()), dict(serial.state_dict()), rtol=1e-6, atol=1e-6)
