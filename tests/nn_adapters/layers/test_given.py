"""Dropout, further arguments, and transformer layers in depth-parallel networks."""

import copy

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import Direct
from nn_adapters.layers.layerlist import LayerList
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import exactly, measure_bias
from nn_adapters.layers.parts.attention import EncoderBlock, later_tokens
from nn_adapters.layers.parts.dropout import drop, layer_keys
from pdeopt.core.errors import InputError

TO_CONVERGENCE = {"coarsening": "2", "cycles": 4, "adjoint_cycles": 4, "serial": "never"}


def network(block, layers=8, **words):
    torch.manual_seed(0)
    return LayerParallel(None, block, layers, 2.0, **{**TO_CONVERGENCE, **words}).double()


def value_and_gradients(net, x, *args, seed=3):
    torch.manual_seed(seed)
    leaves = [x.detach().requires_grad_(), *net.parameters()]
    value = net(leaves[0], *args)
    return [value, *torch.autograd.grad(value.square().sum(), leaves)]


def assert_close(found, expected, tol=1e-10):
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=tol * (1 + float(b.detach().abs().max())))


class Mixed(nn.Module):
    """A block that goes through vmap, with dropout in two places."""

    def __init__(self):
        super().__init__()
        self.linear, self.first, self.second = nn.Linear(6, 6), nn.Dropout(0.3), nn.Dropout(0.3)

    def forward(self, u, scale=None):
        u = self.second(torch.tanh(self.linear(self.first(u))).roll(1, -1))
        return u if scale is None else u * scale


BLOCKS = {
    "sequential": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.4)),
    "vmap": Mixed,
    "encoder": lambda: EncoderBlock(6, 2, 10, dropout=0.2, causal=True),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_dropout_is_the_same_in_cycles_and_in_series(block):
    net, x = network(BLOCKS[block]), torch.randn(3, 5, 6, dtype=torch.float64)
    found = value_and_gradients(net, x)
    with exactly(net):
        expected = value_and_gradients(net, x)
        other = value_and_gradients(net, x, seed=4)
    assert_close(found, expected)
    assert float((other[0] - expected[0]).abs().max()) > 1e-3
    assert measure_bias(net, lambda: net(x).square().sum()) < 1e-9
    net.eval()
    torch.testing.assert_close(net(x), net.serial()(x), rtol=0, atol=1e-12)
    assert isinstance(next(m for m in net.serial().modules() if "Dropout" in type(m).__name__), nn.Dropout)
    assert_close(value_and_gradients(copy.deepcopy(net).train(), x), expected)


def test_masks_have_their_share_and_are_unrelated():
    keys, x = layer_keys(5, torch.arange(4)), torch.ones(4, 200, 100)
    kept = drop(x, 0.3, keys, 1) > 0
    assert abs(float(kept.double().mean()) - 0.7) < 5e-3 and abs(float(drop(x, 0.3, keys, 1).mean()) - 1.0) < 0.01
    others = [drop(x, 0.3, keys, 2) > 0, drop(x, 0.3, layer_keys(6, torch.arange(4)), 1) > 0, kept.roll(1, 0)]
    others += [kept.roll(1, 1), kept.roll(1, 2)]
    for other in others:  # independent masks agree in 0.7^2 + 0.3^2 of their entries
        assert abs(float((kept == other).double().mean()) - 0.58) < 0.01
    assert torch.equal(drop(x[2], 0.3, keys[2], 1), drop(x, 0.3, keys, 1)[2])


@pytest.mark.parametrize(
    "words", [{}, {"norm_first": True}, {"batch_first": True, "activation": "gelu"}, {"bias": False}]
)
def test_transformer_layers_are_those_of_pytorch(words):
    block = lambda: Direct(nn.TransformerEncoderLayer(6, 2, 10, 0.0, **words))  # noqa: E731
    net, x = network(block, 5, levels=1), torch.randn(4, 3, 6, dtype=torch.float64)
    tokens, batch = (3, 4) if words.get("batch_first") else (4, 3)
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[1, 2:] = True
    per_head = later_tokens(tokens).expand(2 * batch, tokens, tokens)
    for args in ((), (later_tokens(tokens),), (None, padding), (per_head, padding)):
        found, expected = net(x, *args), net.serial()(x, *args)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class Gated(nn.Module):
    """tanh(W u) times a gate, at `shift`."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, u, gate=None, shift=0.0):
        out = torch.tanh(self.linear(u) + shift)
        return out if gate is None else gate * out


class Shifted(Gated):
    def forward(self, u, shift=0.0, gate=None):
        return super().forward(u, gate, shift)


class Keyword(Gated):
    def forward(self, u, *, gate=None):
        return super().forward(u, gate)


def test_arguments_by_name_are_those_by_position():
    x, gate = torch.randn(3, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    direct = network(lambda: Direct(Gated()), 5)
    alike = LayerList(None, [Gated] * 4, 1.0).double()
    for net in (direct, direct.serial(), alike, alike.serial()):
        torch.testing.assert_close(net(x, shift=0.5, gate=gate), net(x, gate, 0.5), rtol=0, atol=1e-14)
        with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
            net(x, mask=gate)
    with pytest.raises(InputError, match="places that differ"):
        LayerList(None, [Gated, Shifted], 1.0).double()(x, gate=gate)
    with pytest.raises(InputError, match="gate by keyword alone"):
        network(Keyword)(x, gate=gate)


def test_the_hint_of_a_mask_is_none_without_it():
    net = network(lambda: Direct(nn.TransformerEncoderLayer(6, 2, 10, 0.0)), 4)
    x, mask = torch.randn(4, 3, 6, dtype=torch.float64), later_tokens(4)
    torch.testing.assert_close(net(x, mask, is_causal=True), net(x, mask), rtol=0, atol=1e-14)
    with pytest.raises((InputError, RuntimeError), match="is_causal"):
        net(x, is_causal=True)


def test_arguments_get_gradients():
    net, x = network(Mixed), torch.randn(5, 6, dtype=torch.float64)
    net.eval()
    scale = torch.rand(6, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(net(x, scale).square().sum(), [scale, *net.parameters()])
    serial = net.serial()
    expected = torch.autograd.grad(serial(x, scale).square().sum(), [scale, *serial.parameters()])
    assert_close(found[:1], expected[:1])
    net.train()
    assert torch.autograd.grad(net(x, scale).sum(), scale)[0].shape == scale.shape


def test_a_causal_network_does_not_see_what_comes_later():
    net, x = network(lambda: EncoderBlock(6, 2, 10, causal=True), 4), torch.randn(2, 7, 6, dtype=torch.float64)
    other = x.clone()
    other[:, 4, 0] += 1.0
    changed = (net(x) - net(other)).abs().amax((0, 2)) > 1e-12
    assert changed.tolist() == [False] * 4 + [True] * 3
