"""What users of PyTorch do with a module, done with layers in parallel and with the same layers in series."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from nn_adapters.layers.blocks import Direct, dense
from nn_adapters.layers.init import initialize
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import (
    approximately,
    clip_grad_norm_,
    measure_bias,
    parameter_groups,
    serial_network,
)
from pdeopt.core.errors import InputError
from tests.helpers.layers import BLOCKS, X, alike, converged, gradients, rough, same, sequences


class Symmetric(nn.Module):
    def forward(self, W):
        return W.triu() + W.triu(1).mT


class Twice(nn.Module):
    """A block that uses one layer twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)

    def forward(self, u):
        return self.second(torch.tanh(self.first(u)))


@pytest.mark.parametrize("name", ["layers", "sequences"])
def test_copies_and_pickles_are_networks_of_their_own(name):
    network, x = (converged(), X) if name == "layers" else sequences()
    network.solvers[0].forward.cycles = 5
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    copies = copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.load(file, weights_only=False)
    average = AveragedModel(network)
    average.update_parameters(network)
    before = network(x)
    for each in (*copies, average.module):
        assert torch.equal(each(x), before) and each.solvers[0].forward.cycles == 5
        each(x).sum().backward()
        with torch.no_grad():
            next(each.parameters()).zero_()
    assert torch.equal(network(x), before) and all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 0.03)]
)
def test_dtypes_are_those_of_the_serial_network(name, dtype, tolerance):
    block, shape = BLOCKS[name]
    alike(converged(block).to(dtype), torch.randn(shape, dtype=torch.float64).to(dtype), tolerance)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_the_serial_network(name, dtype):
    block, shape = BLOCKS[name]
    alike(converged(block), torch.randn(shape, dtype=dtype), 0.2, autocast=True)


@pytest.mark.parametrize("words", [{}, {"autocast": True}])
def test_sequences_in_half_precision(words):
    for dtype in (torch.float32,) if words else (torch.float16, torch.bfloat16):
        network, x = sequences()
        alike(network.to(dtype), x.to(dtype), 0.2, **words)


def test_a_scaled_loss_under_autocast_trains():
    network = converged()
    optimizer, scaler = torch.optim.SGD(network.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in network.parameters()]
    with torch.autocast("cpu"):
        loss = network(X).square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = [p.grad.clone() for p in network.parameters()]
    scaler.step(optimizer)
    same([p.detach() for p in network.parameters()], [p - 0.1 * g for p, g in zip(before, found)], 1e-6)


def test_parameters_are_named_and_grouped_as_filters_expect():
    network = nn.Sequential(nn.Linear(2, 4), converged(BLOCKS["by vmap"][0]), nn.Linear(4, 3))
    names = [name for name, _ in network.named_parameters()]
    assert names[2:6] == ["1.stack.0.weight", "1.stack.0.bias", "1.stack.1.weight", "1.stack.1.bias"]
    serial = [
        {name for name, p in serial_network(network).named_parameters() if (p.dim() > 1) == flag} for flag in (1, 0)
    ]
    of = {id(p): name for name, p in network.named_parameters()}
    for group, expected, decay in zip(parameter_groups(network, 0.1), serial, (0.1, 0.0)):
        found = {of[id(p)].replace("1.stack.", "1.layers.3.") for p in group["params"]}
        assert found == {name for name in expected if ".layers." not in name or ".layers.3." in name}
        assert group["weight_decay"] == decay
    with pytest.raises(InputError, match="weight_decay"):
        network[1].parameter_groups(-1.0)


@pytest.mark.parametrize("kind", ["he", "glorot", "box"])
def test_first_weights_are_those_of_the_serial_network(kind):
    network = nn.Sequential(nn.Linear(4, 4), converged(lambda: dense(4, "relu")), nn.Linear(4, 3))
    serial = serial_network(network)
    for each in (network, serial):
        torch.manual_seed(3)
        initialize(each, kind)
    assert network.state_dict().keys() == serial.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), serial.state_dict().values()))


def test_functions_are_applied_to_the_modules_of_all_layers():
    network = converged()
    serial = network.serial()

    def draw(module):
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)

    for each in (network, serial):
        torch.manual_seed(3)
        each.apply(draw)
    same(network.state_dict().values(), serial.state_dict().values(), 0.0)
    with torch.no_grad():
        network[-1][0].weight.zero_()
    assert network.stacks[0][10].abs().sum() == 0 and len(network) == 11


