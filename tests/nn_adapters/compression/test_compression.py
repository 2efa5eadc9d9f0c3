"""Smaller layers against theorems: least errors, full rank, counted bytes; a tolerance on the accuracy is kept."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import pdeopt as po
from nn_adapters.compression import (
    InputMoments,
    LowRankLayers,
    Pruning,
    Quantization,
    accuracy,
    compress,
    compressible,
    fgsm,
    input_moments,
    multiplications,
    stored,
    stored_bytes,
)

LAYERS = {
    "dense": (lambda: nn.Linear(30, 20), (30,)),
    "dense, no bias": (lambda: nn.Linear(12, 24, bias=False), (12,)),
    "convolution": (lambda: nn.Conv2d(4, 12, 3, stride=2, padding=1), (4, 9, 9)),
    "wide convolution": (lambda: nn.Conv2d(6, 8, (3, 5), padding=(1, 2), dilation=(2, 1)), (6, 8, 8)),
    "same": (lambda: nn.Conv2d(5, 9, 3, padding="same", padding_mode="circular", bias=False), (5, 6, 6)),
}
HOW = {
    "low rank": LowRankLayers(),
    "channels": LowRankLayers(split="channels"),
    "space": LowRankLayers(split="space"),
    "plain low rank": LowRankLayers(moments=False),
    "pruning": Pruning(),
    "quantization": Quantization(),
}


def layer_and_samples(name, samples=200):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    mixed = torch.randn(shape).numel()
    x = torch.randn(samples, mixed) @ torch.randn(mixed, mixed) / mixed**0.5 + 0.5
    return make().double(), x.reshape(samples, *shape).double()


@torch.no_grad()
def measured_error(layer, other, x):
    """Relative root mean square of the change of the outputs; means are taken off where a bias can give them."""
    a, b = (net(x).flatten(2).transpose(1, 2).flatten(0, 1) if x.dim() > 2 else net(x) for net in (layer, other))
    whole = a - a.mean(0) if layer.bias is not None else a
    return float((a - b).norm() / whole.norm())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", LAYERS)
def test_the_error_of_a_level_is_that_of_the_outputs(name, how):
    layer, x = layer_and_samples(name)
    way = HOW[how]
    levels = way.levels(layer, input_moments(layer, x)[""])
    sizes, errors = [level.nbytes for level in levels], [level.error for level in levels]
    assert sizes == sorted(set(sizes)) and errors == sorted(errors, reverse=True) and errors[-1] == 0.0
    for level in levels[:: max(1, len(levels) // 4)]:
        made = level.make()
        assert stored_bytes(made) == level.nbytes
        if way.moments:
            assert measured_error(layer, made, x) == pytest.approx(level.error, rel=1e-6, abs=1e-7)


def test_low_rank_without_moments_is_the_truncated_decomposition():
    layer, _ = layer_and_samples("dense")
    s = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False)
    for rank, level in enumerate(LowRankLayers(moments=False).candidates(layer, InputMoments.unknown(layer)), 1):
        first, last = level.make()
        change = layer.weight - last.weight @ first.weight
        assert float(change.detach().norm()) == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-6, abs=1e-12)
        assert level.error == pytest.approx(np.linalg.norm(s[rank:]) / np.linalg.norm(s), rel=1e-6, abs=1e-7)


def test_with_moments_no_matrix_of_that_rank_is_closer():
    layer, x = layer_and_samples("dense")
    aware, plain = (LowRankLayers(moments).levels(layer, input_moments(layer, x)[""])[4] for moments in (True, False))
    assert aware.name == plain.name
    best = measured_error(layer, aware.make(), x)
    assert best < 0.9 * measured_error(layer, plain.make(), x)
    made = aware.make()
    for seed in range(5):  # the same rank, a little aside
        torch.manual_seed(seed)
        other = copy.deepcopy(made)
        with torch.no_grad():
            for p in other.parameters():
                p += 1e-3 * torch.randn_like(p)
        assert measured_error(layer, other, x) > best


@pytest.mark.parametrize("split", ["channels", "space"])
@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_is_the_same_layer(name, split):
    layer, x = layer_and_samples(name)
    made = LowRankLayers(split=split).candidates(layer, input_moments(layer, x)[""])[-1].make()
    assert torch.allclose(made(x), layer(x), rtol=0, atol=1e-9)


# -- stored forms ----------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_entries_that_are_stored():
    layer = nn.Linear(30, 20)
    W = layer.weight.detach().clone()
    W[W.abs() < W.abs().median()] = 0.0
    kept, bias = int((W != 0).sum()), 4 * 20
    assert stored_bytes(layer) == 4 * 600 + bias
    assert stored_bytes(stored(layer, W, None)) == 4 * kept + 600 // 8 + bias
    for bits in (2, 4, 8):
        assert stored_bytes(stored(layer, layer.weight.detach(), None, bits)) == 600 * bits // 8 + 4 * 20 + bias
    assert stored_bytes(stored(layer, W, None, 8)) == kept + 600 // 8 + 4 * 20 + bias
    assert stored_bytes(stored(layer, W, None, 2)) == 600 * 2 // 8 + 4 * 20 + bias  # a mask would not pay


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dense", [True, False])
def test_entries_that_are_multiples_of_a_scale_come_back(bits, dense):
    layer, most = nn.Conv2d(3, 5, 3), 2 ** (bits - 1) - 1
    torch.manual_seed(bits)
    codes = torch.randint(-most, most + 1, layer.weight.shape)
    if not dense:
        codes *= torch.rand(codes.shape) < 0.2
    codes[:, 0, 0, 0] = most  # the largest of each row
    W = 0.25 * codes
    assert torch.equal(stored(layer, W, None, bits).weight, W)


def test_a_row_of_zeros_and_a_network_that_is_read_again():
    network = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        network[0].weight[2] = 0.0
    x = torch.randn(50, 8)
    found = compress(network, Quantization(bits=(4,)), lambda net: 1.0, 0.0, x).network
    assert torch.equal(found[0].weight[2], torch.zeros(8))
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    other = compress(nn.Sequential(*map(copy.deepcopy, network)), Quantization(bits=(4,)), lambda net: 1.0, 0.0).network
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), found(x))


def test_pruned_weights_are_trained_and_codes_are_not():
    layer, x = nn.Linear(30, 20), torch.randn(10, 30)
    pruned, coded = (how.levels(layer)[0].make() for how in (Pruning(), Quantization()))
    for made, trained in ((pruned, True), (coded, False)):
        made(x).square().sum().backward()
        entries = made.parametrizations.weight
        first = entries.original if trained else entries.original0
        assert (first.grad is not None) == trained and made.bias.grad is not None
    zeros = pruned.weight == 0
    with torch.no_grad():
        pruned.parametrizations.weight.original += 1.0
    assert torch.equal(pruned.weight == 0, zeros)


# -- networks --------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer that is called twice, and under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(48, 3)
        self.again = self.layer

    def forward(self, x):
        x = torch.relu(self.layer(torch.relu(self.first(x))))
        return self.last(torch.relu(self.again(x)))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    x = torch.randn(600, 16)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1)
    network = Twice()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network, x, y


@pytest.mark.parametrize("how", HOW)
def test_the_tolerance_is_kept_and_the_network_stays(how, trained):
    network, x, y = trained
    before = copy.deepcopy(network.state_dict())
    found = compress(network, HOW[how], lambda net: accuracy(net, x, y), 0.02, x)
    assert found.before - 0.02 <= found.accuracy == accuracy(found.network, x, y)
    assert found.nbytes == stored_bytes(found.network) < stored_bytes(network)
    assert found.network.layer is found.network.again and network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_training_brings_back_what_went_beyond_the_tolerance(trained):
    network, x, y = trained

    def tune(net):
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()

    plain, tuned = (compress(network, LowRankLayers(), lambda n: accuracy(n, x, y), 0.01, x, t) for t in (None, tune))
    assert tuned.nbytes < plain.nbytes and tuned.accuracy >= tuned.before - 0.01
    assert multiplications(tuned.network, x) < multiplications(network, x) == 16 * 48 + 2 * 48 * 48 + 48 * 3


def test_a_network_that_nothing_can_be_taken_from_stays(trained):
    network = trained[0]
    calls = iter([1.0] + [0.0] * 1000)
    found = compress(network, LowRankLayers(), lambda net: next(calls), 0.5)
    assert found.network is network and found.accuracy == 1.0 and found.nbytes == stored_bytes(network)


class Encoder(nn.Module):
    """A layer of PyTorch that looks at the weights of its layers, and calls them without their modules."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.layer(x).mean(1))


