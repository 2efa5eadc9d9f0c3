"""What the MPI tests run under mpiexec: `python -m tests.helpers.parallel TASK [FILE]`.

Data come from one seed, whole on every rank, of which each keeps its rows; rank 0 writes what it gathers.
"""

from __future__ import annotations

import sys

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc

from pdeopt.control.metric import RieszMetric
from pdeopt.control.reduced import ReducedObjective
from pdeopt.control.verify import adjoint_error, symmetry_error
from pdeopt.core.errors import InputError, SolveFailure, StepFailure
from pdeopt.functions.petsc import PetscFunction
from pdeopt.kkt.coupled import CoupledKKT
from pdeopt.kkt.operator import KKTOperator
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.optimize.tao import TaoSolver
from pdeopt.steps.matrices.krylov import MatrixSolver
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples, failing


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Whole:
    """Vectors of a problem made from whole arrays, and whole arrays made from vectors."""

    def __init__(self, problem):
        self.problem, grid = problem, problem.grid
        self.rows = slice(grid.begin, grid.end)
        self.nodal = problem.control_map is not None
        self.width = problem.m // 2 if self.nodal else problem.m

    def primal(self, seed):
        problem, N = self.problem, self.problem.grid.num_steps
        u, z, p = (
            0.5 * randn(*shape, seed=seed + k)
            for k, shape in enumerate(((N, problem.n), (N + self.nodal, self.width), (problem.param_dim,)))
        )
        start, end = self.problem.grid.begin, self.problem.grid.end
        z = z[start + (self.nodal and start > 0) : end + self.nodal]
        return problem.layout.pack(problem.create_primal(), u[self.rows], z.reshape(-1), p)

    def multiplier(self, seed):
        vec = self.problem.create_multiplier()
        vec.setArray(randn(self.problem.grid.num_steps, self.problem.n, seed=seed)[self.rows].numpy())
        return vec

    def arrays(self, name, x):
        u, z, p = self.problem.fields(x)
        parts = {"u": u, "z": z.reshape(-1, self.width)}
        gathered = {f"{name}_{key}": self.problem.grid.gather(rows) for key, rows in parts.items()}
        return gathered | {f"{name}_p": p}

    def rows_of(self, name, lam):
        return {name: self.problem.grid.gather(torch.from_numpy(lam.getArray().reshape(-1, self.problem.n)))}


def evaluations(make):
    """J, F, derivatives, sweeps and operators at a random point."""
    problem = make()
    whole, metric = Whole(problem), RieszMetric(problem)
    x, dx, lam = whole.primal(1), whole.primal(5), whole.multiplier(9)
    lin, g, c = problem.at(x), problem.create_primal(), problem.create_multiplier()
    out = {"value": lin.value} | whole.arrays("gradient", lin.gradient) | whole.rows_of("residual", lin.residual)
    out |= whole.rows_of("jvp", lin.jvp(dx, c)) | whole.arrays("vjp", lin.vjp(lam, g))
    out |= whole.arrays("hvp", lin.hvp(lam, dx, g)) | whole.rows_of("adjoint", problem.solve_adjoint(lin))
    out |= whole.arrays("riesz", metric.primal_inverse(dx, g))
    out["norms"] = [metric.norm(dx), metric.dual_norm(dx), metric.residual_norm(lam)]
    design = problem.split(x)[1]
    state = problem.solve_state(design)
    out |= whole.rows_of("state", state)
    dz = problem.split(dx)[1]
    h = PetscFunction(ReducedObjective(problem)).hvp(design, dz, dz.duplicate())
    out |= whole.arrays("reduced", problem.join(state, h))
    out["adjoint_error"] = adjoint_error(lin.jvp, lin.vjp, x.duplicate(), lam.duplicate())
    for hessian in ("metric", "full", "gauss-newton"):
        operator, k = KKTOperator(metric, hessian), problem.create_kkt()
        operator.set_point(lin, lam)
        problem.layout.join_kkt(dx, lam, k)
        y, products = k.duplicate(), []
        operator.mult(None, k, y)
        products.append(y.copy())
        if problem.constraint.pattern is not None:
            matrix = operator.assemble()
            matrix.mult(k, y)
            products.append(y.copy())
            assert symmetry_error(matrix) <= 1e-14
        for way, product in zip(("shell", "aij"), products):
            problem.layout.split_kkt(product, g, c)
            name = f"{way}_{hessian}"
            out |= whole.arrays(name, g) | whole.rows_of(f"{name}_c", c)
    return problem, out


