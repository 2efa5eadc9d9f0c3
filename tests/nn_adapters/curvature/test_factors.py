"""Kronecker factors and Fisher products against dense matrices."""

import pytest
import torch
from torch import nn

from nn_adapters.curvature.factors import KroneckerFactors, recorded
from nn_adapters.curvature.layers import NormCurved, curved_layers
from nn_adapters.curvature.likelihoods import CrossEntropy, SquaredError
from nn_adapters.curvature.products import FisherMatrix
from nn_adapters.layers.blocks import weight_norm
from pdeopt.core.errors import InputError
from tests.helpers.curvature import dense_fisher, jacobians
from tests.helpers.support import relative


class Twice(nn.Module):
    """A layer that is called three times, and one that is called never."""

    def __init__(self):
        super().__init__()
        self.shared, self.unused, self.last = nn.Linear(3, 3), nn.Linear(2, 2), nn.Linear(3, 2)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        return self.last(x)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, (2, 3), dilation=(1, 2), padding=(1, 2), padding_mode="circular", bias=False),
        nn.Tanh(),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), (3,)),
    "convolutions": (convolutions, (2, 6, 5)),
    "shared": (Twice, (3,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)), (4, 3)),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2)
        ),
        (1, 3, 3),
    ),
}


def network_of(name, samples=5):
    torch.manual_seed(3)
    make, shape = NETWORKS[name]
    x = torch.randn(samples, *shape, dtype=torch.float64)
    network = make().double()
    network(x)  # a lazy layer finds its size
    for p in network.parameters():
        nn.init.normal_(p, std=0.5)
    return network, x


def factors_of(network, likelihood, *inputs, **words):
    factors = KroneckerFactors(network, curved_layers(network), likelihood, **words)
    factors.average([(x,) for x in inputs])
    return factors


def dense(blocks):
    return [torch.kron(g, a) for a, g in zip(blocks.A, blocks.G)]


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_add_up_to_the_gradients_of_the_samples(name):
    """sum_t g_t a_t' over positions and uses, for strides, paddings, dilations and sequences."""
    network, x = network_of(name)
    layers = curved_layers(network)
    uses = [[] for _ in layers]
    with recorded(layers, uses):
        outputs = network(x).flatten(1)
    made = [y for each in uses for _, y in each]
    g = iter(torch.autograd.grad(outputs[:, 1].sum(), made))
    expected = iter(jacobians(network, x)[:, 1].split([m * n for m, n in (layer.shape for layer in layers)], 1))
    for layer, each in zip(layers, uses):
        V = torch.zeros(len(x), *layer.shape, dtype=torch.float64)
        for a, _ in each:
            if isinstance(layer, NormCurved):
                V += layer.gradients(layer.inputs(a), next(g))[:, :, None]
            else:
                V += torch.einsum("stm,stn->smn", layer.derivatives(next(g)), layer.inputs(a))
        assert relative(V.flatten(1), next(expected)) <= 1e-13 or layer.name == "unused"


@pytest.mark.parametrize("likelihood", [CrossEntropy(), SquaredError(), SquaredError("sum", 0.3)])
@pytest.mark.parametrize("name", ["linear", "shared"])
def test_one_sample_and_one_use_is_the_fisher_matrix_itself(likelihood, name):
    network, x = network_of(name, samples=1)
    F = dense_fisher(network, likelihood, x)
    blocks = factors_of(network, likelihood, x).blocks()
    diagonal, begin = [], 0
    for size in blocks.sizes:
        diagonal.append(F[begin : begin + size, begin : begin + size])
        begin += size
    for layer, found, expected in zip(curved_layers(network), dense(blocks), diagonal):
        assert layer.name == "shared" or relative(found, expected) <= 1e-12 or (not expected.any() and not found.any())


