"""Cycles that follow the error of gradients: the bound of the theorem, the way to serial, restarts."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import measure_bias
from nn_adapters.layers.parts.costs import mgrit_cost, serial_cost
from nn_adapters.layers.recurrent import GRUParallel
from nn_adapters.training.cyclecontrol import DIVERGED, CycleControl


def network(scale=1.0, layers=128, act="tanh", **words):
    torch.manual_seed(0)
    found = LayerParallel(None, lambda: dense(4, act), layers, 2.0, serial="never", **words).double()
    found.scale(scale)
    return found


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(net, control, batches, rate=1e-2, spoil=lambda batch: None):
    """Plain SGD; errors of the gradients that were taken."""
    errors = []
    for batch in range(1, batches + 1):
        spoil(batch)
        control.before(batch, rate, lambda: net(X).square().mean())
        errors.append(measure_bias(net, lambda: net(X).square().mean()))
        net.zero_grad()
        net(X).square().mean().backward()
        control.after(batch, rate)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(rate * parameter.grad)
    return errors


def test_what_is_allowed_adds_up_to_the_bound():
    control = CycleControl(network(), 0.1, 100, 7)
    allowed = [0.3 * control.allowed(batch) for batch in range(1, 100_000)]
    assert 0.9 * control.bound(0.3) < sum(allowed) * (1 + 2 * 7) / (2 * 7) and sum(allowed) < control.bound(0.3)


@pytest.mark.parametrize("scale, act", [(0.01, "tanh"), (1.0, "tanh"), (3.0, "relu"), (20.0, "relu")])
def test_errors_stay_within_the_bound_also_for_rough_and_exploding_weights(scale, act):
    net = network(scale, act=act)
    control = CycleControl(net, 0.05, 20, 10)
    errors = train(net, control, 8, rate=1e-4)
    assert all(error <= control.allowed(batch) for batch, error in enumerate(errors, start=1))
    assert 1e-4 * sum(errors) <= control.bound(1e-4)
    assert scale < 3 or control.why_serial or control.cycles > (1, 1)
    assert scale > 1 or not control.why_serial


def test_weights_that_become_rough_in_training_are_noticed_without_an_exact_gradient():
    net = network(0.01)
    control = CycleControl(net, 0.05, 1000, 10)

    def spoil(batch):
        if batch == 5:
            with torch.no_grad():
                for stack in net.stacks:
                    stack.add_(torch.randn(stack.shape, generator=torch.Generator().manual_seed(2)).double())

    train(net, control, 8, spoil=spoil)
    assert len(control.bias) <= 4
    assert control.why_serial or measure_bias(net, lambda: net(X).square().mean()) <= control.allowed(9)


def test_an_adjoint_cycle_comes_after_the_forward_one():
    """However large the adjoint's misfit is."""
    net = network(0.01, cycles=0, adjoint_cycles=0)
    control, found = CycleControl(net, 0.05, 1000, 1000), []
    for batch in range(1, 5):
        control.before(batch, 1e-3, lambda: net(X).square().mean())
        found.append(control.cycles)
        net.solvers[0].gaps = (1e-3, 10.0)  # as the gradient of this batch left them
        control.after(batch, 1e-3)
    assert found == [(0, 0), (1, 0), (1, 1), (2, 1)]


def test_cycles_that_are_not_needed_are_taken_away():
    net = network(1e-3, cycles=2, adjoint_cycles=2)
    control = CycleControl(net, 0.1, 4, 1000)
    control._wait = 1
    train(net, control, 4)
    assert control.cycles < (2, 2) and control.bias[-1].error <= control.allowed(4)


def test_wide_layers_on_one_rank_go_one_after_the_other_and_narrow_ones_do_not():
    costs = []
    for width in (4, 256):
        net = LayerParallel(None, lambda width=width: dense(width), 32, 1.0, coarsening="8")
        net(torch.zeros(50, width)).sum().backward()
        costs.append(mgrit_cost(net.solvers[0]) / serial_cost(net.solvers[0]))
    assert costs[0] < 0.9 < 1.3 < costs[1]
    control = CycleControl(net, 0.1, 100, 10)
    control.before(1, 1e-3, lambda: net(torch.zeros(50, 256)).sum())
    assert "one layer after the other on 1 rank" in control.why_serial
    net(torch.zeros(10, 256)).sum().backward()
    assert net.solvers[0].misfits == (0.0, 0.0)