def solutions(make):
    """Optima by all solvers."""
    problem = make()
    whole, out = Whole(problem), {}
    # thousands of tiny messages: without a matrix, or with rows of p and of nodal controls that all ranks share
    slow = problem.constraint.pattern is None or (whole.nodal and problem.param_dim > 0)
    for method in ("newton",) if slow else ("composite", "newton", "feasible"):
        result = SQPSolver(problem, type=method, opt_tol=1e-11, feas_tol=1e-11).solve()
        assert result.converged, result.message
        out |= whole.arrays(method, problem.join(result.state, result.design))
        out |= whole.rows_of(f"{method}_lam", result.multiplier)
        out[f"{method}_objective"] = result.objective
        out[f"{method}_iterations"] = result.iterations
    # the square of this is the error of J; below it line searches compare rounding, and may never end
    solver = TaoSolver(ReducedObjective(problem), opt_tol=1e-7)
    result = solver.solve()
    assert result.converged, result.message
    out["tao_objective"] = result.objective
    return problem, out


def coupled():
    """Optima by the coupled form, factored and with windows as blocks, and its matrix of windows of two steps."""
    database, out = PETSc.Options(), {}
    for name, make in {
        "burgers": lambda: examples.burgers(nt=8),
        "heat": lambda: examples.heat(num_steps=7),
        "dense nodal": lambda: examples.dense(nodal=True),
    }.items():
        problem = make()
        whole, metric = Whole(problem), RieszMetric(problem)
        blocks = {"precond": "none", "pc_type": "bjacobi", "sub_pc_type": "svd"}
        for words in ({}, blocks) if name == "burgers" else ({},):
            for option, value in ({"form": "coupled", "window": 2} | words).items():
                database.setValue(f"sqp_kkt_{option}", value)
            result = SQPSolver(problem, type="newton", opt_tol=1e-11, feas_tol=1e-11).solve()
            assert result.converged, result.message
            key = f"{name} solution {len(words)}"
            out |= whole.arrays(key, problem.join(result.state, result.design))
            out |= whole.rows_of(f"{key} lam", result.multiplier)
            for option in words:
                database.delValue(f"sqp_kkt_{option}")
        operator = CoupledKKT(metric, "full", 2)
        operator.set_point(problem.at(whole.primal(1)), whole.multiplier(9))
        matrix = operator.assemble()
        assert symmetry_error(matrix) <= 1e-14
        if name == "burgers":  # two steps a rank, or more: the windows are the same
            _, cols, values = matrix.getValuesCSR()
            parts = problem.grid.mpi.gather((cols, values))
            out |= {} if parts is None else dict(zip(("cols", "values"), map(np.concatenate, zip(*parts))))
    return out


def grid_task():
    """Everything that a TimeGrid sends, against the whole arrays."""
    N, n = 7, 3
    grid = TimeGrid(np.cumsum(1.0 + np.arange(N + 1)))
    rows, first, own = randn(N, n, seed=0), randn(n, seed=1), slice(grid.begin, grid.end)
    shifted = torch.cat([first[None], rows[:-1]])
    assert torch.equal(grid.shift(rows[own], first), shifted[own])
    back, cotangent = grid.shift_adjoint(rows[own])
    assert torch.equal(back, torch.cat([rows[1:], torch.zeros(1, n, dtype=rows.dtype)])[own])
    assert torch.equal(cotangent, rows[0] if grid.is_first else torch.zeros(n, dtype=rows.dtype))
    assert torch.allclose(grid.sum(rows[own].sum(0)), rows.sum(0), atol=1e-14)
    assert float(grid.max(rows[own].max())) == float(rows.max())
    bad = torch.tensor(torch.nan if grid.is_last else 1.0)
    assert grid.max(bad).isnan()
    assert torch.equal(grid.from_first(first + (0 if grid.is_first else 99)), first)
    gathered = grid.gather(rows[own])
    assert gathered is None if grid.mpi.rank else torch.equal(gathered, rows)
    assert grid.steps.index.tolist() == list(range(grid.begin + 1, grid.end + 1))


