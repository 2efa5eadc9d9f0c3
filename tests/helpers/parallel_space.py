"""Steps that are spread over ranks against whole ones: `python -m tests.helpers.parallel_space` under mpiexec.

Every rank makes the problem for itself alone, too, on `MPI.COMM_SELF`, and compares its rows, in natural numbers. One
run for each number of ranks serves all test files: see `check`.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import traceback

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from petsc4py import PETSc

import pdeopt as po
from pdeopt.control.metric import RieszMetric
from pdeopt.core.arrays import assign, copy
from pdeopt.kkt.operator import KKTOperator
from pdeopt.space.layouts.layout import without_messages
from pdeopt.space.layouts.matrix import spread_aij
from pdeopt.space.spacejacobian import SpaceStepJacobian
from pdeopt.steps import stepsolve
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.stepsolve import StepKrylov
from problems.heat3d import Heat3dCase, Heat3dSettings
from tests.helpers.krylov import options
from tests.helpers.parallel_spread import EXACT, SELF, SPREAD, WORLD, splits
from tests.helpers.support import python

RANKS = (2, pytest.param(4, marks=pytest.mark.slow))


@functools.cache
def _run(ranks):
    try:
        done = python("-m", "tests.helpers.parallel_space", ranks=ranks)
    except subprocess.TimeoutExpired as hang:
        return [(stream or b"").decode() for stream in (hang.stdout, hang.stderr)]
    return done.stdout, done.stderr


def check(part, ranks):
    """Assert that `part` gave the same on this many ranks."""
    printed, errors = _run(ranks)
    assert f"{part}: same" in printed.splitlines(), errors[-4000:]


class Counted:
    """A communicator that counts messages."""

    def __init__(self, mpi):
        self.mpi, self.count = mpi, 0

    def __getattr__(self, name):
        return getattr(self.mpi, name)

    def Isend(self, *args):
        self.count += 1
        return self.mpi.Isend(*args)


def random_layout(seed):
    """Owned numbers and ghosts by chance; some ranks own nothing or see nothing."""
    draw = np.random.default_rng([seed, WORLD.rank])
    owned = int(draw.choice([0, 1, 5]))
    starts = np.r_[0, np.cumsum(WORLD.allgather(owned))]
    others = np.r_[: starts[WORLD.rank], starts[WORLD.rank + 1] : starts[-1]]
    return po.Layout(WORLD, owned, draw.permutation(others)[: draw.integers(0, 1 + len(others))])


def total(x):
    return WORLD.allreduce(float(x.sum()))


def exchange():
    """<E x, y> = <x, E'y>; derivatives of any order and under vmap; one message a neighbor for all rows."""
    for seed in range(6):
        layout, draw = random_layout(seed), torch.Generator().manual_seed(WORLD.rank)
        x, dx = (torch.randn(7, layout.n_owned, generator=draw, dtype=torch.float64) for _ in range(2))
        y = torch.randn(7, layout.n_all, generator=draw, dtype=torch.float64)
        scale = 1 + total(layout.extend(x).abs() * y.abs())
        assert abs(total(layout.extend(x) * y) - total(x * layout.collect(y))) <= 1e-14 * scale
        seen = torch.cat([x, dx]).reshape(2, 7, -1)
        assert torch.equal(torch.func.vmap(layout.extend)(seen), layout.extend(seen))

        def cubes(u, layout=layout):
            return layout.extend(u) ** 3

        torch.testing.assert_close(torch.func.jvp(cubes, (x,), (dx,))[1], 3 * layout.extend(x) ** 2 * layout.extend(dx))
        variable = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((cubes(variable) * y).sum(), variable, create_graph=True)
        torch.testing.assert_close(gradient, layout.collect(3 * layout.extend(x) ** 2 * y))
        (second,) = torch.autograd.grad((gradient * dx).sum(), variable)
        torch.testing.assert_close(second, layout.collect(6 * layout.extend(x) * layout.extend(dx) * y))
        counted = layout.mpi = Counted(layout.mpi)
        layout.extend(x)
        assert counted.count == len(layout._to)
        with pytest.raises(po.InputError, match="a test"), without_messages("a test"):
            layout.extend(x)
            raise po.InputError("a test", "", "")  # of a layout without ghosts