@pytest.mark.parametrize("kind", ["classic", "implicit"])
def test_gru_gradients_are_right_or_refused(kind):
    torch.manual_seed(0)
    gru = GRUParallel(None, 3, 6, 64, 1, kind, serial="never").double()
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.mul_(8.0)  # gates that jump
    x, control = torch.randn(4, 64, 3, dtype=torch.float64), CycleControl(gru, 0.05, 20, 10)
    control.before(1, 1e-3, lambda: gru(x).square().sum())
    assert measure_bias(gru, lambda: gru(x).square().sum()) <= 0.05


def steps(net, control, batches, rate=1e-3):
    for batch in batches:
        control.before(batch, rate, lambda: net(X).square().mean())
        net.zero_grad()
        net(X).square().mean().backward()
        control.after(batch, rate)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(rate * parameter.grad)


@pytest.mark.parametrize("scale, act", [(1.0, "tanh"), (3.0, "relu"), (20.0, "relu")])
@pytest.mark.filterwarnings("ignore:.*diverged")
def test_a_control_goes_on_from_its_state(scale, act):
    whole, net, rest = (network(scale, act=act) for _ in range(3))
    control, first, second = (CycleControl(each, 0.02, 20, 10) for each in (whole, net, rest))
    steps(whole, control, range(1, 9))
    steps(net, first, range(1, 5))
    rest.load_state_dict(net.state_dict())
    second.go_on_from(json.loads(json.dumps(first.state())))
    steps(rest, second, range(5, 9))
    assert second.state() == control.state()
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_end_in_series_and_the_control_says_why(value):
    net = network(cycles=1)
    with torch.no_grad():
        net.stacks[0][3] = value
    control = CycleControl(net, 0.1, 100, 10)
    control.before(1, 1e-2, lambda: net(X).square().mean())
    assert "cycles diverge" in control.why_serial and net.solvers[0].is_serial
    control.after(1, 1e-2)
    assert math.isfinite(control.accumulated) and all(each.error == DIVERGED for each in control.bias)


class Pair:
    """One of two ranks with samples of their own, each a thread."""

    size = 2

    def __init__(self, rank, table, barrier):
        self.rank, self.table, self.barrier = rank, table, barrier

    def Allreduce(self, own, found, op):
        self.table[self.rank] = own
        self.barrier.wait(60)
        found[:] = np.maximum(*self.table)
        self.barrier.wait(60)


def test_ranks_with_other_samples_choose_alike_by_the_largest_error():
    table, barrier = [None, None], Barrier(2)

    def rank(number):
        net = network((0.01, 1.0)[number], act="relu")
        control = CycleControl(net, 0.02, 100, 1000, Pair(number, table, barrier))
        steps(net, control, range(1, 4), 1e-4)
        return control.state()

    with ThreadPoolExecutor(2) as threads:
        calm, rough = threads.map(rank, range(2))
    assert calm == rough
    net = network(0.01, act="relu")
    alone = CycleControl(net, 0.02, 100, 1000)
    steps(net, alone, range(1, 4), 1e-4)
    assert max(each["error"] for each in rough["bias"]) > 0.02 > max(each.error for each in alone.bias)


def test_a_measurement_leaves_random_numbers_alone_and_exact_layers_their_cycles():
    net = network(0.0)  # layers that do nothing, as exact as a fused chain
    control, before = CycleControl(net, 0.1, 100, 10), torch.get_rng_state()

    def loss():
        return torch.nn.functional.dropout(net(X)).square().mean()

    control.before(1, 1e-2, loss)
    assert torch.equal(torch.get_rng_state(), before)
    assert control.cycles == (1, 0) and control.bias[0].error == 0 and not control.why_serial


def test_without_a_limit_cycles_stay_and_without_layers_nothing_is_done():
    net = network(3.0)
    control = CycleControl(net, None, 1, 10)
    control.before(1, 1.0, lambda: net(X).square().mean())
    assert control.cycles == (1, 0) and len(control.bias) == 1 and math.isinf(control.bound(1.0))
    plain = CycleControl(torch.nn.Linear(2, 2), 0.1, 1, 10)
    plain.before(1, 1.0, lambda: pytest.fail("nothing to measure"))
    plain.after(1, 1.0)
    assert not plain.bias
