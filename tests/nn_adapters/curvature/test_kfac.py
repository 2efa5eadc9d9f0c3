"""K-FAC: what its steps are, the quadratic model, damping, restarts, and what it refuses."""

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn

from nn_adapters.curvature.kfac import KFAC, KFACSettings, minimizer
from nn_adapters.curvature.likelihoods import CrossEntropy, SquaredError
from pdeopt.core.errors import InputError, SolveFailure
from tests.helpers.curvature import closure_of, dense_fisher, flat_gradient, problem, train
from tests.helpers.support import relative


def test_one_linear_layer_is_solved_in_a_step():
    """With a squared error the Fisher matrix of one layer is I (x) E aa', and the model is the loss."""
    torch.manual_seed(0)
    network, x, y = nn.Linear(4, 2).double(), torch.randn(30, 4).double(), torch.randn(30, 2).double()
    loss = SquaredError()
    optimizer = KFAC(network, loss, fisher="exact", damping=1e-12, least=1e-12)
    optimizer.step(closure_of(optimizer, network, loss, x, y))
    ones = torch.cat([x, torch.ones(30, 1).double()], 1)
    best = ones @ torch.linalg.lstsq(ones, y).solution
    assert relative(network(x).detach(), best) <= 1e-5
    assert optimizer.coefficients == pytest.approx((1.0, 0.0), abs=1e-6)


def test_steps_minimize_the_quadratic_model():
    """alpha and mu against the dense damped Fisher matrix."""
    network, x, y = problem()
    loss = CrossEntropy()
    optimizer = KFAC(network, loss, fisher="exact", judge_every=0, damping=0.1, l2=0.01)
    train(optimizer, network, loss, x, y, 1)
    last, before = optimizer.last.clone(), deepcopy(network)
    train(optimizer, network, loss, x, y, 1, begin=1)
    step = optimizer.last
    alpha, mu = optimizer.coefficients
    assert 0.0 < mu < 0.9
    F = dense_fisher(before, loss, x[10:20]) + 0.11 * torch.eye(len(step), dtype=torch.float64)
    d = (step - mu * last) / alpha
    g = flat_gradient(before, loss, x[10:20], y[10:20], l2=0.01)
    residual = torch.stack([d, last]) @ (g + F @ step)
    assert float(residual.abs().max()) <= 1e-10 * float((d @ g).abs())


def test_the_momentum_stays_in_its_bounds():
    Q = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    for slope, expected in ((-5.0, 0.9), (5.0, 0.0)):
        b = torch.tensor([-1.0, slope], dtype=torch.float64)
        alpha, mu = minimizer(b, Q)
        assert mu == expected and alpha == pytest.approx((1.0 - 0.5 * mu) / 2.0)
    singular = torch.ones(2, 2, dtype=torch.float64)
    assert all(math.isfinite(each) for each in minimizer(torch.tensor([-1.0, -1.0]).double(), singular))


@pytest.mark.parametrize("kind", ["affine", "scaled"])
def test_steps_do_not_depend_on_the_units_of_the_inputs(kind):
    """Martens and Grosse, theorem 1: the undamped step is the same function for any affine change of the inputs."""
    network, x, y = problem()
    network = nn.Sequential(network[0], network[1], network[3])
    torch.manual_seed(5)
    S = torch.randn(4, 4).double() if kind == "affine" else torch.diag(torch.tensor([1.0, 10.0, 0.1, 3.0])).double()
    shift, other = torch.ones(4).double(), deepcopy(network)
    with torch.no_grad():
        other[0].weight.copy_(network[0].weight @ torch.linalg.inv(S))
        other[0].bias.copy_(network[0].bias - other[0].weight @ shift)
    loss, found, y = SquaredError(), [], nn.functional.one_hot(y, 3).double()
    for each, inputs in ((network, x), (other, x @ S.T + shift)):
        optimizer = KFAC(each, loss, fisher="exact", damping=1e-20, least=1e-20, rate=0.1, judge_every=0)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, each, loss, inputs, y))
        found.append(each(inputs).detach())
    assert relative(found[1], found[0]) <= 1e-6


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_it_trains_on_batches(fisher):
    network, x, y = problem()
    optimizer = KFAC(network, loss := CrossEntropy(), fisher=fisher)
    losses = train(optimizer, network, loss, x, y, 30, batch=20)
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])