def layouts():
    """Boxes of a grid and parts of a graph see the values of the right unknowns."""
    shape = (5, 4, 3)
    for stencil in ("star", "box"):
        patch = po.grid_layout(WORLD, shape, 1, stencil)
        natural = patch.layout.extend(torch.from_numpy(patch.layout.natural.astype(float))[None])[0].numpy()
        assert sorted(np.concatenate(WORLD.allgather(patch.layout.natural))) == list(range(60))
        rows, cols = patch.stencil().nonzero()
        places = [np.array(np.unravel_index(natural[k].astype(int), shape)) for k in (rows, cols)]
        distance = np.abs(places[0] - places[1])
        assert distance.max() <= 1 and (distance.sum(0) <= (1 if stencil == "star" else 3)).all()
        each = [sp.diags([np.ones(n - abs(k)) for k in (-1, 0, 1)], [-1, 0, 1], shape=(n, n)) for n in shape]
        if stencil == "box":
            whole = functools.reduce(sp.kron, each)
        else:
            eye = [sp.identity(n) for n in shape]
            whole = sum(functools.reduce(sp.kron, [each[i] if i == k else eye[i] for i in range(3)]) for k in range(3))
        assert WORLD.allreduce(len(rows)) == whole.count_nonzero(), stencil
    graph = sp.csr_matrix(sp.random(30, 30, 0.1, random_state=1) + sp.identity(30))
    layout, numbers = po.pattern_layout(WORLD, graph)
    found = layout.extend(torch.from_numpy(layout.natural.astype(float))[None])[0]
    assert np.array_equal(found.numpy(), numbers)
    assert set(graph[layout.natural].indices) <= set(numbers)


class Reaction(po.SpaceConstraint):
    """u' = ((1 + u^2) u_x)_x - p u^3 + a mean of z over neighbors, on a line, with a mass that couples ranks."""

    param_dim = 1

    def __init__(self, comm, n=12):
        self.patch = po.grid_layout(comm, (n,))
        super().__init__(self.patch.layout, self.patch.layout)
        self.n, self.order = n, torch.from_numpy(self.patch.order)
        pattern = self.patch.stencil()
        values = np.where(pattern.nonzero()[0] == pattern.nonzero()[1], 2.0, 0.5) / (3 * n)
        mass = po.Sparsity(pattern, self.layout)
        self.state_mass = po.StepMatrix(mass, torch.from_numpy(values)[None])

    def local_residual(self, u_old, u_new, z, steps):
        own, (u, v) = (
            slice(self.layout.n_owned),
            (torch.nn.functional.pad(x, (0, 1))[:, self.order] for x in (u_new, z)),
        )
        flux = (1 + (0.5 * (u[:, 1:] + u[:, :-1])) ** 2) * (u[:, 1:] - u[:, :-1])
        rate = 0.1 * (flux[:, 1:] - flux[:, :-1]) - steps.p * u[:, 1:-1] ** 3 + (v[:, :-2] + v[:, 1:-1] + v[:, 2:]) / 3
        return (u_new[:, own] - u_old[:, own] - steps.dt[:, None] * rate) / self.n

    def initial_state(self, p):
        return p * torch.from_numpy(np.sin(1.0 + self.layout.natural))


def problem_of(comm, space_ranks, make=Reaction):
    grid = po.TimeGrid.uniform(6, 1.0, comm, space_ranks)
    constraint = make(grid.space_comm)
    target = torch.from_numpy(np.cos(0.5 * constraint.layout.natural))
    objective = po.Tracking(target, constraint.state_mass) + po.ControlCost(1e-2)
    return po.ControlProblem(constraint, objective, grid)


def natural_rows(problem, rows):
    """All rows in natural order, on all ranks."""
    whole = problem.grid.gather(rows)
    order = problem.constraint.layout.natural_order
    whole = None if whole is None else whole[:, np.argsort(order)]
    return WORLD.bcast(whole) if problem.grid.mpi.size == WORLD.size else whole


def same(problem, alone, rows, expected, rtol=1e-12):
    found, expected = natural_rows(problem, rows), natural_rows(alone, expected)
    assert (found - expected).abs().max() <= rtol * (1 + expected.abs().max()), (found - expected).abs().max()


def point(problem, seed):
    """A vector whose entries do not depend on the ranks."""
    draw = torch.Generator().manual_seed(seed)
    natural, grid = torch.from_numpy(problem.constraint.layout.natural), problem.grid
    whole = torch.randn(2, grid.num_steps, problem.constraint.layout.size, generator=draw, dtype=torch.float64)
    u, z = 0.3 * whole[:, grid.begin : grid.end][:, :, natural]
    return problem.layout.pack(problem.create_primal(), u, z.reshape(-1), torch.ones(problem.param_dim, dtype=u.dtype))


