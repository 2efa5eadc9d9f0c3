"""Threads that share weights: one of them is SGD, several take each batch once, and one that fails ends all."""

import pytest
import torch
from torch import nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.parallel.hogwild import sharing_weights


def task():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(20, 30, 4, generator=torch.Generator().manual_seed(1))
    return network, [(part, (part[:, 0] > 0).long()) for part in x]


def test_one_thread_takes_the_steps_of_sgd():
    network, batches = task()
    expected, _ = task()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.5)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(x), y).backward()
        optimizer.step()
    training = nna.Hogwild(network, nn.functional.cross_entropy, 0.5, workers=1)
    training.run(batches)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), expected.parameters()))
    assert training.staleness == [0] * 20


def test_several_threads_take_each_batch_once_and_learn():
    network, batches = task()
    training = nna.Hogwild(network, nn.functional.cross_entropy, 0.5, workers=3)
    x, y = (torch.cat(parts) for parts in zip(*batches))
    before = nn.functional.cross_entropy(network(x), y)
    training.run(batches * 2)
    assert len(training.staleness) == 40 and min(training.staleness) >= 0
    assert nn.functional.cross_entropy(network(x), y) < 0.6 * before


def test_weights_are_shared_and_gradients_are_not():
    network, _ = task()
    other = sharing_weights(network)
    with torch.no_grad():
        network[0].weight.zero_()
    assert not other[0].weight.any() and other[0].weight is not network[0].weight


def test_what_is_wrong_ends_all_threads():
    network, batches = task()
    training = nna.Hogwild(network, nn.functional.cross_entropy, 0.5, workers=3)
    bad = (torch.nan * batches[0][0], batches[0][1])
    with pytest.raises(po.SolveFailure, match="loss of a batch is nan"):
        training.run([bad] * 8)
    with pytest.raises(po.InputError, match="running statistics"):
        nna.Hogwild(nn.Sequential(nn.BatchNorm1d(2)), nn.functional.cross_entropy, 0.1)
    with pytest.raises(po.InputError, match="integer >= 1"):
        nna.Hogwild(network, nn.functional.cross_entropy, 0.1, workers=0)
