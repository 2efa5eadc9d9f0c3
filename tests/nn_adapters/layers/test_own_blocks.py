"""Blocks as users write them, with settings, modes, arguments and tensors of their own, against the serial network."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Event

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from torch.optim.swa_utils import AveragedModel, update_bn

from nn_adapters.layers.blocks import LayerStack
from nn_adapters.layers.layerlist import LayerList
from nn_adapters.layers.parallelmodule import exactly
from pdeopt.core.errors import InputError
from tests.helpers.layers import X, alike, converged, same

X = X.double()


class Scaled(nn.Module):
    """A layer that knows its number, as those that are scaled by it do."""

    def __init__(self, number=1, table=None):
        super().__init__()
        self.linear, self.number, self.table = nn.Linear(4, 4), number, table

    def forward(self, u):
        return torch.tanh(self.linear(u)) * self.number


def frozen(number):
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    block[0].requires_grad_(number < 2)
    return block


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda i: nn.Sequential(nn.Linear(4, 4), nn.Tanh() if i < 3 else nn.ReLU()), "layers 0 and 3.*Tanh.*ReLU"),
        (lambda i: nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(i / 10)), "1.negative_slope: 0.0 and 0.1"),
        (Scaled, "differ in number: 0 and 1"),
        (lambda i: Scaled(table={"a": (i, torch.float32)}), "differ in table"),
        (lambda i: Scaled(table=torch.full((2,), i)), "differ in table"),
        (lambda i: Scaled(table=lambda u: i * u), "differ in table"),
        (frozen, "0.weight.requires_grad: True and False"),
        (lambda i: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).train(i < 1)), "1.training: True and False"),
    ],
)
def test_layers_that_are_no_kin_are_refused_by_name_and_a_list_takes_them(make, words):
    numbers = count()
    with pytest.raises(InputError, match=words):
        converged(lambda: make(next(numbers)))
    blocks = [lambda i=i: make(i) for i in range(5)]
    layers = LayerList(None, blocks, 2.0, coarsening="2", cycles=3, adjoint_cycles=3).double()
    made = iter(block() for block in blocks)
    serial = LayerStack(lambda: next(made), 5, 2.0).double()  # modules of their own, with their settings
    serial.load_state_dict(layers.state_dict())
    if make is not frozen:
        assert torch.allclose(layers(X), serial(X), rtol=1e-12)
    assert [p.requires_grad for p in serial.parameters()] == [p.requires_grad for p in layers.serial().parameters()]


class Resting(nn.Module):
    """A block whose batch norm, and whose dropout, are never in training."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval(), self.drop.eval()
        return self

    def forward(self, u):
        return torch.tanh(self.drop(self.norm(self.linear(u))))


def batch_normed(p=0.0):
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(p))


def in_eval():
    block = batch_normed(0.5)
    block[1].eval(), block[3].eval()
    return block


@pytest.mark.parametrize("serial", ["never", "auto"])
@pytest.mark.parametrize("block", [Resting, in_eval])
def test_parts_that_are_not_in_training_stay_so(block, serial):
    network = converged(block, serial=serial).double()
    if block is Resting:
        network.train()
    before = [value.clone() for value in network.buffers()]
    alike(network, X, 1e-10)
    same(list(network.buffers()), before, 0.0)


def test_settings_and_modes_of_norms_and_dropout_are_set_as_in_pytorch():
    network = converged(lambda: batch_normed(0.5)).double()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.momentum, part.eps = 0.7, 0.1
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    assert network[3][1].momentum == 0.7 and network.serial()[2][3].p == 0.0
    serial = network.serial()
    alike(network, X, 1e-10)
    serial(X)
    same(list(network.state_dict().values()), list(serial.state_dict().values()), 1e-12)
    for each in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        same([each(X)], [serial(X)], 1e-10)
    network.apply(lambda m: setattr(m, "p", 0.4) if isinstance(m, nn.Dropout) else None)
    torch.manual_seed(1)
    dropped = network(X)
    torch.manual_seed(1)
    with exactly(network):
        same([dropped], [network(X)], 1e-10)
    assert float((dropped - serial(X)).detach().abs().max()) > 1e-2
    network.stack.get_submodule("1").eval()
    before = network.stack.get_submodule("1").running_mean.clone()
    network(X)
    assert torch.equal(network.stack.get_submodule("1").running_mean, before) and not network[0][1].training


def test_averages_are_made_anew_by_update_bn():
    network = converged(batch_normed).double()
    serial = network.serial()
    for each in (network, serial):
        mean = AveragedModel(each)
        update_bn([X + 5, 2 * X], mean)
        each.load_state_dict(mean.module.state_dict())
    same(list(network.state_dict().values()), list(serial.state_dict().values()), 1e-12)


def test_a_mode_that_changes_before_the_backward_pass_is_that_of_the_forward_pass():
    network, found = converged(lambda: batch_normed(0.3)).double(), []
    for mode in (True, False):
        torch.manual_seed(0)
        loss = network(X).square().sum()
        network.train(mode)
        found.append(torch.autograd.grad(loss, network.stacks))
    same(found[1], found[0], 0.0)


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, u, given):
        return torch.tanh(self.linear(u) + given["shift"] * given["scales"][0])