@pytest.mark.parametrize("how", ["low rank", "pruning", "quantization"])
def test_modules_that_look_into_their_layers_still_work(how):
    torch.manual_seed(0)
    network, x = Encoder(), torch.randn(20, 5, 16)
    y = network.eval()(x).argmax(1).detach()
    found = compress(network, HOW[how], lambda net: accuracy(net, x, y), 0.2, x)
    assert found.nbytes < stored_bytes(network) and accuracy(found.network, x, y) == found.accuracy >= 0.8


# -- attacks ---------------------------------------------------------------------------------------------------


def test_the_loss_grows_by_the_size_times_the_gradients_1_norm(trained):
    network, x, y = trained
    network, x = copy.deepcopy(network).double(), x.double()
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(network(leaf), y)
    slope = float(torch.autograd.grad(loss, leaf)[0].abs().sum())
    network.zero_grad()
    for size in (1e-4, 1e-5):
        moved = fgsm(network, x, y, size)
        assert float((moved - x).abs().max()) == pytest.approx(size)
        rise = float((nn.functional.cross_entropy(network(moved), y) - loss).detach())
        assert rise == pytest.approx(size * slope, rel=200 * size)
    assert all(p.grad is None for p in network.parameters())
    assert accuracy(network, fgsm(network, x, y, 0.3), y) < accuracy(network, x, y) - 0.1
    low, high = fgsm(network, x, y, 0.3, (-1.0, 1.0)).aminmax()
    assert low >= -1.0 and high <= 1.0


