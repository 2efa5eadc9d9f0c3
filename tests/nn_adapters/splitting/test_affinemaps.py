"""Maps of layers against the dense matrices of their modules; networks of convolutions, trained by splitting."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import nn_adapters as nna
from nn_adapters.splitting import (
    Averaged,
    Convolution,
    SplitTrainingSettings,
    StreamedLayers,
    WholeLayers,
    affinemaps,
    layersplitting,
)
from nn_adapters.splitting.splitlayers import split_layers
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.optimize.splitting import ADMM, SplitWork
from tests.helpers.splitting import never_rises

#: Modules and the shape of one sample.
MAPS = {
    "dense": ([nn.Linear(6, 4)], (6,)),
    "dense, more outputs": ([nn.Linear(3, 5, bias=False)], (3,)),
    "dense on images": ([nn.Flatten(), nn.Linear(12, 4)], (2, 3, 2)),
    "padded": ([nn.Conv2d(2, 3, 3, padding=1)], (2, 5, 4)),
    "same": ([nn.Conv2d(2, 3, (3, 1), padding="same", bias=False)], (2, 4, 4)),
    "strides": ([nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0))], (2, 6, 4)),
    "patches": ([nn.Conv2d(1, 3, 2, 2)], (1, 4, 6)),
    "patches, more outputs": ([nn.Conv2d(1, 5, 2, 2)], (1, 4, 4)),
    "patches that leave a row": ([nn.Conv2d(2, 3, (2, 3), (2, 3))], (2, 5, 7)),
    "pixels": ([nn.Conv2d(3, 2, 1)], (3, 3, 4)),
    "averages, padded": ([nn.AvgPool2d(2), nn.Conv2d(2, 3, 3, padding=1)], (2, 6, 7)),
    "averages of averages, dense": ([nn.AvgPool2d((1, 2)), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)], (2, 5, 4)),
}


@pytest.fixture(params=MAPS, scope="module")
def case(request):
    """Map, its modules, weights, states, and the dense matrix T of its linear part, by its columns."""
    torch.manual_seed(0)
    modules, shape = MAPS[request.param]
    net = nn.Sequential(*modules).double()
    ends = [nn.ReLU(), nn.Flatten(), nn.Linear(1, 1)]
    map = split_layers(nn.Sequential(net, *ends))[0].map
    a = torch.randn(5, *shape, dtype=torch.float64)
    units = torch.eye(a[0].numel(), dtype=torch.float64).reshape(-1, *shape)
    T = (net(units) - net(0 * units)).flatten(1).T
    return map, net, map.read(), a, T.detach()


def test_maps_are_those_of_their_modules(case):
    map, net, W, a, _ = case
    m = map.apply(W, a)
    assert torch.allclose(m, net(a), rtol=0, atol=1e-13)
    rows = (map.rows(a) @ W.T).reshape(len(a), -1, map.outputs)
    assert torch.allclose(rows.transpose(1, 2).reshape(m.shape), m, rtol=0, atol=1e-13)
    assert map.shape_after(tuple(a.shape[1:])) == tuple(m.shape[1:])
    assert (map.outputs, map.inputs) == tuple(W.shape)


def test_transposes_and_solves_are_those_of_the_dense_matrix(case):
    map, _, W, a, T = case
    m = torch.randn(map.apply(W, a).shape, dtype=torch.float64)
    assert torch.allclose(map.transpose(W, m, a.shape).flatten(1), m.flatten(1) @ T, rtol=0, atol=1e-13)
    matrix = 2.0 * T.T @ T + 0.3 * torch.eye(T.shape[1]).double()
    expected = np.linalg.solve(matrix.numpy(), a.flatten(1).numpy().T).T
    work = SplitWork()
    found = accurate(map).solver(W, 2.0, 0.3, work)(a).flatten(1)
    assert np.allclose(found, expected, rtol=0, atol=1e-12)
    assert work.products + work.solves > 0


def accurate(map):
    """The map with conjugate gradients to the end."""
    if isinstance(map, Averaged):
        return replace(map, map=accurate(map.map))
    return replace(map, rtol=1e-14) if isinstance(map, Convolution) else map


def test_weights_go_back_into_their_modules(case):
    map, net, W, a, _ = case
    map.write(W + 1)
    assert torch.allclose(map.apply(W + 1, a), net(a))
    map.write(W)


def test_a_gamma_that_is_lost_in_rounding_is_named():
    map = split_layers(nn.Linear(20, 20))[0].map
    with pytest.raises(SolveFailure, match="singular to rounding"):
        map.solver(torch.ones(20, 21), 1e12, 1.0, SplitWork())


def test_conjugate_gradients_stop_where_each_sample_asks_them_to():
    """What a sample gets depends on no other, so that ranks and batches do not matter."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    map, right = Convolution(conv), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    right[2] *= 1e-6
    whole = map.solver(map.read(), 1.0, 0.1, SplitWork())(right)
    for one, alone in zip(whole, right):
        assert torch.allclose(one, map.solver(map.read(), 1.0, 0.1, SplitWork())(alone[None])[0], rtol=1e-12)
    with pytest.raises(SolveFailure, match="not finite"):
        map.solver(map.read(), 1.0, 0.1, SplitWork())(right * torch.inf)