def derivatives():
    """J, F, F', F'^T, L'' and the gradient of the reduced objective of a nonlinear problem with a parameter."""
    alone = problem_of(SELF, 1)
    for k in splits():
        problem, found = problem_of(WORLD, k), []
        for each in (problem, alone):
            lin, dx = each.at(point(each, 1)), point(each, 2)
            lam, out = each.create_multiplier(), each.create_primal()
            assign(lam, each.fields(point(each, 3))[0])
            shape = (-1, each.n)
            F, JF = copy(lin.residual).reshape(shape), copy(lin.jvp(dx, each.create_multiplier())).reshape(shape)
            w_u, w_z, w_p = each.fields(lin.vjp(lam, out))
            h_u, h_z, h_p = each.fields(lin.hvp(lam, dx, out))
            reduced = po.ReducedObjective(each)
            value, g = reduced.value_and_gradient(copy(each.split(dx)[1]))
            g, g_p = g[: each.layout.control_size], g[each.layout.control_size :]
            scalars = torch.cat([w_p, h_p, torch.tensor([lin.value, value, RieszMetric(each).norm(dx)])])
            if each.grid.is_root:
                scalars = torch.cat([scalars, g_p])
            scalars = WORLD.bcast(scalars) if each is problem else scalars
            found.append((scalars, [F, JF, w_u, w_z.reshape(shape), h_u, h_z.reshape(shape), g.reshape(shape)]))
        (scalars, rows), (expected, expected_rows) = found
        torch.testing.assert_close(scalars, expected, rtol=1e-10, atol=1e-10)
        for one, two in zip(rows, expected_rows):
            same(problem, alone, one, two, 1e-10)


def coloring():
    """Blocks are found without messages, also those with columns of ghosts."""
    constraint = problem_of(WORLD, WORLD.size).constraint
    draw = torch.Generator().manual_seed(WORLD.rank)
    n, steps = constraint.layout.n_all, po.TimeGrid.uniform(3, 1.0, SELF).steps.with_parameters(torch.ones(1))
    u_old, u_new, z = (torch.randn(3, n, generator=draw, dtype=torch.float64) for _ in range(3))
    pattern = constraint.pattern
    with without_messages("coloring"):
        found = SpaceStepJacobian.colored(constraint.local, u_old, u_new, z, steps, pattern)
    assert pattern.A.columns is constraint.layout and pattern.B.columns is None  # u_old of neighbors is not seen
    d = torch.randn(3, constraint.layout.n_owned, generator=draw, dtype=torch.float64)
    expected = torch.func.jvp(
        lambda u: constraint.local_residual(u_old, u, z, steps), (u_new,), (constraint.layout.extend(d),)
    )
    torch.testing.assert_close(found.blocks["A"](d), expected[1])


def solvers():
    """Step solves leave the matrix as it is, by factors and multigrid; one that diverges says so, or factors follow."""
    constraint = problem_of(WORLD, WORLD.size).constraint
    n, steps = constraint.layout.n_all, po.TimeGrid.uniform(3, 1.0, SELF).steps.with_parameters(torch.ones(1))
    u_old, u_new, z = (torch.ones(3, n, dtype=torch.float64) * k for k in (0.1, 0.2, 0.3))
    A = SpaceStepJacobian.colored(constraint.local, u_old, u_new, z, steps, constraint.pattern).blocks["A"]
    values, right = A.values.clone(), torch.ones(3, constraint.layout.n_owned, dtype=torch.float64)
    for kind, package in (("lu", "mumps"), ("hypre", "hypre")):
        kind = kind if PETSc.Sys.hasExternalPackage(package) else "auto"  # which then is another one
        with options(step_pc_type=kind):
            for transpose in (False, True):
                x = StepKrylov(A).solve(right, transpose)
                torch.testing.assert_close((A.transpose if transpose else A)(x), right, rtol=0, atol=1e-8)
        assert torch.equal(A.values, values)
    controls, three = po.Layout.replicated(WORLD, 3), 2 * np.eye(3) + 1  # which one of the ranks owns
    mass = po.Sparsity(three[: controls.n_owned], controls)
    form = InnerProduct(
        torch.ones(2).double(), po.StepMatrix(mass, torch.from_numpy(three[: controls.n_owned]).reshape(1, -1))
    )
    r = torch.ones(2, controls.n_owned, dtype=torch.float64)
    torch.testing.assert_close(form.multiply(form.solve(r)), r, rtol=0, atol=1e-12)
    csr = constraint.pattern.A.csr
    rows = sp.csr_matrix((np.arange(1.0, 1 + csr.nnz), csr.indices, csr.indptr), shape=csr.shape)
    spread_aij(rows, constraint.pattern.A.columns)
    assert np.array_equal(rows.data, np.arange(1.0, 1 + csr.nnz))  # which are the caller's
    few = {"step_ksp_max_it": 1, "step_ksp_rtol": 1e-14}
    with options(step_pc_type="bjacobi", **few), pytest.raises(po.SolveFailure, match="step_pc_type"):
        StepKrylov(A).solve(right)
    if not PETSc.Sys.hasExternalPackage("mumps"):
        return  # no factors follow
    with pytest.MonkeyPatch.context() as patch, options(step_pc_type="auto", **few):
        patch.setattr(stepsolve, "FEWEST_SHARED", 0)
        torch.testing.assert_close(A(StepKrylov(A).solve(right)), right, rtol=0, atol=1e-10)


