"""LARS and LAMB against their formulas, and against pytorch-optimizer where that is installed (4.1.0 was)."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import dense, weight_norm
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import exactly, serial_network
from nn_adapters.training.layerwise import LAMB, LARS, layerwise_groups
from nn_adapters.training.rates import Course
from pdeopt.core.errors import InputError, SolveFailure
from tests.helpers.support import relative

KINDS = {"lars": lambda groups: LARS(groups, lr=5.0), "lamb": lambda groups: LAMB(groups, lr=0.1)}


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def leaf(value, gradient):
    p = nn.Parameter(torch.as_tensor(value, dtype=torch.float64))
    p.grad = torch.as_tensor(gradient, dtype=torch.float64)
    return p


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)).double()


def train(network, optimizer, steps=5):
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()


def test_a_step_of_lars_by_hand():
    """|w| = 5, |g| = 10: r = 0.1 5 / (10 + 0.2 5)."""
    w = leaf([[3.0, 4.0]], [[6.0, 8.0]])
    optimizer = LARS([w], lr=2.0, momentum=0.5, weight_decay=0.2, trust=0.1)
    optimizer.step()
    r = 0.1 * 5.0 / 11.0
    first = 2.0 * r * vectors([6.6, 8.8])
    assert relative(w.detach(), vectors([3.0, 4.0]) - first) <= 1e-14
    optimizer.param_groups[0]["lr"] = 0.0  # of the momentum is left what was gathered at the rate of its time
    optimizer.step()
    assert relative(w.detach(), vectors([3.0, 4.0]) - 1.5 * first) <= 1e-14


def test_without_momentum_a_step_is_a_share_of_the_weights():
    w = leaf(torch.randn(4, 3), 1e8 * torch.randn(4, 3))
    before = w.detach().clone()
    LARS([w], lr=10.0, momentum=0.0, trust=1e-3).step()
    assert float((w.detach() - before).norm() / before.norm()) == pytest.approx(1e-2, rel=1e-12)


def test_steps_of_lamb_by_hand():
    """Algorithm 2 of the paper, written out, in two steps."""
    w, lr, a, b, eps, decay = torch.tensor([[3.0, -1.0], [0.5, 2.0]]).double(), 0.1, 0.8, 0.9, 1e-3, 0.3
    p = leaf(w.clone(), torch.zeros(2, 2))
    optimizer, m, v = LAMB([p], lr=lr, betas=(a, b), eps=eps, weight_decay=decay, most=2.0), 0.0, 0.0
    for t in (1, 2):
        g = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        m, v = a * m + (1 - a) * g, b * v + (1 - b) * g**2
        r = m / (1 - a**t) / ((v / (1 - b**t)).sqrt() + eps) + decay * w
        w = w - lr * min(float(w.norm()), 2.0) / float(r.norm()) * r
        p.grad = g
        optimizer.step()
        assert relative(p.detach(), w) <= 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_biases_and_norms_neither_decay_nor_have_rates_of_their_own(kind):
    network = net()
    groups = layerwise_groups(network, weight_decay=0.5)
    assert [(len(g["params"]), g["weight_decay"], g.get("is_adapted")) for g in groups] == [
        (2, 0.5, None),
        (4, 0.0, False),
    ]
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in network.parameters()]
    KINDS[kind](groups).step()
    assert [torch.equal(p, old) for p, old in zip(network.parameters(), before)] == [p.dim() == 1 for p in before]
    network[1].weight.grad = torch.ones(5, dtype=torch.float64)
    KINDS[kind](groups).step()
    step = {"lars": 5.0 * 1e-3, "lamb": 0.1 / (1 + 1e-6)}[kind]
    assert relative(network[1].weight.detach(), before[2] - step) <= 1e-12
    assert len(layerwise_groups(weight_norm(nn.Linear(3, 4)))[-1]["params"]) == 2  # the bias and the lengths


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_no_nan_and_no_leap(kind):
    weights = [leaf(torch.zeros(2, 2), torch.ones(2, 2)), leaf(torch.ones(2, 2), torch.zeros(2, 2))]
    KINDS[kind](weights).step()
    assert all(p.isfinite().all() for p in weights)
    assert float(weights[0].detach().abs().max()) <= 0.1 and torch.equal(weights[1], torch.ones(2, 2).double())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_stay_and_parameters_without_one_do(kind):
    network = net()
    network[0].weight.requires_grad_(False)
    unused, frozen = nn.Parameter(torch.ones(2, 2)), network[0].weight.clone()
    optimizer = KINDS[kind]([*layerwise_groups(network), {"params": [unused]}])
    train(network, optimizer, 1)
    assert torch.equal(network[0].weight, frozen) and torch.equal(unused, torch.ones(2, 2))
    assert len(optimizer.state) == 5
    kept = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    optimizer.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(kept, [p for p in network.parameters() if p.grad is not None]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_or_sparse_changes_nothing(kind):
    network = net()
    optimizer = KINDS[kind](layerwise_groups(network))
    train(network, optimizer, 2)
    before, state = [p.detach().clone() for p in network.parameters()], str(optimizer.state_dict())
    network[3].bias.grad[0] = math.nan
    with pytest.raises(SolveFailure, match="longer warm-up"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before))
    assert str(optimizer.state_dict()) == state
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = KINDS[kind](table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="SparseAdam"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_a_stack_are_layers(kind):
    """A `LayerParallel` goes the steps of its serial network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), LayerParallel(None, lambda: dense(4), 8), nn.Linear(4, 2)).double()
    serial = serial_network(network)
    for each in (network, serial):
        with exactly(network):
            train(each, KINDS[kind](layerwise_groups(each, 0.1)))
    expected = serial.state_dict()
    assert all(relative(value, expected[name]) <= 1e-9 for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_kept_to_the_last_bit_and_courses_change_the_rate(kind):
    networks = [net(), net()]
    optimizers = [KINDS[kind](layerwise_groups(each)) for each in networks]
    course = torch.optim.lr_scheduler.LambdaLR(optimizers[0], Course(steps=4, warmup=2))
    rates = []
    for _ in range(4):
        rates.append(optimizers[0].param_groups[-1]["lr"] / {"lars": 5.0, "lamb": 0.1}[kind])
        train(networks[0], optimizers[0], 1)
        course.step()
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers[1].load_state_dict(deepcopy(optimizers[0].state_dict()))
    for each, optimizer in zip(networks, optimizers):
        optimizer.param_groups[0]["lr"] = 0.2
        train(each, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(*(each.parameters() for each in networks)))


def test_half_precision_does_not_overflow():
    """Squares of half-precision numbers above 256 are infinite."""
    p = nn.Parameter(torch.full((4, 4), 300.0, dtype=torch.float16))
    p.grad = torch.full((4, 4), 300.0, dtype=torch.float16)
    LARS([p], lr=10.0, momentum=0.0, trust=1e-2).step()
    assert torch.allclose(p.float(), torch.full((4, 4), 270.0), rtol=1e-3)


@pytest.mark.parametrize("words", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": math.nan}, {"trust": -1.0}])
def test_what_is_refused(words):
    with pytest.raises(InputError, match=next(iter(words))):
        LARS([nn.Parameter(torch.ones(2, 2))], **words)
    with pytest.raises(InputError, match="betas"):
        LAMB([nn.Parameter(torch.ones(2, 2))], betas=(0.9, 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_are_those_of_pytorch_optimizer(kind):
    """At a constant rate, as its LARS has the rate outside of the momentum; without decay, which its LAMB does not put
    into the norm. The corrections of means cancel in the ratio; without `adam_debias` it divides the whole step by one,
    and the first is ten times as long."""
    theirs = pytest.importorskip("pytorch_optimizer")
    networks = [net(), net()]
    for each in networks:
        for part in (each[1], each[0].bias, each[3].bias):
            part.requires_grad_(False)
    ours = {"lars": lambda p: LARS(p, lr=5.0, weight_decay=0.1), "lamb": lambda p: LAMB(p, lr=0.1, eps=1e-12)}[kind]
    other = {
        "lars": lambda p: theirs.LARS(p, lr=5.0, weight_decay=0.1),
        "lamb": lambda p: theirs.Lamb(p, lr=0.1, eps=1e-12, adam_debias=True),
    }[kind]
    train(networks[0], ours(networks[0].parameters()))
    train(networks[1], other(networks[1].parameters()))
    for mine, other_one in zip(networks[0].parameters(), networks[1].parameters()):
        assert relative(mine.detach(), other_one.detach()) <= 1e-9
