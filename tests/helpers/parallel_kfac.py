"""What the tests of K-FAC run on four ranks: `python -m tests.helpers.parallel_kfac FILE`.

The same steps by one, two and four ranks that share batches, with what each sent and has in memory; and those of
an ODE network whose layers are on one and on two ranks. Beside them steps without factors, a sample that is no number
on one rank, and restarts on as many ranks and on others.
"""

import json
import sys

import torch
from mpi4py import MPI
from petsc4py import PETSc  # noqa: F401  it starts on all ranks together
from torch import nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.curvature import recall_whole, whole_memory

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


def closure_of(optimizer, network, loss, x, y):
    def closure():
        optimizer.zero_grad()
        with nna.exactly(network):
            value = loss(network(x), y)
            value.backward()
        return value

    return closure


def train(network, optimizer, loss, own, which=slice(None)):
    """The network's outputs for the first batch, after steps with some of the batches."""
    for x, y in batches()[which]:
        optimizer.step(closure_of(optimizer, network, loss, x[own], y[own]))
    network.eval()
    with torch.no_grad():
        return network(batches()[0][0]).reshape(-1).tolist()


def shared(comm, precision, late=0):
    """Ranks that share batches, in unequal parts."""
    network, loss = plain(), nna.CrossEntropy()
    team = comm if comm.size > 1 else None
    optimizer = nna.KFAC(
        network,
        loss,
        None,
        0,
        team,
        fisher="exact",
        messages=precision,
        late=late,
        inverse_every=2,
        l2=1e-3,
        damping=0.1,
        judge_every=2,
    )
    found = train(network, optimizer, loss, own_rows(comm))
    factors = optimizer.factors
    numbers = sum(sums.lower.numel() for pair in factors.sums.values() for sums in pair)
    held = numbers + sum(each.numel() for each in (*optimizer.inverse.A, *optimizer.inverse.G))
    return {"outputs": found, "sent": comm.allgather(factors.sent), "held": comm.allgather(held)}


def own_rows(comm):
    """This rank's samples of a batch, in unequal parts."""
    return slice(comm.rank**2, (comm.rank + 1) ** 2 if comm.rank + 1 < comm.size else None)


def without_factors(comm, **words):
    """Hessian-free steps and natural gradients: outputs, and whether the weights are equal to the last bit."""
    network, loss = plain(), nna.CrossEntropy()
    optimizer = nna.HessianFree(network, loss, fisher="exact", team=comm if comm.size > 1 else None, **words)
    found = train(network, optimizer, loss, own_rows(comm))
    theta = nn.utils.parameters_to_vector(network.parameters()).tolist()
    return {"outputs": found, "iterations": optimizer.iterations, "equal": comm.bcast(theta) == theta}


def broken(comm):
    """What each rank raises where one of them has a sample that is no number, and whether a weight has changed."""
    network, loss = plain(), nna.CrossEntropy()
    before = nn.utils.parameters_to_vector(network.parameters()).detach()
    found = []
    for kind in (nna.KFAC, nna.HessianFree):
        optimizer = kind(network, loss, team=comm)
        try:
            rows = torch.full((4, WIDTH), torch.nan if comm.rank == 1 else 1.0, dtype=torch.float64)
            optimizer.step(closure_of(optimizer, network, loss, rows, torch.zeros(4, dtype=torch.int64)))
        except po.SolveFailure as failure:
            found.append("not finite" in str(failure))
    is_same = torch.equal(nn.utils.parameters_to_vector(network.parameters()), before)
    return comm.allgather([*found, is_same])


def restarted(comm, other):
    """Two steps on the ranks of `comm`, and two more on those of `other`, from what was remembered."""
    world, found = MPI.COMM_WORLD, []
    network, memory, theta = plain(), None, None
    if comm != MPI.COMM_NULL:
        optimizer = kfac(network, comm)
        train(network, optimizer, nna.CrossEntropy(), own_rows(comm), slice(2))
        memory = whole_memory(optimizer, comm)
        theta = nn.utils.parameters_to_vector(network.parameters()).detach()
    memory, theta = world.bcast(memory), world.bcast(theta)
    if other != MPI.COMM_NULL:
        network = plain()
        nn.utils.vector_to_parameters(theta, network.parameters())
        optimizer = kfac(network, other)
        recall_whole(optimizer, memory, other)
        found = train(network.train(), optimizer, nna.CrossEntropy(), own_rows(other), slice(2, None))
    return world.bcast(found)


def kfac(network, comm):
    team = comm if comm.size > 1 else None
    words = dict(messages="float64", l2=1e-3, damping=0.1, judge_every=2, inverse_every=3)
    return nna.KFAC(network, nna.CrossEntropy(), fisher="exact", team=team, **words)


def chained(comm):
    network, loss = odenet(comm), nna.CrossEntropy()
    optimizer = nna.KFAC(network, loss, damping=0.1, l2=1e-3, judge_every=2)
    found = train(network, optimizer, loss, slice(None))
    return {"outputs": found, "damping": optimizer.damping}


def main(path):
    world, result, comms = MPI.COMM_WORLD, {}, {}
    for size in (1, 2, 4):
        comm = comms[size] = world.Split(0 if world.rank < size else MPI.UNDEFINED)
        if comm != MPI.COMM_NULL:
            for precond in ("kfac", "none"):
                result[f"free {precond} {size}"] = without_factors(comm, precond=precond, cg_rtol=1e-6)
            network = plain()
            result[f"whole {size}"] = train(network, kfac(network, comm), nna.CrossEntropy(), own_rows(comm))
            result[f"natural {size}"] = without_factors(comm, **nna.NATURAL)
            for precision in ("float64", "bfloat16"):
                result[f"{precision} {size}"] = shared(comm, precision)
            result[f"late {size}"] = shared(comm, "float64", late=1)
            if size < 4:
                result[f"chain {size}"] = chained(comm)
    result["broken"] = broken(world)
    result["restarted"] = {f"{a} {b}": restarted(comms[a], comms[b]) for a, b in ((2, 2), (2, 4), (4, 1))}
    serial = nna.serial_network(odenet(MPI.COMM_SELF))
    if world.rank == 0:
        loss = nna.CrossEntropy()
        optimizer = nna.KFAC(serial, loss, damping=0.1, l2=1e-3, judge_every=2)
        result["serial"] = {"outputs": train(serial, optimizer, loss, slice(None)), "damping": optimizer.damping}
        with open(path, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1])