def optima():
    """The same optimum of the heat equation by every way of KKT systems, with bounds; as many iterations up to one."""
    settings = Heat3dSettings(n=3, nt=4, alpha=1e-2)
    for k in splits()[1:]:
        case = Heat3dCase(Heat3dSettings(n=3, nt=4, alpha=1e-2, space_ranks=k))
        alone = Heat3dCase(settings, SELF)
        for precond in (EXACT, "wathen"):
            with options(sqp_kkt_precond=precond):
                results = [po.SQPSolver(each.problem, type="newton", opt_tol=1e-10).solve() for each in (case, alone)]
            objectives = [result.objective for result in results]
            assert abs(objectives[0] / objectives[1] - 1) <= 1e-9, (k, precond, objectives)
            assert abs(results[0].iterations - results[1].iterations) <= 1  # the last residual is one of rounding
        for words in (dict(lower=-0.1, upper=0.1), dict(method="sqp")):  # active sets, and the composite step
            results = [po.solve(each.problem, opt_tol=1e-9, **words) for each in (case, alone)]
            assert abs(results[0].objective / results[1].objective - 1) <= 1e-9, (k, words)
            assert results[0].reason > 0 and results[0].iterations == results[1].iterations, (k, words)


def kkt():
    """The assembled KKT matrix is the matrix-free one, and that of one rank."""
    for k in splits():
        problem = Heat3dCase(Heat3dSettings(n=4, nt=6, space_ranks=k), WORLD).problem
        for hessian in ("metric", "design", "full", "gauss-newton"):
            operator = KKTOperator(RieszMetric(problem), hessian)
            lam = problem.create_multiplier()
            assign(lam, problem.fields(point(problem, 3))[0])
            operator.set_point(problem.at(point(problem, 1)), lam)
            x = problem.layout.join_kkt(point(problem, 2), lam, problem.create_kkt())
            out, expected = x.duplicate(), x.duplicate()
            operator.assemble().mult(x, out)
            operator.mult(None, x, expected)
            out.axpy(-1.0, expected)
            assert out.norm() <= 1e-12 * (1 + expected.norm()), (k, hessian)
            operator.free()


def errors():
    """What would be wrong in silence is refused, by name."""
    k = WORLD.size
    grid = po.TimeGrid.uniform(6, 1.0, WORLD, k)
    constraint = Reaction(grid.space_comm)
    objective = po.Tracking(torch.zeros(constraint.layout.n_owned, dtype=torch.float64)) + po.ControlCost(1.0)
    with pytest.raises(po.InputError, match="multiple"):
        po.TimeGrid.uniform(6, 1.0, WORLD, k + 1)
    with pytest.raises(po.InputError, match="space_comm"):
        po.ControlProblem(Reaction(SELF), objective, grid)
    with pytest.raises(po.InputError, match="TerminalLoss"):
        po.ControlProblem(constraint, objective + po.TerminalLoss(lambda u, p: u.sum()), grid)
    with pytest.raises(po.InputError, match="SpaceConstraint"):
        po.ControlProblem(Whole(), objective, grid)
    with pytest.raises(po.InputError, match="without a pattern"):
        po.SpreadConstraint(Reaction(SELF), po.TimeGrid.uniform(4, 1.0, SELF))
    problem = po.ControlProblem(constraint, objective, grid)
    for precond in ("circulant", "block_jacobi", "multigrid"):
        with options(sqp_kkt_precond=precond), pytest.raises(po.InputError, match="wathen"):
            po.SQPSolver(problem, type="newton").solve()


class Whole(po.TimeDependentConstraint):
    state_dim = control_dim = 4

    def residual(self, u_old, u_new, z, steps):
        return u_new - u_old - steps.dt[:, None] * z

    def initial_state(self, p):
        return torch.zeros(4, dtype=torch.float64)


class Spoiled(Reaction):
    """NaN in one row, on one rank."""

    param_dim = 0

    def local_residual(self, u_old, u_new, z, steps):
        found = super().local_residual(u_old, u_new, z, steps.with_parameters(torch.ones(1)))
        return found / 0.0 * 0.0 if 11 in self.layout.natural else found

    def initial_state(self, p):
        return torch.zeros(self.layout.n_owned, dtype=torch.float64)


def failures():
    """NaN on one of the ranks of a step is a failure on all."""
    problem = problem_of(WORLD, WORLD.size, Spoiled)
    with pytest.raises(po.SolveFailure):
        problem.solve_state(problem.create_design())


PARTS = (exchange, layouts, derivatives, coloring, solvers, kkt, optima, *SPREAD, errors, failures)


def main(names):
    for part in PARTS:
        if names and part.__name__ not in names:
            continue
        part()
        WORLD.barrier()
        if WORLD.rank == 0:
            print(f"{part.__name__}: same", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        WORLD.Abort(1)