# -- bad input -------------------------------------------------------------------------------------------------


def tied():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    return network


@pytest.mark.parametrize(
    "what, message",
    [
        (lambda: compress(nn.ReLU(), LowRankLayers(), lambda net: 1.0, 0.1), "at least one Linear"),
        (lambda: compressible(tied()), "parameters of its own"),
        (lambda: compress(nn.Linear(4, 4), LowRankLayers(), lambda net: 1.0, -0.1), "tolerance.*>= 0"),
        (lambda: compress(nn.Linear(4, 4), LowRankLayers(), lambda net: float("nan"), 0.1), "accuracy.*finite"),
        (lambda: compress(nn.Linear(4, 4), LowRankLayers(), lambda net: 1.0, 0.1, torch.zeros(0, 4)), "at least 1"),
        (lambda: LowRankLayers(split="time"), r"channels \| space \| best"),
        (lambda: Pruning(densities=(1.0,)), "between 0 and 1"),
        (lambda: Quantization(bits=(3,)), r"\(2, 4, 8\)"),
        (lambda: fgsm(nn.Linear(4, 4), torch.zeros(2, 4), torch.zeros(2).long(), -1.0), "size.*>= 0"),
        (lambda: accuracy(nn.Linear(4, 4), torch.zeros(0, 4), torch.zeros(0)), "at least 1"),
    ],
)
def test_bad_input_is_named(what, message):
    with pytest.raises(po.InputError, match=message):
        what()


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(po.SolveFailure, match="not finite"):
        input_moments(nn.Linear(4, 4), torch.full((3, 4), torch.nan))
