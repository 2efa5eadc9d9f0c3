"""Least squares and LSGD on samples that are spread over ranks; run under mpiexec as a module."""

import sys

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from nn_adapters.layers.blocks import LayerStack, dense
from nn_adapters.layers.init import initialize
from nn_adapters.training.last_layer import least_squares, lsgd
from pdeopt.core.errors import InputError


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deficient():
    """40 samples whose 6 features have rank 4, the column of ones included."""
    x = random(40, 3)
    return torch.cat([x, x[:, :1] - x[:, 1:2], 2.0 * x[:, :1] + 3.0, x[:, 2:]], dim=1), random(40, 2, seed=1)


def with_ones(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def coefficients(weight, bias):
    """As NumPy's lstsq has them, (in + 1, out)."""
    return torch.cat([weight.T, bias[None]])


def regression(seed=0, outputs=1, bias=True, samples=40):
    """A small network in two parts, and its samples."""
    hidden = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), LayerStack(lambda: dense(6, "relu"), 2)).double()
    initialize(hidden, "box", torch.Generator().manual_seed(seed))
    head = nn.Linear(6, outputs, bias=bias).double()
    x = torch.linspace(0, 1, samples, dtype=torch.float64)[:, None]
    return hidden, head, x, torch.cat([torch.sin((2 * k + 3) * torch.pi * x) for k in range(1, outputs + 1)], dim=1)


def distributed(file):
    """Solve with the samples spread over the ranks; rank 0 writes what all ranks must have found alike."""
    comm = MPI.COMM_WORLD
    own = slice(comm.rank, None, comm.size)
    found = {}
    for name, (x, y) in {"full": (random(50, 7), random(50, 3, seed=1)), "deficient": deficient()}.items():
        found[name] = coefficients(*least_squares(x[own], y[own], rtol=1e-12, comm=comm, chunk=6))
    x, y = deficient()
    none = slice(None) if comm.rank == comm.size - 1 else slice(0)  # all samples on the last rank
    found["uneven"] = coefficients(*least_squares(x[none], y[none], rtol=1e-12, comm=comm))
    hidden, head, x, y = regression(outputs=2)
    found["losses"] = torch.tensor(lsgd(hidden, head, x[own], y[own], steps=10, comm=comm))
    found["hidden"] = torch.cat([p.detach().reshape(-1) for p in hidden.parameters()])
    found["head"] = head.weight.detach()
    for values in found.values():
        assert all(np.array_equal(values.numpy(), other) for other in comm.allgather(values.numpy()))
    try:
        least_squares(random(5, 2), random(5 + comm.rank // max(comm.size - 1, 1), 1), comm=comm)
        assert comm.size == 1
    except InputError:  # on all ranks, although one alone is wrong
        pass
    if comm.rank == 0:
        np.savez(file, **{name: values.numpy() for name, values in found.items()})


if __name__ == "__main__":
    distributed(sys.argv[1])
