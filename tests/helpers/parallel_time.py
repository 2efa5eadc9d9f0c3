"""Time-parallel parts on several ranks against one rank: `python -m tests.helpers.parallel_time` under mpiexec.

Each rank keeps its rows of whole arrays and compares with what a grid on one rank alone, which every rank makes
for itself, gives for the whole. One run for each number of ranks serves all test files: see `check`.
"""

from __future__ import annotations

import functools
import subprocess
import traceback

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pdeopt.control.metric import RieszMetric
from pdeopt.control.objective import TerminalLoss, Tracking
from pdeopt.control.propagator import Propagator, PropagatorSettings
from pdeopt.core.errors import InputError, SolveFailure, as_raised
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.kkt.operator import KKTOperator
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.precond.blockjacobi import TimeBlockJacobi
from pdeopt.precond.circulant import CirculantPC
from pdeopt.precond.frequencies import Frequencies, mean
from pdeopt.precond.matching import matched_shift
from pdeopt.precond.operator import BlockOperator
from pdeopt.precond.timemg import TimeMultigridPC
from pdeopt.precond.wathen import WathenPC
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.linear_mgrit import LinearMgrit, LinearMgritSettings
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.transfer import adjoint_interpolation, injection, interpolation, piecewise_constant, transfer_matrix
from pdeopt.steps.windows import Windows, alike, sum_windows
from tests.helpers import examples
from tests.helpers.inequalities import inequalities
from tests.helpers.krylov import fails_everywhere, heat, operator_at_zero, options, same_histories, solver, spoil
from tests.helpers.matrices import densify, randn, random_pattern, random_steps
from tests.helpers.support import python

RANKS = (3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 5)))


@functools.cache
def _run(ranks):
    """What a run printed, and its errors."""
    try:
        done = python("-m", "tests.helpers.parallel_time", ranks=ranks)
    except subprocess.TimeoutExpired as hang:  # kept, so that one hang costs its time once
        return [(stream or b"").decode() for stream in (hang.stdout, hang.stderr)]
    return done.stdout, done.stderr


def check(part, ranks):
    """Assert that `part` gave the same on this many ranks."""
    printed, errors = _run(ranks)
    assert f"{part}: same" in printed.splitlines(), errors[-4000:]


def grids(N):
    """A grid of unequal steps on all ranks, on this rank alone, and the rows of this rank."""
    times = np.cumsum(1.0 + 0.2 * np.sin(np.arange(N + 1)))
    grid = TimeGrid(times)
    return grid, TimeGrid(times, MPI.COMM_SELF), slice(grid.begin, grid.end)


def gathered(rows):
    """The rows of all ranks, on all ranks."""
    return torch.from_numpy(np.concatenate(MPI.COMM_WORLD.allgather(rows.numpy())))


def assert_same(found, expected, tolerance=1e-13):
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max(), (found - expected).abs().max()


def windows():
    for N in (7, 12):
        grid, alone, own = grids(N)
        rows, pattern = randn(N, 3), random_pattern(3, 4)
        steps, one = random_steps(pattern, N), random_steps(pattern, 1)
        for size in (1, 2, 3, 5, 20):
            parts, whole = Windows(grid, size), Windows(alone, size)
            assert_same(gathered(parts.sum(rows[own])), whole.sum(rows))
            for matrix in (steps, one):
                found, expected = sum_windows(parts, matrix[own]), sum_windows(whole, matrix)
                found, expected = found.values.expand(len(parts.ends), -1), expected.values.expand(len(whole.ends), -1)
                assert_same(gathered(found), expected)
        assert alike(grid, one) and not alike(grid, one, steps[own])
        assert not alike(grid, steps[grid.mpi.rank : grid.mpi.rank + 1])  # constant on every rank, but not the same


def innerproduct():
    N, n = 7, 4
    grid, alone, own = grids(N)
    pattern = Sparsity.banded(n)
    values = torch.linspace(0.5, 2.0, N, dtype=torch.float64)[:, None] * randn(1, pattern.nnz)
    last = values.clone()
    last[: N - 1, 3] = 0.0  # an entry that the last step alone has
    only = torch.zeros_like(values)
    only[-1] = values[-1]
    for entries in (values, last, only, randn(N, pattern.nnz, seed=3)):
        seen = entries[own].any(0)
        local = torch.zeros(n, n, dtype=torch.float64)
        local[pattern.rows[seen], pattern.cols[seen]] = 1.0
        form = InnerProduct.from_values(Sparsity(local), entries[own][:, seen]).agreed(grid)
        whole = InnerProduct.from_values(pattern, entries)
        dense = [densify(each.spread()) for each in (form, whole)]
        assert_same(gathered(dense[0]), dense[1])
        assert alike(grid, form.matrix) == whole.matrix.is_constant
        for size in (2, 3, 5):
            sums = form.sum(Windows(grid, size)), whole.sum(Windows(alone, size))
            assert_same(gathered(densify(sums[0].spread())), densify(sums[1].spread()))