def test_without_gradients_or_training_it_is_the_serial_network():
    network, (gru, x) = rough(), sequences(cycles=1)
    for net, inputs in ((network, X), (gru, x)):
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            (net(inputs) - 1).square().mean().backward()
            optimizer.step()
        serial, off = net.serial(), 1e-4
        assert (net(inputs) - serial(inputs)).abs().max() > off
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                same([net(inputs)], [serial(inputs)], 1e-6)
        with torch.no_grad(), approximately(net):
            assert (net(inputs) - serial(inputs)).abs().max() > off
        net.eval()
        alike(net, inputs, 1e-5)
        bias = measure_bias(net, lambda net=net, inputs=inputs: net(inputs).square().sum())
        assert bias > off  # that of training
        net.approximate = True
        assert (net(inputs) - serial(inputs)).abs().max() > off


def test_weights_go_to_the_serial_network_and_back():
    network = nn.Sequential(nn.Linear(4, 4), rough())
    copied = serial_network(network)
    torch.optim.SGD(copied.parameters(), lr=0.1).step()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    network.load_state_dict(copied.state_dict())
    with torch.no_grad():
        same([network(X)], [copied(X)], 1e-6)
    network.load_state_dict(copied.double().state_dict(), assign=True)
    assert network[1].stacks[0].dtype == torch.float64
    alike(network[1], X.double(), 1.0)
    gru, x = sequences("implicit")
    same([gru(x)], [gru.serial()(x)], 1e-5)
    gru.load_state_dict(gru.serial().state_dict())


def test_the_derivative_passes_pytorchs_own_check():
    network = converged(layers=6).double()
    assert torch.autograd.gradcheck(network, X[:2].double().requires_grad_())
    found = torch.autograd.functional.jacobian(network, X[:2].double())
    assert torch.allclose(found, torch.autograd.functional.jacobian(network.serial(), X[:2].double()))


def test_frozen_parameters_get_no_gradient():
    network = converged().requires_grad_(False)
    network.stack.get_submodule("0").bias.requires_grad_(True)
    x = X.clone().requires_grad_()
    network(x).sum().backward()
    assert network.stacks[0].grad is None and network.stacks[1].grad is not None and x.grad is not None
    alike(network, X, 1e-4)
    assert [p.requires_grad for p in network.serial()[0].parameters()] == [False, True]


def test_hooks_are_called_and_gradients_clipped():
    network, called = nn.Sequential(nn.Linear(4, 4), converged()), []
    network[1].register_forward_hook(lambda *_: called.append("forward"))
    network[1].register_full_backward_hook(lambda *_: called.append("backward"))
    network(X).square().sum().backward()
    assert called == ["forward", "backward"]
    alone = copy.deepcopy(network)
    for a, b in zip(alone.parameters(), network.parameters()):
        a.grad = b.grad.clone()
    norms = clip_grad_norm_(network, 0.1), torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    assert float(norms[0]) == pytest.approx(float(norms[1]))
    same([p.grad for p in network.parameters()], [p.grad for p in alone.parameters()], 1e-6)


def test_parametrizations_of_stacks_and_of_blocks():
    network = converged()
    parametrize.register_parametrization(network.stack.get_submodule("0"), "weight", Symmetric())
    same([network(X)], [network.serial()(X)], 1e-5)
    network.load_state_dict(network.state_dict())
    assert torch.equal(copy.deepcopy(network)(X), network(X))
    alike(
        converged(lambda: nn.Sequential(parametrize.register_parametrization(nn.Linear(4, 4), "weight", Symmetric()))),
        X,
        1e-4,
    )


@pytest.mark.parametrize("block", [Twice, lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2)])
def test_a_block_may_use_a_layer_twice(block):
    network = converged(block)
    network.scale(0.3)
    alike(network, X, 1e-4)
    assert list(network.state_dict()) == list(network.serial().state_dict())
    network.load_state_dict(network.serial().state_dict())


def test_layers_that_are_used_twice_add_up():
    layers = converged()
    network = nn.Sequential(layers, nn.Tanh(), layers)
    serial = serial_network(network)
    assert serial[0] is serial[2]
    found, expected = (gradients(net[0], X)[1] for net in (network, serial))
    same(found, expected, 1e-4)