@pytest.mark.parametrize("serial", ["never", "auto"])
def test_tensors_inside_of_arguments_get_gradients(serial):
    network = converged(Conditioned, serial=serial).double()
    given = {"shift": torch.randn(6, 4, dtype=torch.float64), "scales": (torch.tensor(0.5, dtype=torch.float64), 3)}
    leaves = [given["shift"].requires_grad_(), given["scales"][0].requires_grad_()]
    found, expected = (torch.autograd.grad(net(X, given).square().sum(), leaves) for net in (network, network.serial()))
    same(found, expected, 1e-10)


def test_arguments_that_a_block_does_not_take_are_refused_in_later_calls_too():
    network = converged().double()
    network(X)
    with pytest.raises(TypeError, match="2 positional arguments but 3"):
        network(X, torch.ones(6, 4))


OUTSIDE = nn.Parameter(torch.ones(4, dtype=torch.float64))


class Borrowing(nn.Linear):
    def forward(self, u):
        return torch.tanh(super().forward(u) * OUTSIDE)


class Dropping(nn.Linear):
    def forward(self, u):
        return F.dropout(super().forward(u), 0.3, self.training)


@pytest.mark.parametrize("words", [{}, {"coarsening": "16"}, {"levels": 1}, {"serial": "auto"}])
@pytest.mark.parametrize("kind, got", [(Borrowing, "outside which needs gradients"), (Dropping, "random numbers")])
def test_what_a_solve_cannot_see_is_refused(kind, got, words):
    network = converged(lambda: kind(4, 4), **words).double()
    with pytest.raises(InputError, match=got):
        network(X)
    if kind is Dropping:
        alike(network.eval(), X, 1e-10)


def test_weights_that_a_hook_computes_are_refused():
    def pruned():
        return l1_unstructured(nn.Linear(4, 4), "weight", 0.5)

    with pytest.raises(InputError, match=r"weight of Linear, which a hook computes.*prune\.remove"):
        converged(pruned)


@pytest.mark.parametrize("block", [lambda: nn.Softmax(1), lambda: nn.LayerNorm(4, elementwise_affine=False)])
def test_layers_may_have_no_weights(block):
    network, u = converged(block), X.clone().requires_grad_()
    found, expected = (torch.autograd.grad(net(u).square().sum(), u) for net in (network, network.serial()))
    same(found, expected, 1e-10)


@pytest.mark.parametrize("words", [{}, {"serial": "auto"}, {"fused": "never"}, {"levels": 1}])
def test_what_follows_may_change_the_features_in_place(words):
    network = converged(**words).double()
    found = torch.autograd.grad(F.relu_(network(X)).square().sum(), network.stacks)
    expected = torch.autograd.grad(F.relu(network(X)).square().sum(), network.stacks)
    same(found, expected, 0.0)


def test_images_may_have_their_channels_last():
    network = converged(lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh())).double()
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    before = network.serial()(x)
    network = network.to(memory_format=torch.channels_last)
    same([network(x.to(memory_format=torch.channels_last))], [before], 1e-10)


def test_complex_features():
    network = converged(lambda: nn.Linear(4, 4, dtype=torch.complex128))
    found, expected = (
        torch.autograd.grad(net(X + 1j * X).abs().square().sum(), list(net.parameters()))
        for net in (network, network.serial())
    )
    same(found, [torch.stack(expected[k::2]) for k in (0, 1)], 1e-10)


def test_training_in_inference_mode_moves_averages():
    network = converged(batch_normed).double()
    serial = network.serial()
    with torch.inference_mode():
        network(X), serial(X)
    same(list(network.state_dict().values()), list(serial.state_dict().values()), 1e-12)
    alike(network, X, 1e-10)


def test_one_sequence_with_a_mask_of_padding():
    def encoder():
        return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    network, u = converged(encoder).double(), torch.randn(5, 4, dtype=torch.float64)
    padding = torch.tensor([False, False, False, True, True])
    same([network(u, None, padding)], [network.serial()(u, None, padding)], 1e-10)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_sequence_that_is_padding_alone_is_finite_with_dropout_too(norm_first):
    def encoder():
        return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True, norm_first=norm_first)

    network, u = converged(encoder).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [True] * 5])
    value = network(u, None, padding)
    assert value.isfinite().all() and network.serial()(u, None, padding).isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), network.stacks))
    torch.manual_seed(2)
    both = network(u, None, padding)
    torch.manual_seed(2)
    with exactly(network):
        same([both], [network(u, None, padding)], 1e-10)


def test_layers_are_taken_by_number():
    with pytest.raises(TypeError, match="'slice' object cannot be interpreted as an integer"):
        converged()[1:3]


def test_a_factor_may_be_a_number():
    assert converged(coarsening=4).solvers[0].factors == converged(coarsening="4").solvers[0].factors == [4]


def test_threads_that_draw_random_numbers_are_not_taken_for_the_block():
    network, over = converged(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())).double(), Event()

    def draw():
        while not over.wait(1e-5):
            torch.rand(10)

    with ThreadPoolExecutor(1) as thread:
        drawing = thread.submit(draw)
        try:
            for samples in range(1, 60):  # each is looked at anew
                network(X[:1].expand(samples, -1))
        finally:
            over.set()
        drawing.result()
