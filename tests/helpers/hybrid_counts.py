"""Bytes that splits of a network send, counted on ranks that are threads; their gradients are the serial ones."""

import copy
from itertools import pairwise

import torch
from torch import nn

import nn_adapters as nna
from pdeopt.core.messages import Messages
from tests.helpers.threads import ThreadTeam, on_threads

WIDTHS, BATCH = (24, 40, 16, 8), 32


class Team(ThreadTeam):
    """With the calls that sums of gradients need beside."""

    def Dup(self):
        return Team(self.rank, self.size, self._shared)

    def Free(self):
        pass


torch.manual_seed(0)
_LAYERS = [each for a, b in pairwise(WIDTHS) for each in (nn.Linear(a, b), nn.Tanh())]
_NETWORK = nn.Sequential(*_LAYERS[:-1]).double()


def network():
    """The same weights at every call, in whatever thread."""
    return copy.deepcopy(_NETWORK)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, WIDTHS[0], generator=generator, dtype=torch.float64), torch.arange(BATCH) % WIDTHS[-1]


def data(comm):
    """Bytes of a step whose samples are shared."""
    net, (x, y) = network(), batch()
    sums = nna.GradientSums(net, comm)
    own = slice(comm.rank, None, comm.size)
    nn.functional.cross_entropy(net(x[own]), y[own]).backward()
    sums.finish()
    serial = network()
    nn.functional.cross_entropy(serial(x), y).backward()
    assert all(
        torch.allclose(p.grad, q.grad, rtol=0, atol=1e-14) for p, q in zip(net.parameters(), serial.parameters())
    )
    return sums.sent


class Gathered(torch.autograd.Function):
    """x W' of a weight whose rows are shared by ranks: outputs are gathered, derivatives by the inputs are summed."""

    @staticmethod
    def forward(ctx, x, W, team, sent):
        ctx.save_for_backward(x, W)
        ctx.team, ctx.sent = team, sent
        own = (x @ W.T).T
        messages = Messages(team, own.numel() * team.size, "float64")
        y = messages.allgather(own.reshape(-1))
        sent.append(messages.sent)
        return y.reshape(-1, len(x)).T

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors
        team = ctx.team
        own = g.tensor_split(team.size, 1)[team.rank]
        dx = None
        if ctx.needs_input_grad[0]:
            messages = Messages(team, x.numel(), "float64")
            dx = messages.sum((own @ W).reshape(-1)).reshape(x.shape)
            ctx.sent.append(messages.sent - 8 * (team.size - 1))  # without the weights of the messages
        return dx, own.T @ x, None, None


def model(comm):
    """Bytes of a step whose weights are shared by rows, and whose gradients are those of the serial network."""
    serial, (x, y), sent = network(), batch(), []
    weights = [
        layer.weight.detach().tensor_split(comm.size)[comm.rank].clone().requires_grad_() for layer in serial[::2]
    ]
    u = x
    for layer, W in zip(serial[::2], weights):
        u = Gathered.apply(u, W, comm, sent) + layer.bias.detach()
        u = torch.tanh(u) if layer is not serial[-1] else u
    nn.functional.cross_entropy(u, y).backward()
    nn.functional.cross_entropy(serial(x), y).backward()
    for layer, W in zip(serial[::2], weights):
        assert torch.allclose(W.grad, layer.weight.grad.tensor_split(comm.size)[comm.rank], rtol=0, atol=1e-14)
    return sum(sent)


def kfac(comm):
    """Bytes of a step of K-FAC."""
    net, (x, y) = network(), batch()
    loss = nna.CrossEntropy()
    optimizer = nna.KFAC(net, loss, team=comm, messages="float64", rate=1e-3)
    own = slice(comm.rank, None, comm.size)

    def closure():
        optimizer.zero_grad()
        value = loss(net(x[own]), y[own])
        value.backward()
        return value

    optimizer.step(closure)
    return optimizer.factors.sent


def counted(part, ranks):
    """What `part(team)` gives on each rank."""
    return on_threads(ranks, lambda team: part(Team(team.rank, team.size, team._shared)))
