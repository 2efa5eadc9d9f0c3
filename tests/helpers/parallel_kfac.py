"""What the tests of K-FAC run on four ranks: `python -m tests.helpers.parallel_kfac FILE`.

The same steps by one, two and four ranks that share batches, with what each sent and has in memory; and those of
an ODE network whose layers are on one and on two ranks.
"""

import json
import sys

import torch
from mpi4py import MPI
from petsc4py import PETSc  # noqa: F401  it starts on all ranks together
from torch import nn

import nn_adapters as nna

LAYERS, WIDTH, SAMPLES, STEPS = 9, 12, 24, 4


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return list(zip(x, (x[:, :, 0] * x[:, :, 1] > 0).long() + (x[:, :, 2] > 1)))


def plain():
    torch.manual_seed(1)
    layers = [each for _ in range(LAYERS) for each in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers).double()


def odenet(comm):
    torch.manual_seed(2)
    layers = nna.LayerParallel(comm, lambda: nna.dense(WIDTH, act="tanh"), 64, 2.0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), layers, nn.Linear(WIDTH, 3)).double()


def train(network, optimizer, loss, own):
    """Losses, and the network's outputs for the first batch at the end."""
    for x, y in batches():

        def closure(x=x[own], y=y[own]):
            optimizer.zero_grad()
            with nna.exactly(network):
                value = loss(network(x), y)
                value.backward()
            return value

        optimizer.step(closure)
    network.eval()
    with torch.no_grad():
        return network(batches()[0][0]).reshape(-1).tolist()


def shared(comm, precision):
    """Ranks that share batches, in unequal parts."""
    network, loss = plain(), nna.CrossEntropy()
    team = comm if comm.size > 1 else None
    optimizer = nna.KFAC(
        network, loss, fisher="exact", team=team, messages=precision, l2=1e-3, damping=0.1, judge_every=2
    )
    first = comm.rank**2
    found = train(network, optimizer, loss, slice(first, (comm.rank + 1) ** 2 if comm.rank + 1 < comm.size else None))
    factors = optimizer.factors
    numbers = sum(sums.lower.numel() for pair in factors.sums.values() for sums in pair)
    held = numbers + sum(each.numel() for each in (*optimizer.inverse.A, *optimizer.inverse.G))
    return {"outputs": found, "sent": comm.allgather(factors.sent), "held": comm.allgather(held)}


def chained(comm):
    network, loss = odenet(comm), nna.CrossEntropy()
    optimizer = nna.KFAC(network, loss, damping=0.1, l2=1e-3, judge_every=2)
    found = train(network, optimizer, loss, slice(None))
    return {"outputs": found, "damping": optimizer.damping}


def main(path):
    world, result = MPI.COMM_WORLD, {}
    for size in (1, 2, 4):
        comm = world.Split(0 if world.rank < size else MPI.UNDEFINED)
        if comm != MPI.COMM_NULL:
            for precision in ("float64", "bfloat16"):
                result[f"{precision} {size}"] = shared(comm, precision)
            if size < 4:
                result[f"chain {size}"] = chained(comm)
    serial = nna.serial_network(odenet(MPI.COMM_SELF))
    if world.rank == 0:
        loss = nna.CrossEntropy()
        optimizer = nna.KFAC(serial, loss, damping=0.1, l2=1e-3, judge_every=2)
        result["serial"] = {"outputs": train(serial, optimizer, loss, slice(None)), "damping": optimizer.damping}
        with open(path, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1])
