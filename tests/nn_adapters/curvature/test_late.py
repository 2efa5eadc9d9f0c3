"""Statistics that are late: they enter by steps later, and are in a memory while they are under way."""

import copy

import pytest
import torch
from torch import nn

import nn_adapters as nna

X = torch.randn(8, 30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(30) % 3


def run(optimizer, network, loss, batches):
    for x in X[batches]:

        def closure(x=x):
            optimizer.zero_grad()
            value = loss(network(x), Y)
            value.backward()
            return value

        optimizer.step(closure)
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def task(late):
    torch.manual_seed(0)
    network, loss = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), nna.CrossEntropy()
    return nna.KFAC(network, loss, late=late, inverse_every=2), network, loss


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_restart_goes_on_to_the_last_bit(late):
    whole, again = task(late), task(late)
    run(*whole, slice(4))
    state, weights = copy.deepcopy(whole[0].state_dict()), copy.deepcopy(whole[1].state_dict())
    assert sum(name.startswith("forget") for name in state["memory"]) == late
    again[1].load_state_dict(weights)
    again[0].load_state_dict(state)
    assert torch.equal(run(*again, slice(4, None)), run(*whole, slice(4, None)))


def test_averages_are_without_the_last_batches():
    factors = [task(late)[0].factors for late in (0, 1)]
    for number in (0, 1, 2):
        for each in factors:
            each.generator.manual_seed(number)
            each.average([(X[number],)], forget=0.5)
        if number == 1:
            before = factors[0].blocks().A
    assert all(torch.equal(a, b) for a, b in zip(factors[1].blocks().A, before))
    assert not torch.equal(factors[0].blocks().A[0], before[0])
