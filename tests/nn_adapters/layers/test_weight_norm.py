"""Weights by length and direction: the function, its derivatives against PyTorch's own, and a network as constraint."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from nn_adapters.layers.blocks import conv, dense, weight_norm
from nn_adapters.layers.constraint import LayerConstraint
from pdeopt.core.errors import InputError
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers.support import relative

BLOCKS = {"dense": (lambda: dense(4), (6, 4)), "convolution": (lambda: conv(2), (3, 2, 5, 5))}


@pytest.mark.parametrize("name", BLOCKS)
def test_it_is_that_of_pytorch(name):
    block, shape = BLOCKS[name]
    torch.manual_seed(0)
    plain, x = block().double(), torch.randn(shape, dtype=torch.float64)
    ours, theirs = weight_norm(deepcopy(plain)), deepcopy(plain)
    parametrizations.weight_norm(theirs[0])
    assert relative(ours(x).detach(), plain(x).detach()) <= 1e-14
    for each in (ours, theirs):
        each(x).square().sum().backward()
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert name == other and relative(p.grad.reshape(-1), q.grad.reshape(-1)) <= 1e-12
    lengths = ours[0].parametrizations.weight.original0
    assert lengths.dim() == 1
    with torch.no_grad():
        lengths.mul_(2.0)
    assert relative(ours[0].weight.detach(), 2.0 * plain[0].weight.detach()) <= 1e-14
    parametrize.remove_parametrizations(ours[0], "weight")
    assert type(ours[0]) is type(plain[0])


def test_rows_of_zeros_stay_and_have_gradients():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    weight_norm(layer)(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight, torch.zeros(2, 3))
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_such_a_block_is_a_constraint():
    """Its controls are bias, lengths and directions; the layer is that of the module."""
    torch.manual_seed(0)
    block, features = weight_norm(dense(4)).double(), torch.randn(5, 4).double()
    constraint = LayerConstraint(block, features)
    assert constraint.control_dim == 4 + 4 + 16
    z = torch.cat([p.detach().reshape(-1) for p in block.parameters()])[None]
    steps = TimeGrid.uniform(4, 1.0).steps[:1]
    found = constraint.layer(features.reshape(1, -1), z, steps)
    assert relative(found, (features + 0.25 * block(features).detach()).reshape(1, -1)) <= 1e-14


def test_what_is_refused():
    for module in (nn.Tanh(), weight_norm(dense(3))):
        with pytest.raises(InputError, match="weights of their own"):
            weight_norm(module)
