"""What layers in parallel refuse, and in which words."""

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import dense
from pdeopt.core.errors import InputError
from tests.helpers.layers import X, converged

ONE = nn.Linear(4, 4)


def test_what_needs_second_derivatives_or_transforms_says_what_to_use():
    network = converged()
    with pytest.raises(RuntimeError, match=r"create_graph.*network\.serial\(\)"):
        torch.autograd.grad(network(X).sum(), network.stacks, create_graph=True)
    calls = (
        lambda: torch.func.grad(lambda u: network(u).sum())(X),
        lambda: torch.func.vmap(network)(X[None]),
        lambda: torch.autograd.functional.jacobian(network, X, vectorize=True),
    )
    for call in calls:
        with pytest.raises(InputError, match=r"network\.serial\(\)"):
            call()


def test_weights_that_change_before_the_backward_pass_are_an_error():
    network = converged()
    loss = network(X).sum()
    with torch.no_grad():
        network.stacks[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "block, words", [(dense(4), "Sequential"), (3, "int"), (lambda: None, "NoneType"), (lambda: ONE, "same")]
)
def test_blocks_that_make_no_new_modules_are_refused(block, words):
    with pytest.raises(InputError, match=f"block.*{words}"):
        converged(block)


@pytest.mark.parametrize(
    "block, words",
    [
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, activation=nn.Mish()), "Dropout|MultiheadAttention"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU()), "RReLU"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.1)), "AlphaDropout"),
    ],
)
def test_random_numbers_are_refused(block, words):
    with pytest.raises(InputError, match=words):
        converged(block)


@pytest.mark.parametrize("x", [X[:, :3], X.double(), X.half(), torch.arange(24).reshape(6, 4)])
def test_features_that_do_not_fit_are_refused_in_pytorchs_words(x):
    network = converged()
    with pytest.raises(RuntimeError) as expected:
        network.serial()(x)
    with pytest.raises(RuntimeError) as found:
        network(x)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("block", [lambda: nn.Linear(4, 5), lambda: nn.Linear(4, 1), lambda: nn.GRU(4, 4)])
def test_blocks_that_change_the_shape_of_features_are_refused(block):
    with pytest.raises(InputError, match="same shape"):
        converged(block)(X)


class Noisy(nn.Linear):
    def forward(self, u):
        return super().forward(u) + torch.randn_like(u)


class Branching(nn.Linear):
    def forward(self, u):
        return super().forward(u) if u.sum() > 0 else u


@pytest.mark.parametrize("kind, words", [(Noisy, "random"), (Branching, "control flow")])
def test_what_cannot_be_batched_is_named_when_it_is_called(kind, words):
    with pytest.raises(InputError, match=words):
        converged(lambda: kind(4, 4))(X)