def test_positions_of_a_linear_network_with_a_loss_at_each_are_exact():
    """Eschenhagen et al. 2023, proposition 1: with derivatives that do not depend on the samples, G (x) A is exact."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    F, blocks = dense_fisher(network, SquaredError(), x), factors_of(network, SquaredError(), x).blocks()
    first = blocks.sizes[0]
    assert relative(dense(blocks)[0], F[:first, :first]) <= 1e-12
    assert relative(dense(blocks)[1], F[first:, first:]) <= 1e-12


@pytest.mark.parametrize("likelihood", [CrossEntropy(), SquaredError(factor=2.0)])
def test_normalizations_have_their_exact_block(likelihood):
    network, x = network_of("norms")
    F, blocks = dense_fisher(network, likelihood, x), factors_of(network, likelihood, x).blocks()
    begin = 0
    for layer, found, size in zip(curved_layers(network), dense(blocks), blocks.sizes):
        if isinstance(layer, NormCurved):
            assert relative(found, F[begin : begin + size, begin : begin + size]) <= 1e-12
        begin += size


def test_a_convolution_is_the_sum_over_the_patches_that_it_sees():
    """A and G by loops: A the mean over samples and positions of (patch, 1), G the sum over positions."""
    network, x = network_of("convolutions")
    conv = network[0]
    blocks = factors_of(network, CrossEntropy(), x).blocks()
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    rows = [
        torch.cat([padded[s, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].reshape(-1), torch.ones(1).double()])
        for s in range(len(x))
        for i in range(3)
        for j in range(3)
    ]
    A = sum(torch.outer(row, row) for row in rows) / len(rows)
    made = conv(x).detach().requires_grad_()
    p = network[1:](made.clone())
    q = p.detach().softmax(1)
    G = torch.zeros(3, 3, dtype=torch.float64)
    for c in range(3):
        column = torch.stack([q[s, c].sqrt() * (torch.eye(3).double()[c] - q[s]) for s in range(len(x))])
        (g,) = torch.autograd.grad(p, made, column, retain_graph=True)
        G += sum(torch.outer(g[s, :, i, j], g[s, :, i, j]) for s in range(len(x)) for i in range(3) for j in range(3))
    assert relative(blocks.A[0], A) <= 1e-13 and relative(blocks.G[0], G / len(x)) <= 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_means_sums_and_parts_of_a_batch(name):
    network, x = network_of(name)
    mean, total = (factors_of(network, CrossEntropy(kind), x).blocks() for kind in ("mean", "sum"))
    split = factors_of(network, CrossEntropy("sum"), x[:2], x[2:]).blocks()
    v = torch.randn(mean.size, dtype=torch.float64)
    assert relative(total.apply(v), len(x) * mean.apply(v)) <= 1e-12
    assert relative(split.apply(v), total.apply(v)) <= 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_products_with_the_fisher_matrix(name):
    network, x = network_of(name)
    for likelihood in (CrossEntropy(), SquaredError("sum")):
        F = dense_fisher(network, likelihood, x)
        product = FisherMatrix(network, curved_layers(network), likelihood, [(x[:2],), (x[2:],)])
        v, w = torch.randn(2, len(F), dtype=torch.float64)
        assert relative(product.times(v), F @ v) <= 1e-12
        V = torch.stack([v, w])
        assert relative(product.gram([v, w]), V @ F @ V.T) <= 1e-12


@pytest.mark.parametrize("likelihood", [CrossEntropy(smoothing=0.1), SquaredError(factor=0.7)])
def test_the_four_forms_of_the_outputs_matrix(likelihood):
    torch.manual_seed(1)
    outputs, v = torch.randn(2, 1, 3, dtype=torch.float64)
    target = torch.tensor([1]) if isinstance(likelihood, CrossEntropy) else torch.zeros(1, 3).double()
    H = torch.func.hessian(lambda o: likelihood.each(o[None], target).sum())(outputs[0])
    columns = torch.cat(likelihood.columns(outputs))
    assert relative(columns.T @ columns, H) <= 1e-14
    assert relative(likelihood.times(outputs, v)[0], H @ v[0]) <= 1e-14
    drawn = likelihood.sample(outputs.expand(40_000, 3), torch.Generator().manual_seed(0))
    assert relative(drawn.T @ drawn / len(drawn), H) <= 0.03
    expected = torch.func.grad(lambda o: likelihood.each(o[None], target).sum())(outputs[0])
    assert relative(likelihood.gradient(outputs, target)[0], expected) <= 1e-14


def test_the_empirical_matrix_is_of_the_gradients():
    network, x = network_of("linear", samples=1)
    loss, y = CrossEntropy(), torch.tensor([2])
    factors = KroneckerFactors(network, curved_layers(network), loss, "empirical")
    factors.average([(x,)], [y])
    g = torch.autograd.grad(loss(network(x), y), network[2].weight)[0].reshape(-1)
    assert relative(dense(factors.blocks())[1], torch.outer(g, g)) <= 1e-12
    with pytest.raises(InputError, match="targets"):
        factors.average([(x,)])


def test_averages_are_without_the_bias_of_their_start():
    network, x = network_of("linear")
    factors = factors_of(network, CrossEntropy(), x)
    once = factors.blocks()
    for _ in range(3):
        factors.average([(x,)], forget=0.9)
    assert relative(factors.blocks().apply(v := torch.randn(once.size).double()), once.apply(v)) <= 1e-13


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: nn.Sequential(nn.Embedding(3, 2)), "Embedding"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "2 groups"),
        (lambda: nn.Sequential(nn.Tanh(), weight_norm(nn.Linear(2, 2))), "layer 1: got a parametrized weight"),
        (lambda: nn.Sequential(nn.Tanh()), "without parameters"),
    ],
)
def test_layers_without_a_block_are_named(make, words):
    with pytest.raises(InputError, match=words):
        curved_layers(make())


def test_frozen_layers_and_tied_parameters():
    network = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    assert [layer.name for layer in curved_layers(network)] == ["1"]
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="layer 0 has, too"):
        curved_layers(tied)