def test_the_damping_follows_the_curvature_of_the_next_batch():
    """A quadratic loss is its model: the damping falls to its floor. A loss of more curvature lets it grow."""
    torch.manual_seed(0)
    network, x, y = nn.Linear(3, 2).double(), torch.randn(20, 3).double(), torch.randn(20, 2).double()
    loss = SquaredError()
    optimizer = KFAC(network, loss, damping=1.0, least=0.5, judge_every=1)
    for _ in range(5):
        optimizer.step(closure_of(optimizer, network, loss, x, y))
    assert optimizer.damping == 0.5 and optimizer.ratio >= 1.0

    network, loss = nn.Linear(3, 2).double(), Steeper(1.9)
    optimizer = KFAC(network, loss, damping=0.01, judge_every=1)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, network, loss, x, y))
    assert optimizer.damping > 0.01 and optimizer.ratio < 0.25 and not optimizer.refused


class Steeper(SquaredError):
    """So many times as large as its model knows."""

    def __init__(self, times):
        super().__init__()
        self.times_larger = times

    def each(self, outputs, targets):
        return self.times_larger * super().each(outputs, targets)


def test_a_step_that_raises_the_loss_of_its_batch_is_refused():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    network, loss = nn.Linear(3, 2).double(), Steeper(20.0)
    optimizer = KFAC(network, loss, judge_every=0)
    values = [float(optimizer.step(closure_of(optimizer, network, loss, x, y)).detach()) for _ in range(6)]
    assert optimizer.refused and all(b <= 1.05 * a for a, b in pairwise(values)) and values[-1] < values[0]


def test_judging_leaves_no_trace():
    """Running means, gradients and parameters are those of a run that does not judge."""
    found = []
    for every in (0, 1):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
        _, x, y = problem()
        optimizer = KFAC(network, loss := CrossEntropy(), judge_every=every, change=1.0)
        losses = train(optimizer, network, loss, x, y, 6)
        found.append((losses, network.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_restarts_to_the_last_bit():
    network, x, y = problem()
    loss = CrossEntropy()
    optimizer = KFAC(network, loss, seed=3)
    train(optimizer, network, loss, x, y, 7)
    saved = deepcopy(network.state_dict()), deepcopy(optimizer.state_dict())
    # files keep numbers, not strides, and products of other strides round otherwise
    assert all(each.is_contiguous() for each in optimizer.memory().values() if isinstance(each, torch.Tensor))
    expected = train(optimizer, network, loss, x, y, 8, begin=7)
    again, *_ = problem(seed=1)
    other = KFAC(again, loss, seed=4)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert train(other, again, loss, x, y, 8, begin=7) == expected
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters()))


def test_decay_is_of_weights_alone():
    network, x, y = problem()
    optimizer = KFAC(network, loss := CrossEntropy(), decay=0.5)
    before = [p.detach().clone() for p in network.parameters()]
    optimizer.step(closure_of(optimizer, network, loss, x, y))
    parts = [part for each in _parts(optimizer) for part in each]
    for p, old, step in zip(network.parameters(), before, parts):
        assert relative(p.detach(), (0.5 if p.dim() > 1 else 1.0) * old + step) <= 1e-14


def _parts(optimizer):
    from nn_adapters.curvature.products import by_layer

    return by_layer(optimizer.model.layers, optimizer.last)