@pytest.mark.parametrize("name", ["dense", "convolution", "by vmap"])
@pytest.mark.parametrize("layers", [1, 5, 9, 30])
def test_any_number_of_layers_any_batch(name, layers):
    block, shape = BLOCKS[name]
    network = converged(block, layers, levels=3, cycles=9, adjoint_cycles=9, cache=1)
    for batch in (0, 1, 40):
        alike(network, torch.randn(batch, *shape[1:]), 1e-4)
    single = torch.randn(shape[1:])
    same([network(single)], [network.serial()(single)], 1e-5)


@pytest.mark.slow  # of the import of the compiler
def test_a_compiled_network_runs_its_layers_as_they_are():
    network = nn.Sequential(nn.Linear(4, 4), converged(), nn.Linear(4, 2))
    compiled = torch.compile(network, backend="eager")
    same([compiled(X)], [network(X)], 1e-6)
    compiled(X).sum().backward()
    assert network[1].stacks[0].grad is not None


def test_threads_may_share_a_network():
    network, off = rough(), []
    network.eval()
    expected = network.serial()(X).detach()

    def work():
        with torch.no_grad():
            off.extend(float((network(X) - expected).abs().max()) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(off) == 80 and max(off) < 1e-5 and network.solvers[0].factors == [8]


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda *parts: Direct(nn.Sequential(*parts))])
def test_blocks_may_change_their_features_in_place(wrap):
    network = converged(lambda: wrap(nn.LeakyReLU(0.5, inplace=True), nn.Linear(4, 4)))
    before = X.clone()
    for each in (network, network.eval()):
        same([each(before)], [each.serial()(X.clone())], 1e-5)
    assert torch.equal(before, X)


def test_weights_may_come_after_the_network():
    with torch.device("meta"):
        network = converged()
    network.load_state_dict(converged().state_dict(), assign=True)
    alike(network, X, 1e-4)
    network.to("meta").to_empty(device="cpu").load_state_dict(converged().state_dict())
    same([network(X)], [converged()(X)], 1e-6)


def test_parameters_may_be_those_of_another_call():
    network = converged()
    given = {name: 2 * p.detach() for name, p in network.named_parameters()}
    found = functional_call(network, given, (X,))
    network.scale(2.0)
    same([found], [network(X)], 1e-6)


def test_cycles_that_diverge_are_repeated_in_series_with_a_warning():
    torch.manual_seed(0)
    network = LayerParallel(None, lambda: dense(4, "relu"), 64, 2.0, coarsening="16")
    network.scale(60.0)
    with pytest.warns(RuntimeWarning, match="one layer after the other"):
        value, found = gradients(network, X)
    serial, expected = gradients(network.serial(), X)
    for a, b in zip((value, *found), (serial, *expected)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(X)  # once is enough


def test_long_steps_of_the_classic_unit_are_stable():
    """|h| < 1 whatever the step: it is an average of h and tanh, as n + z^dt (h - n) says."""
    network, x = sequences(coarsening="10", levels=2, cycles=2, adjoint_cycles=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4.0)
    network(30 * x).sum().backward()
    assert max(network.solvers[0].misfits) < 0.5
    assert all(p.grad.isfinite().all() for p in network.parameters())


NORMALIZED = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh())


def test_wide_layers_on_one_rank_are_the_serial_network_to_the_last_bit():
    x, found = torch.randn(128, 64), []
    layers = LayerParallel(None, lambda: copy.deepcopy(NORMALIZED), 8, 1.0, cycles=2)
    serial = layers.serial()
    for network in (layers, serial):
        found.append(network(x))
        found[-1].square().sum().backward()
    assert layers.solvers[0].is_dear() and layers.solvers[0].misfits == (0.0, 0.0) and torch.equal(*found)
    stacks = dict(layers.stack.named_parameters())
    gradients = [stacks[name].grad[i] for i in range(8) for name, _ in serial.layers[i].named_parameters()]
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, serial.parameters(), strict=True))
    state = layers.state_dict()  # running averages have moved alike
    assert all(torch.equal(state[key], value) for key, value in serial.state_dict().items())


def test_narrow_layers_on_one_rank_go_by_cycles_and_wide_ones_do_if_told_to():
    for width, words in ((4, {}), (64, {"serial": "never"})):
        layers = LayerParallel(None, lambda width=width: nn.Sequential(nn.Linear(width, width), nn.GELU()), 16, **words)
        layers(torch.randn(32, width))
        assert layers.solvers[0].misfits[0] > 0 and not layers.solvers[0].is_dear()
