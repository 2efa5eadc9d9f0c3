"""Bytes that splits of a network send, counted on ranks that are threads; their gradients are the serial ones."""

import copy
from itertools import pairwise
from queue import Queue

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

import nn_adapters as nna
from nn_adapters.parallel.pipeline import HEADER
from pdeopt.core.messages import Messages
from tests.helpers.threads import ThreadTeam, on_threads

WIDTHS, BATCH = (24, 40, 16, 8), 32


class Team(ThreadTeam):
    """With the calls that splits of a network need beside: copies, and messages from one rank to another."""

    def __init__(self, rank, size, shared, boxes):
        super().__init__(rank, size, shared)
        self._boxes, self._seen = boxes, {}

    def Dup(self):
        return Team(self.rank, self.size, self._shared, self._boxes)

    def Free(self):
        pass

    def bcast(self, value, root):
        return self.allgather(value)[root]

    def Isend(self, message, rank, tag=0):
        self._box(self.rank, rank, tag).put(bytes(message))
        return _Done()

    def Irecv(self, buffer, rank, tag=0):
        return _Awaited(lambda: self.Recv(buffer, rank, tag))

    def Probe(self, rank, tag, status):
        self._seen[rank, tag] = self._box(rank, self.rank, tag).get(timeout=60)
        status.Set_elements(MPI.BYTE, len(self._seen[rank, tag]))

    def Recv(self, buffer, rank, tag=0):
        found = self._seen.pop((rank, tag), None)
        buffer[:] = np.frombuffer(found or self._box(rank, self.rank, tag).get(timeout=60), dtype=np.uint8)

    def _box(self, source, target, tag):
        return self._boxes.setdefault((source, target, tag), Queue())


class _Done:
    def Test(self):
        return True

    def Wait(self):
        pass


class _Awaited:
    def __init__(self, receive):
        self.Wait = receive


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


def even_network():
    """Layers of one width: wherever it is cut, as much is sent."""
    layers = [each for _ in range(8) for each in (nn.Linear(16, 16), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def pipeline(team, micro=4):
    """Bytes of a step in stages, without the headers, and messages."""
    stages = nna.Pipeline(even_network(), team, microbatches=micro)
    x = torch.zeros(BATCH, 16, dtype=torch.float64)
    stages.step(x, torch.zeros(BATCH).long(), nn.functional.cross_entropy)
    return stages.sends, stages.sent - 8 * HEADER * stages.sends


def images():
    """Convolutions, pooling and a dense layer for images of 16x16."""
    body = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*body, nn.Conv2d(8, 8, 3, padding=1)), nn.Linear(8 * 8 * 8, 5)


def domain(team):
    """Bytes of a step of images in slabs: halos and rows that are joined; sums of gradients."""
    body, last = (each.double() for each in images())
    slabs = nna.DomainParallel(body, team)
    scores = last(slabs(torch.zeros(BATCH, 2, 16, 16, dtype=torch.float64)).flatten(1))
    nn.functional.cross_entropy(scores, torch.zeros(BATCH).long()).backward()
    return slabs.rows.sent, slabs.sent - slabs.rows.sent


def counted(part, ranks):
    """What `part(team)` gives on each rank."""
    boxes = {}
    return on_threads(ranks, lambda team: part(Team(team.rank, team.size, team._shared, boxes)))
