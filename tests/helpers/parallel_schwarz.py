"""Objective values of a few iterations of SPQN on any number of ranks; run by test_schwarz."""

import torch
from mpi4py import MPI

from pdeopt.control.reduced import ReducedObjective
from pdeopt.optimize.coarse_time import with_coarse_space
from pdeopt.optimize.descent.quasinewton import SSBroyden
from pdeopt.optimize.descent.schwarz import SPQN
from tests.helpers import examples
from tests.helpers.functions import Rosenbrock, start


def main():
    found, comm = [], MPI.COMM_WORLD
    for words in (
        dict(),
        dict(type="multiplicative", colors=2),
        dict(sync="line", method="ssbroyden", local="ssbroyden"),
    ):
        f = Rosenbrock(16)
        result = SPQN(f, team=comm, parts=4, overlap=1, local_it=3, max_it=4, **words).minimize(start(16))
        found += result.history["objective"] + [result.history[-1].work]
    result = SSBroyden(Rosenbrock(16), team=comm, max_it=12).minimize(start(16))
    found += result.history["objective"]
    for words in (dict(), dict(type="multiplicative"), dict(local_it=0)):
        problem = examples.burgers(nx=6, nt=16)
        function = with_coarse_space(ReducedObjective(problem))
        words = dict(local_it=1, parts=4, max_it=2) | words
        result = SPQN(function, **words).minimize(torch.zeros(function.size, dtype=torch.float64))
        found += result.history["objective"] + [result.history[-1].work]
    if comm.rank == 0:
        print([float(value) for value in found], flush=True)


main()
