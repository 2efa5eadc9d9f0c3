"""Gradients captured once and replayed: which graph serves, and what happens where cycles diverge."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import nn_adapters as nna
from nn_adapters.data.generated import peaks
from nn_adapters.layers.blocks import conv, dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import exactly, mgrit_solvers
from nn_adapters.training.cyclecontrol import CycleControl
from nn_adapters.training.graphs import MOST_KINDS, CapturedGradient, CudaGraph
from nn_adapters.training.loop import Training
from nn_adapters.training.trainingsettings import TrainingSettings
from pdeopt.core.errors import InputError
from problems import mnist
from tests.helpers.graphs import HostGraph

WORDS = {"coarsening": "4", "serial": "never", "fused": "never"}


def classifier(block=lambda: dense(4), layers=9, **words):
    torch.manual_seed(0)
    parallel = LayerParallel(None, block, layers, 2.0, **{**WORDS, **words})
    return nn.Sequential(nn.Linear(2, 4), parallel, nn.Linear(4, 3)).double()


def batches(count, samples=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
        yield x, torch.randint(3, (samples,), generator=generator)


def captured(network, loss=nn.functional.cross_entropy):
    return CapturedGradient(network, lambda x, y: loss(network(x), y), HostGraph)


def ordinary(network, x, y):
    network.zero_grad()
    value = nn.functional.cross_entropy(network(x), y)
    value.backward()
    return value.detach()


def same(network, other, rtol=1e-12):
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=1e-15)
    for a, b in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-15)


def test_a_training_by_replays_is_that_by_calls():
    network = classifier()
    reference, gradient = copy.deepcopy(network), captured(network)
    optimizers = [torch.optim.Adam(each.parameters(), lr=1e-2) for each in (network, reference)]
    for x, y in batches(8):
        values = gradient(x, y), ordinary(reference, x, y)
        torch.testing.assert_close(*values, rtol=1e-12, atol=0.0)
        same(network, reference)
        assert network[1].solvers[0].misfits == pytest.approx(reference[1].solvers[0].misfits, rel=1e-10)
        for optimizer in optimizers:
            optimizer.step()
    assert gradient.replays == 7  # all but the first


def noisy():
    return nn.Sequential(conv(2), nn.BatchNorm2d(2), nn.Dropout(0.2))


def test_dropout_and_running_averages_go_on_from_replay_to_replay():
    torch.manual_seed(0)
    network = nn.Sequential(LayerParallel(None, noisy, 5, 1.0, **WORDS), nn.Flatten(), nn.Linear(32, 3)).double()
    reference, gradient = copy.deepcopy(network), captured(network)
    for _, y in batches(4):
        x = torch.randn(6, 2, 4, 4).double()
        state = torch.get_rng_state()
        gradient(x, y)
        torch.set_rng_state(state)
        ordinary(reference, x, y)
        same(network, reference)
    assert gradient.replays == 3 and int(dict(network.named_buffers())["0.stack.1.num_batches_tracked"][0]) == 4


def test_a_graph_serves_the_calls_of_its_kind_alone():
    network = classifier()
    reference, gradient = copy.deepcopy(network), captured(network)
    (solver,), (other,) = mgrit_solvers(network), mgrit_solvers(reference)

    def both(samples=6):
        ((x, y),) = batches(1, samples)
        torch.testing.assert_close(gradient(x, y), ordinary(reference, x, y), rtol=1e-12, atol=0.0)
        same(network, reference)

    for count, samples in enumerate((6, 6, 5, 5, 6)):  # the last batch of an epoch is smaller
        both(samples)
        assert gradient.replays == (0, 1, 1, 2, 3)[count]
    for each in (solver, other):
        each.adjoint.cycles = 1
    both()
    assert gradient.replays == 3  # cycles have changed: an ordinary call
    both()
    assert gradient.replays == 4
    with exactly(network), exactly(reference):
        both()
        both()
    assert gradient.replays == 5
    for each in (network, reference):
        each[1].eval()
    both()  # exact, for the mode
    for each in (network, reference):
        each[1].train()
        each[0].requires_grad_(False)
        each.zero_grad()
    both()
    assert network[0].weight.grad is None and gradient.replays == 5
    network.load_state_dict(copy.deepcopy(network.state_dict()), assign=True)  # the weights are elsewhere
    both()
    assert gradient.replays == 5 and len(gradient._kinds) == MOST_KINDS


def test_where_cycles_diverge_the_call_is_done_again():
    network = nn.Sequential(LayerParallel(None, lambda: dense(4, "relu"), 16, 4.0, **WORDS), nn.BatchNorm1d(4)).double()
    gradient, x, y = captured(network, lambda u, y: u.square().mean()), torch.randn(6, 4).double(), torch.zeros(6)
    for _ in range(2):
        gradient(x, y)
    network[0].scale(60.0)
    reference = copy.deepcopy(network)
    with pytest.warns(RuntimeWarning, match="diverged"):
        value = gradient(x, y)
    with exactly(reference):
        expected = reference(x).square().mean()
        expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0.0)
    same(network, reference)  # the running averages moved once
    assert gradient.replays == 2 and network[0].solvers[0].repeats >= 1
    network[0].scale(1 / 60.0)
    gradient(x, y)
    assert gradient.replays == 3 and 0 < max(network[0].solvers[0].misfits) < 0.5


@pytest.mark.parametrize("words", [dict(rtol=1e-3), dict(start="warm")])
def test_what_a_graph_cannot_do_is_done_by_calls(words):
    network = classifier(**words)
    reference, gradient = copy.deepcopy(network), captured(network)
    for x, y in batches(3):
        torch.testing.assert_close(gradient(x, y), ordinary(reference, x, y), rtol=1e-12, atol=0.0)
        same(network, reference)
    assert gradient.replays == 0


class Asks(nn.Linear):
    def forward(self, u):
        return super().forward(u) / (1.0 + float(self.weight.detach().abs().max()))


def test_layers_that_ask_for_numbers_are_called():
    network = nn.Sequential(Asks(2, 4), classifier()[1], nn.Linear(4, 3)).double()
    reference, gradient = copy.deepcopy(network), captured(network)
    for number, (x, y) in enumerate(batches(3)):
        if number == 1:
            with pytest.warns(RuntimeWarning, match="no CUDA graph"):
                value = gradient(x, y)
        else:
            value = gradient(x, y)
        torch.testing.assert_close(value, ordinary(reference, x, y), rtol=1e-12, atol=0.0)
        same(network, reference)
    assert gradient.replays == 0


def test_cycle_control_has_its_way():
    network = classifier(layers=64)
    gradient, control = captured(network), CycleControl(network, 1e-3, 10, 100)
    optimizer, seen = torch.optim.SGD(network.parameters(), lr=0.3), set()
    loss = nn.functional.cross_entropy
    for number, (x, y) in enumerate(batches(12), start=1):
        control.before(number, 0.3, lambda x=x, y=y: loss(network(x), y))
        network.zero_grad()
        gradient(x, y)
        found = [p.grad.clone() for p in network.parameters()]
        seen.add(control.cycles)
        ordinary(network, x, y)
        for p, g in zip(network.parameters(), found, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-13)
        control.after(number, 0.3)
        optimizer.step()
    assert gradient.replays > 6 and (1, 0) not in seen


def test_without_a_device_calls_are_ordinary():
    network = classifier()
    gradient = CapturedGradient(network, lambda x, y: nn.functional.cross_entropy(network(x), y))
    for x, y in batches(3):
        network.zero_grad()
        gradient(x, y)
        found = [p.grad for p in network.parameters()]
        ordinary(network, x, y)
        for p, g in zip(network.parameters(), found, strict=True):
            assert torch.equal(p.grad, g)
    assert gradient.replays == 0


@pytest.mark.parametrize("graph", [HostGraph, CudaGraph], ids=["replays", "calls"])
def test_what_would_be_added_up_or_not_be_called_is_refused(graph):
    network = nn.Linear(2, 3).double()
    gradient = CapturedGradient(network, lambda x, y: nn.functional.cross_entropy(network(x), y), graph)
    for x, y in batches(3):
        gradient(x, y)  # in place of its own
    network.zero_grad(set_to_none=False)
    gradient(x, y)
    expected = network.weight.grad.clone()
    ordinary(network, x, y)
    with pytest.raises(InputError, match=r"\.grad of weight: .*zero_grad"):
        gradient(x, y)
    torch.testing.assert_close(network.weight.grad, expected)  # as it was
    network.zero_grad()
    handle = network.bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(InputError, match="hooks after accumulation of bias"):
        gradient(x, y)
    handle.remove()
    gradient(x, y)
    torch.testing.assert_close(network.weight.grad, expected)


def test_streams_are_those_of_the_device_of_the_samples():
    places = []

    class Noted(HostGraph):
        @staticmethod
        def on(device):
            places.append(device)
            return nullcontext()

    network = nn.Linear(2, 3).double()
    gradient = CapturedGradient(network, lambda x, y: nn.functional.cross_entropy(network(x), y), Noted)
    for x, y in batches(2):
        gradient(x, y)
    assert places == [torch.device("cpu")] * 2 and gradient.replays == 1


def test_a_script_refuses_a_device_before_it_reads_data(monkeypatch):
    monkeypatch.setattr(nna, "load_dataset", lambda *args: pytest.fail("data were read"))
    with pytest.raises(InputError, match=r"device: got cuda:99.*legal: cpu"):
        mnist.main(["-device", "cuda:99"])


def training(device="", **words):
    torch.manual_seed(0)
    parallel = LayerParallel(None, lambda: dense(4), 16, 2.0, **WORDS)
    network = nn.Sequential(nn.Linear(2, 4), parallel, nn.Linear(4, 5))
    settings = TrainingSettings(samples=50, batch=20, lr=1e-2, tikhonov=1e-4, smoothness=1e-6, device=device, **words)
    return Training(network, peaks(0), settings)


def test_a_run_by_replays_is_a_run_by_calls_and_goes_on(tmp_path):
    expected, path = training(epochs=6).run(), str(tmp_path / "run")
    first = training(epochs=6, checkpoint=path)
    first.captured = CapturedGradient(first.network, first._loss_of, HostGraph)
    first.observe = lambda epoch: (_ for _ in ()).throw(KeyboardInterrupt) if epoch.epoch == 3 else None
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert first.captured.replays > 4
    second = training(epochs=6, restart=path)
    assert len(second.history) == 3 and second.captured is None  # on the host
    second.captured = CapturedGradient(second.network, second._loss_of, HostGraph)
    last = second.run()
    assert second.captured.replays > 4
    assert last.loss == pytest.approx(expected.loss, rel=1e-5) and last.accuracy == expected.accuracy
    assert last.gradient_error == pytest.approx(expected.gradient_error, rel=1e-3)


def test_a_device_that_is_not_there_is_refused():
    assert training(device="cpu").captured is None
    with pytest.raises(InputError, match="device: got cuda:99"):
        training(device="cuda:99")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that PyTorch can use")
def test_a_run_on_a_gpu_is_that_of_the_host():
    found = training("cuda", epochs=3)
    last, expected = found.run(), training(epochs=3).run()
    assert found.captured.replays > 0 and last.loss == pytest.approx(expected.loss, rel=1e-3)
    never = training("cuda", epochs=3, cuda_graphs="never")
    assert never.captured is None and never.run().loss == pytest.approx(expected.loss, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that PyTorch can use")
def test_a_training_by_replays_on_a_gpu():
    network = classifier().cuda()
    reference = copy.deepcopy(network)
    gradient = CapturedGradient(network, lambda x, y: nn.functional.cross_entropy(network(x), y))
    for x, y in batches(8):
        x, y = x.cuda(), y.cuda()
        torch.testing.assert_close(gradient(x, y), ordinary(reference, x, y), rtol=1e-9, atol=0.0)
        same(network, reference, 1e-8)
        for each in (network, reference):
            with torch.no_grad():
                for p in each.parameters():
                    p -= 1e-2 * p.grad
    assert gradient.replays == 7
