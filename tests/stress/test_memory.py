"""Memory stays flat: hundreds of solves and thousands of batches leave nothing behind."""

import gc
import math
import resource
from functools import partial

import pytest
import torch
from petsc4py import PETSc
from torch import nn

import nn_adapters as nna
import pdeopt as po
from pdeopt.core.arrays import free_garbage
from tests.helpers import examples
from tests.helpers.stress import tries

#: MB by which a process may grow: a KKT solver of these problems takes about one, and the allocator rounds up.
FLAT = 4.0


def resident():
    """MB of this process."""
    gc.collect()
    free_garbage(PETSc.COMM_WORLD)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def grows(repeat, times, warm):
    """MB by which the process grows over `times` calls, after `warm` of them.

    A leak grows in each row of calls; the allocator takes more room once, at any time: the least of three rows counts.
    """
    for _ in range(warm):
        repeat()
    least = math.inf
    for _ in range(3):
        before = resident()
        for _ in range(times):
            repeat()
        least = min(least, resident() - before)
        if least < FLAT:
            break
    return least


def by(way, problem):
    """Newton's method with KKT systems solved in a way."""
    po.SQPSolver(problem, type="newton", precond=way).solve()


@pytest.mark.slow
def test_solves_leave_nothing_behind(tally):
    kinds = {
        "composite": lambda problem: po.SQPSolver(problem, type="composite").solve(),
        "Newton": lambda problem: po.SQPSolver(problem, type="newton").solve(),
        "bounds": lambda problem: po.SQPSolver(problem, type="active_set", lower=-0.3, upper=0.3).solve(),
        "TAO": lambda problem: po.TaoSolver(po.ReducedObjective(problem)).solve(),
        "auto": po.solve,
        "checkpoints": lambda problem: po.TaoSolver(po.ReducedObjective(problem, checkpoints=2)).solve(),
    } | {way: partial(by, way) for way in ("reduced", "wathen", "circulant")}
    for name, solve in kinds.items():
        with tally.one(name):
            problem, times = examples.burgers(nt=6), tries(200 if name in ("auto", "reduced") else 50, 2)
            more = grows(lambda solve=solve, problem=problem: solve(problem), times, max(5, times // 3))
            assert more < FLAT, f"{more:.1f} MB in {times} solves"
            tally.tried += times - 1
    tally.check()


def test_batches_leave_nothing_behind(tally):
    torch.manual_seed(0)
    layers = nna.LayerParallel(None, lambda: nna.dense(8), 16, 1.0, coarsening="4")
    networks = {
        "layers": (nn.Sequential(nn.Linear(4, 8), layers, nn.Linear(8, 3)), (16, 4)),
        "GRU": (nn.Sequential(nna.GRUParallel(None, 4, 8, 16), nn.Linear(8, 3)), (16, 16, 4)),
    }
    for name, (network, shape) in networks.items():
        with tally.one(name):
            optimizer, x, y = torch.optim.Adam(network.parameters()), torch.randn(shape), torch.arange(16) % 3

            def batch(network=network, optimizer=optimizer, x=x, y=y):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(x), y).backward()
                optimizer.step()

            times = tries(1000, 20)
            more = grows(batch, times, max(10, times // 4))
            assert more < FLAT, f"{more:.1f} MB in {times} batches"
            tally.tried += times - 1
    tally.check()
