"""Preconditioners on KKT operators, for the tests of `pdeopt.precond`: operators, solvers, dense matrices."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pdeopt.control.metric import RieszMetric
from pdeopt.control.objective import ControlCost, Tracking
from pdeopt.control.problem import ControlProblem
from pdeopt.control.verify import randomize
from pdeopt.core.errors import SolveFailure, as_raised
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.kkt.operator import KKTOperator
from pdeopt.precond.operator import BlockOperator
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples
from tests.helpers.support import dense, entries


def heat(num_steps, alpha=1e-2, n=3, T=0.5, comm=None, objective=None):
    """The heat equation of the examples with a price of control; default is tracking a moving target."""
    constraint = examples.Heat(n, T / num_steps)
    if objective is None:
        x = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
        objective = Tracking(lambda t: torch.cos(3 * t[:, None]) * x * (1 - x), constraint.state_mass)
    price = ControlCost(alpha, constraint.control_mass)
    return ControlProblem(constraint, objective + price, TimeGrid.uniform(num_steps, T, comm))


def operator_at_random(problem, hessian, seed=4):
    """The KKT operator at a random point, and the point [u | z | p | lam]; one rank."""
    x, lam = randomize(problem.create_primal(), seed), randomize(problem.create_multiplier(), seed + 1)
    x.scale(0.5)
    operator = KKTOperator(RieszMetric(problem), hessian)
    operator.set_point(problem.at(x), lam)
    return operator, torch.cat([entries(x), entries(lam)])


def operator_at_zero(problem, hessian="gauss-newton"):
    """The KKT operator at x = 0, on any number of ranks."""
    operator = KKTOperator(RieszMetric(problem), hessian)
    operator.set_point(problem.at(problem.create_primal()), problem.create_multiplier())
    return operator


def newton_right_hand_side(problem):
    """[J' | F] at x = 0: the first right-hand side of Newton's method, its fields scaled as the problem's are."""
    lin = problem.at(problem.create_primal())
    return problem.layout.join_kkt(lin.gradient, lin.residual, problem.create_kkt())


@contextmanager
def solver(operator, context, kind="fgmres", rtol=1e-8, prefix="test_", max_it=200):
    """A KSP on the shell of a `KKTOperator` or `BlockOperator`, preconditioned by a Python context."""
    matrix = operator.shell()
    ksp = PETSc.KSP().create(matrix.getComm())
    ksp.setOptionsPrefix(prefix)
    ksp.setOperators(matrix)
    ksp.setType(kind)
    ksp.setTolerances(rtol=rtol, max_it=max_it)
    ksp.setGMRESRestart(max_it)
    ksp.setConvergenceHistory(max_it + 1)
    ksp.getPC().setType("python")
    ksp.getPC().setPythonContext(context)
    ksp.setFromOptions()
    try:
        with as_raised():
            yield ksp
    finally:
        ksp.destroy()
        matrix.destroy()


def history(operator, context, rhs=None, **words):
    """The residuals of a solve, the first among them; asserts that it converged."""
    with solver(operator, context, **words) as ksp:
        b = newton_right_hand_side(operator.problem) if rhs is None else rhs
        ksp.solve(b, b.duplicate())
        assert ksp.getConvergedReason() > 0, ksp.getConvergedReason()
        return np.array(ksp.getConvergenceHistory())


def iterations(operator, context, rhs=None, **words):
    """Iterations of a solve that converges."""
    return len(history(operator, context, rhs, **words)) - 1


def applied(pc, columns=None):
    """A PC times the columns of a dense matrix; default the identity: its own dense matrix."""
    x, y = pc.getOperators()[0].createVecs()
    results = []
    for column in torch.eye(x.getSize(), dtype=torch.float64) if columns is None else columns.T:
        x.setArray(column.numpy())
        pc.apply(x, y)
        results.append(entries(y))
    return torch.stack(results, dim=1)


def preconditioner(operator, context, columns=None, **words):
    """A preconditioner of `operator` times the columns of a dense matrix, default the identity."""
    with solver(operator, context, **words) as ksp:
        ksp.setUp()
        return applied(ksp.getPC(), columns)


def matrix_of(context):
    """The dense matrix of a `BlockOperator` or `KKTOperator`."""
    shell = context.shell()
    found = dense(shell)
    shell.destroy()
    return found


def fields(blocks):
    """Which entries of a KKT vector are u, z, p and lam."""
    layout = blocks.layout
    sizes = [layout.state_size, layout.control_size, layout.param_size, layout.state_size]
    return torch.arange(sum(sizes)).split(sizes)


def vector_of(blocks):
    """A vector of the blocks' operator."""
    shell = BlockOperator(blocks).shell()
    vec = shell.createVecLeft()
    shell.destroy()
    return vec


def windows_of(blocks, window):
    """Which entries of a KKT vector belong to the same window."""
    u, z, _, lam = fields(blocks)
    N = blocks.grid.num_steps
    step = torch.cat([torch.arange(len(own)) // (len(own) // N) for own in (u, z, lam)])
    return step[:, None] // window == step // window


def inverse_of_windows(operator, window):
    """The dense inverse of K without what couples windows."""
    blocks = operator.blocks if isinstance(operator, BlockOperator) else KKTBlocks.of(operator)
    return torch.linalg.inv(torch.where(windows_of(blocks, window), matrix_of(operator), 0.0))


def spoil(operator, kind):
    """Blocks whose last step is singular or not a number."""
    blocks = KKTBlocks.of(operator)
    rows = blocks.grid.n_local
    A, B, C = (StepMatrix(M.sparsity, M.values.repeat(rows, 1)) for M in (blocks.A, blocks.B, blocks.C))
    if blocks.grid.is_last:
        for M in (A, B, C):
            M.values[-1, M.sparsity.rows == 1] = 0.0 if kind == "singular" else torch.nan
    return replace(blocks, A=A, B=B, C=C)


def fails_everywhere(operator, context, words):
    """A failure on the last rank is the same one on all, and none waits."""
    message = ""
    try:
        with solver(operator, context()) as ksp:
            b, x = ksp.getOperators()[0].createVecs()
            b.set(1.0)
            ksp.solve(b, x)
    except SolveFailure as failure:
        message = str(failure)
    assert all(words in each for each in MPI.COMM_WORLD.allgather(message)), message


@contextmanager
def options(**words):
    """PETSc options for the length of a block."""
    for name, value in words.items():
        PETSc.Options().setValue(name, str(value))
    yield
    for name in words:
        PETSc.Options().delValue(name)


def same_histories(make, context, **words):
    """Residuals on all ranks are those on one, up to 1e-10 of the first."""
    with options(**words):
        found = history(operator_at_zero(make(None)), context())
        if MPI.COMM_WORLD.rank == 0:
            alone = history(operator_at_zero(make(MPI.COMM_SELF)), context())
            assert len(found) == len(alone), (words, found, alone)
            assert np.abs(found - alone).max() <= 1e-10 * alone[0], (words, found, alone)
