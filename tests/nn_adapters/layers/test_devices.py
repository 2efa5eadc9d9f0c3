"""Networks on another device than the host's: all stays there, and no cycle waits for it; in a CUDA graph nothing does.

The device is PyTorch's "meta", which any machine has: its tensors have shapes and no numbers, so that an `item()`, a
branch on a value, or a copy to the host is an error. What mixes devices is seen operation by operation.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nn_adapters.layers.blocks import conv, dense
from nn_adapters.layers.layerlist import LayerList
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parts.attention import EncoderBlock
from nn_adapters.layers.recurrent import GRUParallel
from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import Outcome
from tests.helpers.graphs import inside_a_graph

WORDS = {"coarsening": "2", "adjoint_cycles": 1, "serial": "never"}


class DeviceWatch(TorchDispatchMode):
    """Notes the operations that have tensors of the host and of the device, but for numbers, and what goes there."""

    def __init__(self):
        super().__init__()
        self.mixed, self.sent = [], []

    def __torch_dispatch__(self, function, types, args=(), words=None):
        tensors = [t for t in tree_leaves((args, words or {})) if isinstance(t, torch.Tensor)]
        if {t.device.type for t in tensors if t.dim() or t.is_meta} == {"cpu", "meta"}:
            self.mixed.append(str(function))
        result = function(*args, **(words or {}))
        is_from_host = bool(tensors) and not any(t.is_meta for t in tensors)
        if is_from_host and any(t.is_meta for t in tree_leaves(result) if isinstance(t, torch.Tensor)):
            self.sent.append(str(function))
        return result


def parallel(block, layers=5, **more):
    return LayerParallel(None, block, layers, **WORDS, **more)


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
    "units": (lambda: GRUParallel(None, 3, 4, 6, 1, coarsening="2", adjoint_cycles=1, serial="never"), (5, 6, 3)),
}


@pytest.fixture
def waits(monkeypatch):
    """How often a solve has asked for a number, which it may do once, after its last run: the misfit."""
    found = []

    def misfit(outcome):
        if outcome.gap is not None:
            found.append("misfit")
        return 0.0

    monkeypatch.setattr(Outcome, "misfit", property(misfit))
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
    assert len(waits) <= 2  # the states' and the adjoints'


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "attention")) for n in CASES])
def test_in_a_cuda_graph_nothing_waits_and_nothing_goes_to_the_device(name, waits):
    make, shape = CASES[name]
    network, x = make().to("meta"), torch.empty(shape, device="meta")
    network(x).square().sum().backward()  # the call before the capture, which PyTorch asks for
    waits.clear()
    with inside_a_graph(), DeviceWatch() as watch:
        network(x).square().sum().backward()
    assert not (waits or watch.mixed or watch.sent)
    gaps = [gap for solver in network.solvers for _, gap in solver.captured]
    assert len(gaps) == (0 if name == "in series" else 2) and all(gap.is_meta for gap in gaps)


def test_steps_that_learn_stay_on_the_device_and_are_no_part_of_a_cuda_graph(waits):
    network, x = parallel(lambda: dense(4), long_steps="fitted").to("meta"), torch.empty(6, 4, device="meta")
    with DeviceWatch() as watch:
        for _ in range(2):  # the second time by what the first has taught
            network(x).square().sum().backward()
    assert network.solvers[0].fit.maps.is_meta and not watch.mixed and len(waits) <= 4
    with inside_a_graph(), pytest.raises(InputError, match="long_steps fitted"):
        network(x)


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