def mgrit():
    n = 3
    for N in (7, 8, 20):
        grid, alone, own = grids(N)
        r = randn(N, n)
        for batch in (1, N):
            A = random_steps(random_pattern(n, n, 0.5, 1, diagonal=True), batch, shift=4.0)
            B = random_steps(random_pattern(n, n, 0.5, 2), batch, seed=5)
            for window in (2, 3, 4, 7, 50):
                for cycles in (1, 2):
                    settings = LinearMgritSettings(window, cycles)
                    whole, part = LinearMgrit(alone, A, B, settings), LinearMgrit(grid, A[own], B[own], settings)
                    assert_same(gathered(part.forward(r[own])), whole.forward(r))
                    assert_same(gathered(part.adjoint(r[own])), whole.adjoint(r))


def frequencies():
    for N in (7, 12):
        grid, alone, own = grids(N)
        rows, parts, whole = randn(N, 4), Frequencies(grid), Frequencies(alone)
        found, expected = parts.forward(rows[own]), torch.from_numpy(whole.forward(rows))
        assert_same(gathered(torch.from_numpy(found)), expected)
        assert_same(gathered(parts.backward(found)), rows)
        steps = random_steps(random_pattern(3, 4), N)
        assert_same(*(torch.from_numpy(mean(*each).data) for each in ((grid, steps[own]), (alone, steps))))


def propagator():
    """Solves to rounding by MGRIT are those by substitution, from rank to rank."""
    problem = heat(14, T=0.5)
    lin, r = problem.at(problem.create_primal()), randn(problem.grid.num_steps, problem.n)
    own = r[problem.grid.begin : problem.grid.end]
    for window in (2, 4):
        with options(mgrit_window=window):
            serial, parallel = (Propagator(problem.grid, PropagatorSettings(kind)) for kind in ("serial", "mgrit"))
            for way in ("forward", "backward"):
                found, expected = (gathered(getattr(p, way)(lin.jacobian, own)) for p in (parallel, serial))
                assert_same(found, expected, 1e-11)


