"""Hierarchies of residual networks, and the script that trains on them."""

import json

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import dense
from nn_adapters.losses.depth import Rescaled, ResNet, depth_hierarchy, operations
from nn_adapters.losses.network import NetworkLoss
from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import FirstOrderConsistent
from pdeopt.optimize.descent.rmtr import RMTR
from problems import resnet_multilevel as script


def loss(layers, width=3, samples=20, Tf=2.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    torch.manual_seed(layers)
    network = ResNet(nn.Linear(4, width), lambda: dense(width), layers, nn.Linear(width, 2), Tf)
    return NetworkLoss(network, nn.functional.cross_entropy, x, (x[:, 0] > 0).long())


def test_a_network_of_equal_neighbors_is_half_a_step_of_its_coarse_one():
    """The prolongation of a coarse network has its weights in both layers, over the same time."""
    fine, coarse = loss(8), loss(4)
    hierarchy = depth_hierarchy([fine, coarse])
    y = coarse.parameters() * hierarchy.functions[1].scale
    fine.assign(hierarchy.transfers[0].prolong(y))
    for layer in range(8):
        own, parent = (loss.network.layers.layers[k] for loss, k in ((fine, layer), (coarse, layer // 2)))
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(own.parameters(), parent.parameters()))
    assert torch.allclose(fine.network.head.weight, coarse.network.head.weight)
    assert fine.network.layers.dt == coarse.network.layers.dt / 2


def test_levels_converge_with_their_depth():
    """Euler's error halves with the step."""
    losses = [loss(layers) for layers in (32, 16, 8)]
    hierarchy = depth_hierarchy(losses, tikhonov=0.1)
    y = losses[2].parameters() * hierarchy.functions[2].scale
    values = [hierarchy.functions[2].value(y)]
    for level in (1, 0):
        y = hierarchy.transfers[level].prolong(y)
        values.append(hierarchy.functions[level].value(y))
    assert 1.5 < (values[1] - values[0]) / (values[2] - values[1]) < 2.5


def test_coarse_models_are_consistent_and_calls_cost_their_operations():
    hierarchy = depth_hierarchy([loss(8), loss(4), loss(2)], tikhonov=1e-2)
    x = hierarchy.functions[0].function.parameters()
    g = hierarchy.value_and_gradient(x)[1]
    for function, transfer in zip(hierarchy.functions[1:], hierarchy.transfers):
        x, g = transfer.project(x), transfer.restrict(g)
        found = FirstOrderConsistent(function, x, g).value_and_gradient(x)[1]
        assert float((found - g).norm()) <= 1e-12 * float(g.norm())
    around = 4 * 3 + 3 * 2
    shares = [(around + 9 * layers) / (around + 9 * 8) for layers in (8, 4, 2)]
    assert [f.costs.gradient for f in hierarchy.functions] == pytest.approx(shares)
    assert hierarchy.tally.work == pytest.approx(shares[0] + 2 * sum(shares[1:]))
    half = loss(4).subset(torch.arange(10))
    assert operations(half) == 0.5 * operations(loss(4))
    assert depth_hierarchy([loss(8), half]).functions[1].costs.gradient == pytest.approx(0.5 * shares[1])


def test_rescaled_functions_have_the_derivatives_of_the_chain_rule():
    function = Rescaled(loss(4), torch.linspace(1.0, 2.0, loss(4).size, dtype=torch.float64), tikhonov=0.3)
    x = function.function.parameters()
    d = torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-5
    values = [function.value(x + s * h * d) for s in (1, -1)]
    gradients = [function.value_and_gradient(x + s * h * d)[1] for s in (1, -1)]
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(function.value_and_gradient(x)[1] @ d), rel=1e-7)
    assert torch.allclose((gradients[0] - gradients[1]) / (2 * h), function.hvp(x, d), atol=1e-7)
    assert function.value(x) == function.value_and_gradient(x)[0]


def test_rmtr_trains_a_hierarchy_downhill():
    hierarchy = depth_hierarchy([loss(8), loss(4), loss(2)], tikhonov=1e-3)
    result = RMTR(hierarchy, start="nested", max_it=5).minimize(hierarchy.functions[0].function.parameters())
    values = result.history["objective"]
    assert values == sorted(values, reverse=True) and values[-1] < 0.5 * values[0]


def test_networks_that_do_not_match_are_named():
    with pytest.raises(InputError, match="numbers that divide"):
        depth_hierarchy([loss(8), loss(3)])
    with pytest.raises(InputError, match="another shape"):
        depth_hierarchy([loss(8), loss(4, width=2)])
    plain = NetworkLoss(nn.Linear(4, 2), nn.functional.cross_entropy, torch.zeros(3, 4), torch.zeros(3).long())
    with pytest.raises(InputError, match="one `LayerStack`"):
        depth_hierarchy([plain, plain])


SMALL = ["-data", "digits", "-samples", "200", "-layers", "8", "-width", "8", "-opt_max_it", "4"]


@pytest.mark.parametrize("optimizer", ["rmtr", "mgopt", "tr", "lbfgs"])
def test_the_script_runs_each_optimizer(optimizer, tmp_path):
    pytest.importorskip("sklearn")
    file = tmp_path / "run.json"
    accuracy = script.main([*SMALL, "-optimizer", optimizer, "-summary", str(file)])
    summary = json.loads(file.read_text())
    assert summary["test_accuracy"] == accuracy and summary["loss"] < summary["history"]["objective"][0]
    assert summary["levels"] == (3 if optimizer in ("rmtr", "mgopt") else 1) and summary["work"] > 0
    assert len(summary["history"]["test_accuracy"]) == len(summary["history"]["work"]) == 5


@pytest.mark.parametrize(
    "words, message",
    [
        (["-levels", "5"], "at most 4 levels"),
        (["-samples", "9000"], "1 to 14"),
        (["-optimizer", "sgd"], "rmtr"),
        (["-coarse_samples", "2"], "coarse_samples"),
        (["-summery", "x"], "did you mean -summary"),
    ],
)
def test_bad_options_of_the_script_are_named(words, message):
    pytest.importorskip("sklearn")
    with pytest.raises(InputError, match=message):
        script.main([*SMALL, *words])