def test_a_batch_that_is_not_finite_changes_nothing():
    network, x, y = problem()
    optimizer = KFAC(network, loss := CrossEntropy())
    train(optimizer, network, loss, x, y, 2)
    weights, memory = deepcopy(network.state_dict()), deepcopy(optimizer.memory())
    broken = x.clone()
    broken[3, 1] = math.nan
    with pytest.raises(SolveFailure, match="not finite"):
        optimizer.step(closure_of(optimizer, network, loss, broken, y))
    assert all(torch.equal(weights[name], each) for name, each in network.state_dict().items())
    now = optimizer.memory()
    assert memory.keys() == now.keys()
    assert all(torch.equal(torch.as_tensor(now[k]), torch.as_tensor(memory[k])) for k in memory if k != "ratio")
    train(optimizer, network, loss, x, y, 2)


def test_a_layer_without_gradient_stays():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    network, (_, x, y) = Partly().double(), problem()
    optimizer, before = KFAC(network, loss := CrossEntropy()), network.unused.weight.detach().clone()
    losses = train(optimizer, network, loss, x, y, 4)
    assert torch.equal(network.unused.weight, before) and all(map(math.isfinite, losses))


def test_gradients_that_are_there_are_enough():
    """`step()` of a loop of one's own: a rate of its own or that of the model, and no adaptation of the damping."""
    for words in ({}, {"rate": 0.05, "momentum": 0.5}):
        network, x, y = problem()
        optimizer = KFAC(network, loss := CrossEntropy(), **words)
        first = float(loss(network(x), y).detach())
        for _ in range(10):
            optimizer.zero_grad()
            loss(network(x), y).backward()
            optimizer.step()
        assert float(loss(network(x), y).detach()) < first and optimizer.damping == KFACSettings().damping


def test_what_is_refused():
    network, *_ = problem()
    with pytest.raises(InputError, match="Dropout"):
        KFAC(nn.Sequential(network, nn.Dropout(0.1)), CrossEntropy())
    with pytest.raises(InputError, match="one of the two"):
        KFAC(network, CrossEntropy(), KFACSettings(), damping=1.0)
    with pytest.raises(InputError, match="damping"):
        KFAC(network, CrossEntropy(), damping=-1.0)
    with pytest.raises(InputError, match="no inputs"):
        KFAC(network, CrossEntropy()).step()


def test_a_loss_without_an_optimizer_keeps_no_targets():
    loss, network = CrossEntropy(), nn.Linear(2, 3)
    for _ in range(3):
        loss(network(torch.randn(5, 2)), torch.zeros(5, dtype=torch.int64)).backward()
    assert not loss.seen


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_a_part_of_the_batch_stands_for_all_of_it(kind):
    """Of a batch that repeats its samples, every other one has the same factors, model and step, whatever the loss."""
    network, x, y = problem()
    x, y, found = x[:20].repeat_interleave(2, 0), y[:20].repeat_interleave(2), []
    for most in (0, 20):
        mine, loss = deepcopy(network), CrossEntropy(kind)
        optimizer = KFAC(mine, loss, fisher="exact", judge_every=1, statistics_samples=most, model_samples=most)
        losses = [float(optimizer.step(closure_of(optimizer, mine, loss, x, y)).detach()) for _ in range(3)]
        found.append((torch.cat([optimizer.last, torch.tensor([*losses, optimizer.ratio])]), optimizer.damping))
    assert relative(found[1][0], found[0][0]) <= 1e-9 and found[0][1] == found[1][1]


def test_a_loss_of_other_shapes_than_the_outputs_is_not_looked_at():
    """One loss of two calls of the network, and outputs that are reshaped: the batch's own loss is not found again."""
    network, x, y = problem()
    optimizer = KFAC(network, loss := CrossEntropy(), statistics_samples=24, model_samples=24)

    def closure():
        optimizer.zero_grad()
        value = loss(torch.cat([network(x[:15]), network(x[15:30])]), y[:30])
        value.backward()
        return value

    losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
    assert losses[-1] < losses[0]
    one, squared = nn.Linear(4, 2).double(), SquaredError()
    optimizer = KFAC(one, squared)

    def reshaped():
        optimizer.zero_grad()
        value = squared(one(x)[:, :, None], x[:, :2, None])
        value.backward()
        return value

    losses = [float(optimizer.step(reshaped).detach()) for _ in range(5)]
    assert losses[-1] < losses[0]