def timegrid():
    for N in (5, 7, 12):
        grid, alone, _ = grids(N)
        for factor in (1, 2, 3, 7, 20):
            coarse, whole = grid.coarsen(factor), alone.coarsen(factor)
            ends = [end for end in grid.window_ends(factor) if grid.begin < end <= grid.end]
            assert (coarse is None) == (not ends)  # a step belongs to who owns its last node
            assert coarse is None or coarse.n_local == len(ends)
            steps = np.zeros(0) if coarse is None else coarse.steps.dt.numpy()
            assert_same(gathered(torch.from_numpy(steps)), whole.steps.dt)
            if coarse is not None:  # messages stay within the ranks that are left
                assert float(coarse.sum(float(coarse.n_local))) == whole.num_steps
                assert coarse.mpi.size == sum(coarse.mpi.allgather(1)) <= grid.mpi.size
                shifted, again = coarse.shift(coarse.steps.t_new[:, None]), coarse.coarsen(2)
                assert torch.equal(shifted[coarse.begin == 0 :], coarse.steps.t_old[coarse.begin == 0 :, None])
                assert again is None or again.num_steps == -(-whole.num_steps // 2)
            assert grid.coarsen(factor) is coarse


def transfer():
    kinds = [(interpolation, 2), (piecewise_constant, 1), (adjoint_interpolation, 3), (injection, 1)]
    width = sum(size for _, size in kinds)
    for N in (5, 7, 12):
        for factor in (2, 3, 20):
            grid, alone, own = grids(N)
            coarse, whole = grid.coarsen(factor), alone.coarsen(factor)
            P = transfer_matrix(grid, coarse, grid.comm, [(kind(grid, factor), size) for kind, size in kinds])
            T = [torch.from_numpy(kind(alone, factor).toarray()) for kind, _ in kinds]
            below = slice(0, 0) if coarse is None else slice(coarse.begin, coarse.end)
            x, y = randn(whole.num_steps, width), randn(N, width, seed=2)
            sizes = [size for _, size in kinds]
            right, left = P.createVecs()
            right.setArray(torch.cat([part[below].ravel() for part in x.split(sizes, 1)]).numpy())
            P.mult(right, left)
            assert_same(fields(left, sizes), torch.cat([t @ part for t, part in zip(T, x.split(sizes, 1))], 1))
            left.setArray(torch.cat([part[own].ravel() for part in y.split(sizes, 1)]).numpy())
            P.multTranspose(left, right)
            assert_same(fields(right, sizes), torch.cat([t.T @ part for t, part in zip(T, y.split(sizes, 1))], 1))
            P.destroy()


def fields(vec, sizes):
    """All rows of a vector of fields with these unknowns a step."""
    entries = torch.from_numpy(vec.getArray(readonly=True).copy())
    steps = len(entries) // sum(sizes)
    parts = entries.split([steps * size for size in sizes])
    return gathered(torch.cat([part.reshape(steps, size) for part, size in zip(parts, sizes)], 1))


def bump(t):
    return torch.sin(3 * t[:, None] + torch.arange(3))


OBJECTIVES = {
    "heat": Tracking(bump, examples.Heat(3, 0.1).state_mass),
    "two targets": Tracking(bump) + Tracking(bump, np.diag([1.0, 2.0, 3.0])),
    "last state": TerminalLoss(lambda u, p: (u**2).sum() + u[0] * u[2]),
    "last state and a part": Tracking(np.zeros(1), observe=np.array([0])) + TerminalLoss(lambda u, p: u[1] ** 2),
}
PROBLEMS = [lambda comm, term=term: heat(9, comm=comm, objective=term) for term in OBJECTIVES.values()]
PROBLEMS.append(lambda comm: examples.burgers(nt=9, comm=comm))


def operator_of(make, comm, hessian="gauss-newton"):
    """The KKT operator at the same point on any number of ranks."""
    problem = make(comm)
    grid, (n, m) = problem.grid, (problem.n, problem.m)
    own = slice(grid.begin, grid.end)
    u, z = 0.5 * randn(grid.num_steps, n, seed=3), 0.5 * randn(grid.num_steps, m, seed=4)
    x = problem.layout.pack(problem.create_primal(), u[own], z[own].ravel(), torch.zeros(0, dtype=u.dtype))
    operator, lam = KKTOperator(RieszMetric(problem), hessian), problem.create_multiplier()
    lam.setArray(randn(grid.num_steps, n, seed=5)[own].numpy())
    operator.set_point(problem.at(x), lam)
    return operator


def blocks():
    for make in PROBLEMS:
        for hessian in ("metric", "gauss-newton"):
            part, whole = (KKTBlocks.of(operator_of(make, comm, hessian)) for comm in (None, MPI.COMM_SELF))
            N, n = whole.grid.num_steps, whole.n
            while whole.grid.num_steps > 1:
                own = slice(part.grid.begin, part.grid.end) if part else slice(0, 0)
                lam = randn(whole.grid.num_steps, n, seed=6)
                empty = torch.zeros(0, n, dtype=torch.float64)
                assert_same(gathered(part.schur(lam[own]) if part else empty), whole.schur(lam), 1e-12)
                for with_old_state in (False, True):
                    expected = densify(matched_shift(whole, with_old_state)).expand(whole.grid.num_steps, -1, -1)
                    found = expected[:0] if part is None else densify(matched_shift(part, with_old_state))
                    found = found.expand(len(range(*own.indices(N))), -1, -1)
                    assert_same(gathered(found), expected, 1e-12)
                cut = None if part is None else part.cut(2)
                assert_same(gathered(cut.schur(lam[own]) if cut else empty), whole.cut(2).schur(lam), 1e-12)
                part, whole = part and part.coarsen(2), whole.coarsen(2)


def wathen():
    def make(comm):
        return heat(14, comm=comm)

    for schur, propagator in (
        ("matched", "mgrit"),
        ("matched", "window"),
        ("matched", "forward"),
        ("matched", "multigrid"),
        ("old_new", "mgrit"),
        ("new_state", "forward"),
    ):
        words = dict(mgrit_window=4, test_wathen_timemg_coarsest=2)
        same_histories(make, WathenPC, wathen_schur=schur, wathen_propagator=propagator, **words)
    same_histories(make, WathenPC, wathen_schur="exact")
    for problem in PROBLEMS[1:]:
        same_histories(problem, WathenPC, mgrit_window=2, wathen_propagator="mgrit")
    operator = operator_at_zero(make(None))
    fails_everywhere(BlockOperator(spoil(operator, "singular")), WathenPC, "singular")


def circulant():
    for problem in (lambda comm: heat(14, comm=comm), *PROBLEMS):
        same_histories(problem, CirculantPC)


def blockjacobi():
    def make(comm):
        return heat(12, comm=comm)

    for window in (3, 4, 20):
        for local in ("wathen", "krylov"):
            same_histories(make, TimeBlockJacobi, block_jacobi_window=window, block_jacobi_local=local)
    grid = make(None).grid
    fits = not any(MPI.COMM_WORLD.allgather(grid.begin % 2 != 0))
    operator = operator_at_zero(make(None))
    if fits:
        same_histories(make, TimeBlockJacobi, block_jacobi_window=2, block_jacobi_local="exact")
        with options(block_jacobi_window=2, block_jacobi_local="exact"):
            for kind in ("singular", "NaN"):
                fails_everywhere(BlockOperator(spoil(operator, kind)), TimeBlockJacobi, "window 6 (steps 11 to 12)")
    with options(block_jacobi_window=5, block_jacobi_local="exact"), solver(operator, TimeBlockJacobi()) as ksp:
        try:
            with as_raised():
                ksp.setUp()
        except InputError as error:
            assert "borders of ranks" in str(error)
        else:
            raise AssertionError("a window reaches over a border")


def timemg():
    def make(comm):
        return heat(13, comm=comm)

    words = dict(block_jacobi_window=4, test_timemg_coarsest=2)
    same_histories(make, TimeMultigridPC, **words)
    same_histories(make, TimeMultigridPC, test_timemg_transfer="injection", test_timemg_coarsening=4, **words)
    same_histories(make, TimeMultigridPC, test_timemg_operators="galerkin", test_pc_mg_cycle_type="v", **words)
    same_histories(PROBLEMS[-1], TimeMultigridPC, test_pc_mg_cycle_type="v", **words)
    operator = operator_at_zero(make(None))
    for kind in ("singular", "not finite"):
        fails_everywhere(BlockOperator(spoil(operator, kind)), TimeMultigridPC, kind)
        with options(wathen_propagator="multigrid"):
            fails_everywhere(BlockOperator(spoil(operator, kind)), WathenPC, kind)


def reduced():
    """The reduced Hessian and the iterations of conjugate gradients on it, flexible ones where sweeps are inexact."""
    nodal = functools.partial(examples.dense, True, 9)
    for make in (*PROBLEMS, nodal, examples.held_and_seen_at_one_end):
        compare_reduced(make)
    with options(propagator="mgrit", mgrit_window=4):
        for make in (PROBLEMS[0], PROBLEMS[2], PROBLEMS[-1], examples.held_and_seen_at_one_end):
            compare_reduced(make)
        reduced_fails_everywhere()
    reduced_fails_everywhere()


def reduced_fails_everywhere():
    """A step of the last rank alone that is singular or not a number is named on all ranks, and none waits."""
    for entry, words in ((0.0, "singular: step 9"), (torch.nan, "not finite: step 9")):
        problem, message = examples.burgers(nt=9), ""
        lin = problem.at(problem.create_primal())
        right, last = (lin.gradient, lin.residual), problem.grid.is_last
        if last:
            lin.jacobian.blocks["A"].values[-1] = entry
        kkt = KKTSolver(RieszMetric(problem), "gauss-newton", "test_", "reduced")
        kkt.set_point(lin)
        try:
            kkt.solve_blocks(*right, 1e-8)
        except SolveFailure as failure:
            message = str(failure)
        assert all(words in each for each in MPI.COMM_WORLD.allgather(message)), message
        kkt.destroy()


def compare_reduced(make):
    """On all ranks and on one."""
    solutions = []
    for comm in (None, MPI.COMM_SELF):
        problem = make(comm)
        lin = problem.at(problem.create_primal())
        kkt = KKTSolver(RieszMetric(problem), "gauss-newton", "test_", "reduced")
        kkt.set_point(lin)
        x, lam = kkt.solve_blocks(lin.gradient, lin.residual, 1e-10)
        u, _, p = problem.fields(x)
        rows = u, problem.layout.rows(lam)
        solutions.append((*(map(gathered, rows) if comm is None else rows), p, kkt.take_iterations()))
        kkt.destroy()
    *found, its = solutions[0]
    *expected, alone = solutions[1]
    assert alone > 0 and abs(its - alone) <= 1, (its, alone)
    for each, other in zip(found, expected):
        assert not len(other) or (each - other).abs().max() <= 1e-8 * other.abs().max()


PARTS = [
    timegrid,
    frequencies,
    propagator,
    windows,
    innerproduct,
    mgrit,
    transfer,
    blocks,
    wathen,
    circulant,
    blockjacobi,
    timemg,
    reduced,
    inequalities,
]

if __name__ == "__main__":
    for part in PARTS:
        try:
            part()
        except BaseException:
            traceback.print_exc()
            MPI.COMM_WORLD.Abort(1)  # the other ranks would wait
        MPI.COMM_WORLD.Barrier()
        if MPI.COMM_WORLD.rank == 0:
            print(f"{part.__name__}: same", flush=True)
