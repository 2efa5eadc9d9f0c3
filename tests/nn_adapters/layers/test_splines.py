"""Weights that are splines in depth: what they reproduce, their gradients, and how such a network is saved."""

import copy

import pytest
import torch
from torch import nn

from nn_adapters.curvature.chains import shared_copy
from nn_adapters.layers.blocks import conv, dense
from nn_adapters.layers.init import initialize
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parts.splines import DEGREES, spline_basis, spline_coefficients
from nn_adapters.training.checkpoint import load_checkpoint, save_checkpoint
from pdeopt.core.errors import InputError
from tests.helpers.layers import X, converged, gradients, same

BLOCKS = {"dense": (lambda: dense(4), (6, 4)), "convolution": (lambda: conv(2), (3, 2, 5, 5))}
NORMED = {"batch norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (6, 4))}


def layers(depth, block=lambda: dense(4), **words):
    return converged(block, depth, **words).double()


@pytest.mark.parametrize("degree", DEGREES)
def test_polynomials_in_depth_are_reproduced(degree):
    """Those of the degree of the splines, constants among them; rows of B are averages."""
    basis = spline_basis(21, degree, 7)
    assert bool((basis >= 0).all()) and torch.allclose(basis.sum(1), torch.ones(21).double(), rtol=0, atol=1e-14)
    network, t = layers(21), torch.linspace(0, 1, 21, dtype=torch.float64)
    with torch.no_grad():
        for stack in network.stacks:
            stack.copy_(torch.tensordot(t[:, None] ** degree + 1, stack[:1], 1))
    before = [stack.detach().clone() for stack in network.stacks]
    same(network.use_splines(degree, 7).stacks, before, 1e-13)


@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.parametrize("depth", [2, 11])
def test_as_many_coefficients_as_layers_are_the_layers(degree, depth):
    network, plain = layers(depth).use_splines(degree, depth), layers(depth)
    (value, found), (other, expected) = (gradients(each, X.double()) for each in (network, plain))
    same([value, *found], [other, *expected], 1e-14)


@pytest.mark.parametrize("name", [*BLOCKS, *NORMED])
def test_gradients_are_those_of_autograd(name):
    """dJ/dc = B' dJ/dz, with dJ/dz of the serial network."""
    block, shape = {**BLOCKS, **NORMED}[name]
    network, x = layers(11, block).use_splines(2, 5), torch.randn(shape, dtype=torch.float64)
    (value, found), (other, expected) = (gradients(each, x) for each in (network, network.serial()))
    basis = spline_basis(11, 2, 5)
    same([value, *found], [other, *(torch.tensordot(basis.mT, each, 1) for each in expected)], 1e-10)


def test_the_same_function_of_depth_serves_any_number_of_layers(tmp_path):
    network = layers(11).use_splines(3, 4)
    assert all(len(each) == 4 for each in network.state_dict().values())
    shapes = [tuple(each.shape) for each in spline_coefficients(network)]
    assert shapes == [(4, 4, 4), (4, 4)] and len(network.full_state_dict()) == 22
    deeper = layers(31).use_splines(3, 4)
    deeper.load_state_dict(network.state_dict())
    same([stack[::3] for stack in deeper.stacks], network.stacks, 1e-13)
    assert torch.equal(copy.deepcopy(network)(X.double()), network(X.double()))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    save_checkpoint(str(tmp_path / "file"), network, optimizer, network.grid.mpi)
    other = layers(11).use_splines(3, 4)
    other.scale(0.0)
    assert all(bool((stack == 0).all()) for stack in other.stacks)
    load_checkpoint(str(tmp_path / "file"), other, torch.optim.SGD(other.parameters(), lr=0.1), other.grid.mpi)
    same(other.stacks, network.stacks, 0.0)


@pytest.mark.parametrize(
    "degree, points, got", [(4, 6, "got 4"), (3, 3, "4 to 11"), (1, 12, "2 to 11"), (0, 0, "1 to 11")]
)
def test_splines_that_cannot_be(degree, points, got):
    with pytest.raises(InputError, match=got):
        layers(11).use_splines(degree, points)


def test_what_splines_are_refused():
    network = layers(11).use_splines(1, 3)
    for wrong in (lambda: network.use_splines(1, 3), lambda: initialize(network, "he"), lambda: shared_copy(network)):
        with pytest.raises(InputError, match="splines"):
            wrong()


def test_layers_with_weights_of_their_own_have_no_coefficients():
    assert not spline_coefficients(LayerParallel(None, lambda: dense(4), 3))
