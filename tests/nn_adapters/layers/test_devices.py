"""Networks on another device than the host's: all stays there, and no cycle waits for it.

The device is PyTorch's "meta", which any machine has: its tensors have shapes and no numbers, so that an `item()`, a
branch on a value, or a copy to the host is an error. What mixes devices is seen operation by operation.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nn_adapters.layers import layer_mgrit
from nn_adapters.layers.blocks import conv, dense
from nn_adapters.layers.layerlist import LayerList
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parts.attention import EncoderBlock
from nn_adapters.layers.recurrent import GRUParallel
from pdeopt.steps.mgrit import Mgrit

WORDS = {"coarsening": "2", "adjoint_cycles": 1, "serial": "never"}


class DeviceWatch(TorchDispatchMode):
    """Notes the operations that have tensors of the host and of the device, but for numbers."""

    def __init__(self):
        super().__init__()
        self.mixed = []

    def __torch_dispatch__(self, function, types, args=(), words=None):
        tensors = [t for t in tree_leaves((args, words or {})) if isinstance(t, torch.Tensor)]
        if {t.device.type for t in tensors if t.dim() or t.is_meta} == {"cpu", "meta"}:
            self.mixed.append(str(function))
        return function(*args, **(words or {}))


def parallel(block, layers=5):
    return LayerParallel(None, block, layers, **WORDS)


def noisy():
    return nn.Sequential(conv(2), nn.BatchNorm2d(2), nn.Dropout(0.1))


def unlike():
    blocks = [lambda: dense(4), lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Dropout(0.1))]
    return LayerList(None, blocks * 3, **WORDS)


CASES = {
    "dense": (lambda: parallel(lambda: dense(4)), (6, 4)),
    "batch norm and dropout": (lambda: parallel(noisy), (3, 2, 5, 5)),
    "attention": (lambda: parallel(lambda: EncoderBlock(4, 2, 8, 0.1, True)), (2, 3, 4)),
    "by vmap": (lambda: parallel(lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU())), (6, 4)),
    "in series": (lambda: LayerParallel(None, noisy, 4, levels=1), (3, 2, 5, 5)),
    "unlike": (unlike, (6, 4)),
    "units": (lambda: GRUParallel(None, 3, 4, 6, 1, coarsening="2", adjoint_cycles=1), (5, 6, 3)),
}


@pytest.fixture
def waits(monkeypatch):
    """How often a solve has asked for a number, which it may do once, after its last run: the misfit."""
    found = []
    monkeypatch.setattr(Mgrit, "_misfit", lambda *arguments: float(bool(found.append("misfit"))))
    monkeypatch.setattr(layer_mgrit, "roughness", lambda *arguments: float(bool(found.append("roughness"))))
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "attention")) for n in CASES])
def test_all_stays_on_the_device_and_no_cycle_waits_for_it(name, waits):
    make, shape = CASES[name]
    network = make().to("meta")
    with DeviceWatch() as watch:
        value = network(torch.empty(shape, device="meta"))
        value.square().sum().backward()
    assert value.is_meta and all(parameter.grad.is_meta for parameter in network.parameters())
    assert not watch.mixed
    assert waits.count("misfit") <= 2 and waits.count("roughness") <= 1


class Adds(nn.Linear):
    def forward(self, u):
        return super().forward(u) + torch.zeros(4)


class Asks(nn.Linear):
    def forward(self, u):
        return super().forward(u) * u.detach().abs().max().item()


def test_the_watch_sees_what_mixes_devices_and_what_waits(waits):
    with DeviceWatch() as watch, pytest.raises(RuntimeError, match="device"):
        parallel(lambda: Adds(4, 4)).to("meta")(torch.empty(6, 4, device="meta"))
    assert any("add" in name for name in watch.mixed)
    with pytest.raises(RuntimeError, match="meta"):
        parallel(lambda: Asks(4, 4)).to("meta")(torch.empty(6, 4, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that PyTorch can use")
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_has_the_numbers_of_the_host(name):
    make, shape = CASES[name]
    x, found = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double(), []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = make().double().to(device)
        torch.manual_seed(1)
        value = network(x.to(device))
        value.square().sum().backward()
        found.append([value.detach().cpu(), *(parameter.grad.cpu() for parameter in network.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
