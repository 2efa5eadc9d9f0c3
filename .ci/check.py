"""Run with mpiexec -n 2: do PETSc, mpi4py and mpiexec belong together? Prints the versions."""

import sys

import numpy
from mpi4py import MPI
from petsc4py import PETSc

version = PETSc.Sys.getVersion()
if MPI.COMM_WORLD.size != 2:
    # Another MPI's mpiexec starts two runs of one rank each.
    sys.exit("pdeopt: this mpiexec is not that of mpi4py; is the right one first in PATH?")
if PETSc.COMM_WORLD.tompi4py().allreduce(1) != 2:
    sys.exit("pdeopt: petsc4py and mpi4py were built with different MPIs")
if not (3, 18) <= version[:2] <= (3, 26):
    sys.exit("pdeopt: PETSc 3.18 to 3.26 is needed, this is {}.{}.{}".format(*version))
if MPI.COMM_WORLD.rank == 0:
    print("PETSc {}.{}.{}".format(*version), f"NumPy {numpy.__version__}", sep=", ", end=", ")
    print("{} {}.{}.{}".format(MPI.get_vendor()[0], *MPI.get_vendor()[1]), flush=True)
