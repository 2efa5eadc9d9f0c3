"""Kronecker factors against those of curvlinops-for-pytorch, where that is installed (3.0.1 was)."""

import pytest
import torch
from torch import nn

from nn_adapters.curvature.factors import KroneckerFactors
from nn_adapters.curvature.layers import curved_layers
from nn_adapters.curvature.likelihoods import CrossEntropy, SquaredError
from nn_adapters.curvature.products import by_layer, flat
from tests.helpers.support import relative

curvlinops = pytest.importorskip("curvlinops")

NETWORKS = {
    "dense": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3)
        ),
        (2, 6, 6),
    ),
    "sequence": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)), (5, 3)),
}


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_equal(name, squared, kind):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network, x = make().double(), torch.randn(7, *shape, dtype=torch.float64)
    # theirs of a mean squared error is over entries, with no half: ours is |x - y|^2 / 2 a sample
    y = torch.randn(7, 3, dtype=torch.float64) if squared else torch.arange(7) % 3
    factor = {"mean": 2 / 3, "sum": 2.0}[kind]
    ours = SquaredError(kind, factor) if squared else CrossEntropy(kind)
    theirs = nn.MSELoss(reduction=kind) if squared else nn.CrossEntropyLoss(reduction=kind)
    parameters = dict(network.named_parameters())
    words = {"fisher_type": "type-2", "separate_weight_and_bias": False, "check_deterministic": False}
    oracle = curvlinops.KFACLinearOperator(network, theirs, list(parameters.values()), [(x, y)], **words)
    layers = curved_layers(network)
    factors = KroneckerFactors(network, layers, ours)
    factors.average([(x,)])
    v = torch.randn(sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    found = factors.blocks().apply(flat(layers, _of_layers(network, layers, v)))
    expected = flat(layers, _of_layers(network, layers, oracle @ v))
    assert relative(found, expected) <= 1e-12
    assert by_layer(layers, found)


def _of_layers(network, layers, v):
    """A vector in the order of the parameters, by layers."""
    parts = dict(zip(map(id, network.parameters()), v.split([p.numel() for p in network.parameters()])))
    return [[parts[id(p)].reshape(p.shape) for p in layer.parameters] for layer in layers]