def spread_task():
    """Solves with a matrix over all ranks, one of which has no unknown, and its transpose."""
    comm = TimeGrid(np.arange(100.0)).mpi
    n = 6**3
    line = sp.diags([-np.ones(5), 2 * np.ones(6), -np.ones(5)], [-1, 0, 1])
    whole = sp.csr_matrix(sp.identity(n) + sp.kronsum(line, sp.kronsum(line, line)))
    ends = [0, 0, n] if comm.size == 2 else list(np.linspace(0, n, comm.size + 1).astype(int))
    own, right = slice(ends[comm.rank], ends[comm.rank + 1]), randn(5, n, seed=0).numpy()
    for convection in (0.0, 0.5):
        A = sp.csr_matrix(whole + sp.diags([convection * np.ones(n - 1)], [1]))
        rows, size = A[own], (own.stop - own.start, n)
        pattern = (rows.indptr.astype(np.int32), rows.indices.astype(np.int32), rows.data)
        matrix = PETSc.Mat().createAIJ((size, size), csr=pattern, comm=comm)
        for pc_type in ("lu", "hypre", "gamg", "bjacobi"):
            if not PETSc.Sys.hasExternalPackage({"lu": "mumps"}.get(pc_type, "hypre")) and pc_type in ("lu", "hypre"):
                continue
            solver = MatrixSolver(matrix, pc_type=pc_type)
            assert solver.is_symmetric == (convection == 0)
            for transpose, expected in ((False, A), (True, A.T)):
                found = np.concatenate(comm.allgather(solver.solve(right[:, own], transpose)), axis=1)
                missed = np.linalg.norm(expected @ found.T - right.T, axis=0) / np.linalg.norm(right, axis=1)
                assert missed.max() <= 2e-10, (pc_type, transpose, missed)
    A = PETSc.Mat().createAIJ((size, size), csr=(*pattern[:2], 0 * rows.data), comm=comm)
    for pc_type in ("lu", "bjacobi"):
        try:
            MatrixSolver(A, row=3, pc_type=pc_type).solve(right[:, own])
        except (StepFailure, InputError) as failure:
            assert isinstance(failure, InputError) or failure.row == 3
        else:
            raise AssertionError(f"a singular matrix was solved with by {pc_type}")


def failing_task():
    """A step without a solution on one rank is the same failure on all, and a result on all."""
    problem = failing.blow_up()
    design = problem.create_design()
    design.set(0.0 if problem.grid.is_first else 50.0)
    try:
        problem.solve_state(design)
    except SolveFailure:
        pass
    else:
        raise AssertionError("there is no state")
    problem.constraint.pattern  # noqa: B018
    if problem.grid.is_last:
        problem.constraint.left = 4  # NaN on one rank alone
    for method in ("composite", "newton"):
        result = SQPSolver(problem, type=method, start="initial").solve()
        assert result.reason < 0, result.message


def raising_task():
    """An error in a user's function on one rank alone."""
    from problems.shared.command_line import start

    def main():
        problem = examples.burgers()
        if problem.grid.is_last:
            problem.constraint.residual = lambda *arguments: 1 / 0
        SQPSolver(problem).solve()

    start(main)


TASKS = {
    "dense": lambda: examples.dense(),
    "dense nodal": lambda: examples.dense(nodal=True),
    "layer": lambda: examples.layer(),
    "burgers nodal": lambda: examples.burgers(nodal=True, nt=7),
    "heat": lambda: examples.heat(),
}

if __name__ == "__main__":
    task = sys.argv[1]
    if task == "coupled":
        found = coupled()
        if PETSc.COMM_WORLD.rank == 0:
            np.savez(sys.argv[2], **{key: np.asarray(value) for key, value in found.items()})
    elif task in ("grid", "spread", "failing", "raising"):
        {"grid": grid_task, "spread": spread_task, "failing": failing_task, "raising": raising_task}[task]()
    else:
        found = {}
        for name, make in TASKS.items():
            for kind in (evaluations, solutions):
                problem, arrays = kind(make)
                found |= {f"{name}: {key}": value for key, value in arrays.items()}
        if PETSc.COMM_WORLD.rank == 0:
            np.savez(sys.argv[2], **{key: np.asarray(value) for key, value in found.items()})