def test_conjugate_gradients_that_do_not_end_are_named(monkeypatch):
    monkeypatch.setattr(affinemaps, "MAX_PRODUCTS", 2)
    map = Convolution(nn.Conv2d(2, 3, 3, padding=1))
    with pytest.raises(SolveFailure, match="2 products"):
        map.solver(map.read(), 1.0, 1e-3, SplitWork())(torch.randn(1, 2, 5, 5))


# --------------------------------------------------------------------------- networks


def images(count=30):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.arange(count) % 2
    x[y == 1, :, :3] += 1.0
    return x, y


def convolutions():
    """Patches, an ODE network of convolutions, averages, a convolution that overlaps, a dense layer."""
    torch.manual_seed(1)
    stack = nna.LayerStack(lambda: nna.conv(2, 3, "relu"), 2, 1.0)
    parts = [nn.Conv2d(1, 2, 1), nn.ReLU(), stack, nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(12, 2)).double()


@pytest.mark.parametrize("form", ["seed", "backward"])
def test_no_block_of_convolutions_raises_the_augmented_lagrangian(form):
    never_rises(WholeLayers(convolutions(), *images(), SplitTrainingSettings(form=form, states="random", gamma=2.0)))


@pytest.mark.parametrize("rows", [2**17, 50])
def test_weights_of_convolutions_are_least_squares_over_samples_and_positions(monkeypatch, rows):
    """Also where the rows do not fit into one piece."""
    monkeypatch.setattr(layersplitting, "ROWS", rows)
    x, y = images()
    settings = SplitTrainingSettings(
        batch=30, momentum=0.0, forgetting=0.0, ridge=0.0, step=1.0, scaling="none", ridge_share=0.0
    )
    splitting = StreamedLayers(1, convolutions(), x, y, settings)
    for block in splitting.sweep(1):
        splitting.update(block)
    a = splitting.states.start[0]
    for k, layer in enumerate(splitting.layers, start=1):
        z = splitting.states.z[k].movedim(1, -1).reshape(-1, layer.outputs)
        expected = np.linalg.lstsq(layer.map.rows(a[k - 1]).numpy(), z.numpy(), rcond=None)[0].T
        assert np.allclose(splitting.W[k - 1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["streaming", "seed"])
def test_convolutions_of_one_pixel_are_dense_layers(form):
    x, y = (each[:, :4] if each.dim() > 1 else each for each in images())
    x = x.flatten(1)[:, :4]
    found = []
    for kind, shape in ((nn.Linear, (4,)), (lambda n, m: nn.Conv2d(n, m, 1), (4, 1, 1))):
        torch.manual_seed(1)
        dense = [nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)]
        net = nn.Sequential(kind(4, 6), nn.ReLU(), kind(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(5, 2)).double()
        for layer, like in zip((net[0], net[2], net[5]), dense):
            layer.load_state_dict({k: v.reshape(getattr(layer, k).shape) for k, v in like.state_dict().items()})
        words = net, x.reshape(-1, *shape), y, SplitTrainingSettings(form=form, batch=10, step=1.0)
        splitting = StreamedLayers(5, *words) if form == "streaming" else WholeLayers(*words)
        found.append(ADMM(splitting, max_it=5, multipliers=form == "seed", rtol=0.0).solve().design)
    assert torch.allclose(*found, rtol=0, atol=1e-12)


def test_a_network_of_convolutions_learns_from_a_stream():
    x, y = images(300)
    net = convolutions()
    splitting = StreamedLayers(20, net, x, y, SplitTrainingSettings(batch=100))
    ADMM(splitting, max_it=20, multipliers=False, rtol=0.0).solve()
    assert float((net(x).argmax(1) == y).double().mean()) > 0.93


def shrinking():
    return nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())


@pytest.mark.parametrize(
    "modules, match",
    [
        ([nn.Conv2d(2, 4, 3, groups=2)], "groups 1"),
        ([nn.Conv2d(1, 4, 3, dilation=2)], "dilation 1"),
        ([nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")], "by zeros"),
        ([nn.Conv2d(1, 4, 2, padding="same")], "odd kernel"),
        ([nn.Conv2d(3, 4, 3)], r"\(3, height, width\)"),
        ([nn.Conv2d(1, 4, 7)], "as large as the kernel"),
        ([nn.MaxPool2d(2), nn.Conv2d(1, 4, 3)], "MaxPool2d.*AvgPool2d"),
        ([nn.AvgPool2d(3, 2), nn.Conv2d(1, 4, 3)], "do not overlap"),
        ([nn.AvgPool2d(7), nn.Conv2d(1, 4, 1)], "averages"),
        ([nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 4)], "Flatten between"),
        ([shrinking(), nna.LayerStack(lambda: nna.dense(4, "relu"), 2), nn.Linear(4, 4)], "Flatten between"),
        ([nn.Flatten(2), nn.Linear(36, 4)], r"Flatten\(\)"),
        ([nn.Conv2d(1, 4, 3), nn.AvgPool2d(2)], "Linear, Conv2d"),
        (
            [nna.LayerStack(lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()), 1), nn.Conv2d(1, 2, 1)],
            "of a LayerStack",
        ),
        ([nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(60, 2)], "got 64"),
    ],
)
def test_images_that_cannot_be_split_are_refused(modules, match):
    net = nn.Sequential(*modules, nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)).double()
    with pytest.raises(InputError, match=match):
        WholeLayers(net, *images())
