"""Kernel matrices on the first 1, 2, ... of the ranks: `python -m tests.helpers.parallel_kernels FILE`."""

import sys

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from pdeopt.lowrank import Gaussian, HierarchicalPC, HierarchicalSettings, KernelMatrix, PivotedCholesky
from pdeopt.optimize.descent import SupportNewtonSettings, SupportVectorNewton

N = 500


def points():
    """In the plane, some of them equal, and values there."""
    generator = np.random.default_rng(3)
    x = generator.random((N, 2))
    x[50:60] = x[0]
    return x, generator.standard_normal(N)


def numbers(comm):
    """What should not depend on the ranks: whole vectors and numbers by name, on each rank."""
    x, b = points()
    operator = KernelMatrix(Gaussian(0.3), x, 0.05, HierarchicalSettings(rtol=1e-11, leaf=40), comm)
    matrix = operator.shell()
    right, product = matrix.createVecs()
    right.setArray(b[slice(*right.getOwnershipRange())])
    matrix.mult(right, product)
    found = {"product": product, "diagonal": matrix.getDiagonal()}
    steps = {}
    for name, value in (("pc_type", "python"), ("pc_python_type", "pdeopt.lowrank.HierarchicalPC")):
        PETSc.Options().setValue(name, value)
    for name, rank in (("rank", 0), ("rank", 6), ("centers", 60)):
        PETSc.Options().setValue(f"hier_{name}", rank)
        ksp = PETSc.KSP().create(comm)
        ksp.setOperators(matrix)
        ksp.setType("cg")
        ksp.setTolerances(rtol=1e-10, max_it=100)
        ksp.setFromOptions()
        context = ksp.getPC().getPythonContext()
        solution = right.duplicate()
        ksp.solve(right, solution)
        found[f"solution, {name} {rank}"] = solution
        steps[f"steps, {name} {rank}"] = ksp.getIterationNumber() if ksp.getConvergedReason() > 0 else -1
        assert isinstance(context, HierarchicalPC)
        if rank == 0:
            steps["log det"] = context.factor.log_determinant()
        ksp.destroy()
        PETSc.Options().delValue(f"hier_{name}")
    for name in ("pc_type", "pc_python_type"):
        PETSc.Options().delValue(name)
    mpi = comm.tompi4py()
    factor = PivotedCholesky(Gaussian(0.3), x, 1e-12, comm=mpi)
    machine = SupportVectorNewton(factor, np.sign(x[:, 0] - 0.5 + 0.1 * b), 1.0, SupportNewtonSettings(rtol=1e-8))
    machine.solve()
    steps["solution, dual of support vectors"] = machine.dual()
    whole = {name: np.concatenate(mpi.allgather(vector.getArray().copy())) for name, vector in found.items()}
    return whole | {name: np.array(value) for name, value in steps.items()}


if __name__ == "__main__":
    world = MPI.COMM_WORLD
    results = {}
    for ranks in range(1, world.size + 1):
        part = world.Split(0 if world.rank < ranks else MPI.UNDEFINED, world.rank)
        if part != MPI.COMM_NULL:
            results |= {f"{ranks}: {name}": value for name, value in numbers(PETSc.Comm(part)).items()}
    if world.rank == 0:
        np.savez(sys.argv[1], **results)
