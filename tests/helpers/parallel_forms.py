"""Run under mpiexec: a weak form in parallel over time, and a mesh of all ranks, which is refused."""

import torch
from mpi4py import MPI

import pdeopt as po
from tests.helpers.forms import Functions, burgers, tracking

from dolfinx.mesh import create_interval  # isort: skip (after the cache is chosen)
from ufl import dx  # isort: skip

constraint, _ = burgers(32)
u0 = constraint.initial_state(torch.empty(0, dtype=torch.float64))
J = [po.solve(tracking(constraint, u0, 0.05, 8, comm=comm)).objective for comm in (None, MPI.COMM_SELF)]
assert abs(J[0] - J[1]) <= 1e-10 * J[1], J

on = Functions(create_interval(MPI.COMM_WORLD, 32, [0.0, 1.0]))
try:
    on.constraint((on.dt * on.u - on.z) * on.v * dx, bcs=[])
except po.InputError as error:
    print(error)
