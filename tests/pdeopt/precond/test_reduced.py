import functools
import math

import numpy as np
import pytest
import torch

from pdeopt.control.linearization import Elimination
from pdeopt.control.metric import RieszMetric
from pdeopt.control.objective import TerminalLoss
from pdeopt.control.verify import randomize
from pdeopt.kkt.operator import KKTOperator
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.precond.reduced import ControlBlock, ReducedHessian
from pdeopt.steps.linear_mgrit import TimeSystem
from pdeopt.steps.matrices.krylov import StepCounter
from problems.benchmarks.processes import counted
from tests.helpers import examples
from tests.helpers.krylov import heat, operator_at_random
from tests.helpers.oracle import Oracle
from tests.helpers.parallel_time import RANKS, check
from tests.helpers.support import dense, entries, relative

HESSIANS = ["metric", "design", "full", "gauss-newton"]

#: Between them: parameters in all functions, a control map, states coupled to controls; no pattern; theta 1/2.
NAMES = ["dense nodal", "layer", "burgers theta"]


@functools.cache
def at_random(name, hessian):
    """The operator at a random point and its dense matrix."""
    operator, k = operator_at_random(examples.EXAMPLES[name](), hessian)
    return operator, dense_kkt(operator.problem, k, hessian)


def dense_kkt(problem, k, hessian):
    """K of the oracle; that of the design's metric is the metric's without states."""
    K = Oracle(problem).kkt(k, "metric" if hessian == "design" else hessian)
    if hessian == "design":
        states = problem.layout.state_size
        K[:states, :states] = 0.0
    return K


def dense_reduced(problem, K):
    """The Schur complement of K when states and multipliers are eliminated."""
    first, last = problem.layout.state_size, problem.layout.primal_size
    kept = torch.arange(first, last)
    gone = torch.cat([torch.arange(first), torch.arange(last, len(K))])
    coupling = K[gone][:, kept]
    return K[kept][:, kept] - coupling.T @ torch.linalg.solve(K[gone][:, gone], coupling)


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", NAMES)
def test_the_reduced_hessian_is_the_schur_complement_of_the_dense_matrix(name, hessian):
    """For every constraint; and what a design leaves of a right-hand side is its residual."""
    operator, K = at_random(name, hessian)
    problem, matrix = operator.problem, ReducedHessian(operator).shell()
    assert relative(dense(matrix), dense_reduced(problem, K)) <= 1e-10
    matrix.destroy()
    r, d = randomize(problem.create_kkt(), 6), randomize(problem.create_design(), 7)
    g, c = problem.layout.kkt_fields(r)
    u, lam, rest = Elimination(operator.lin, problem.propagator, operator.hessian_fields)(entries(d), g, c)
    residual = entries(r) - K @ torch.cat([u.ravel(), entries(d), lam.ravel()])
    expected = torch.cat([torch.zeros(u.numel()), rest, torch.zeros(lam.numel())])
    assert (residual - expected).abs().max() <= 1e-10 * entries(r).abs().max()


@pytest.mark.parametrize("hessian", ["design", "gauss-newton"])
@pytest.mark.parametrize("name", NAMES)
def test_the_solution_is_that_of_the_dense_matrix(options, name, hessian):
    options(test_kkt_precond="reduced")
    operator, K = at_random(name, hessian)
    kkt, r = KKTSolver(operator.metric, hessian, "test_"), randomize(operator.problem.create_kkt(), 6)
    kkt.set_point(operator.lin, operator.lam)
    found = kkt.solve(r, 1e-11)
    assert not kkt.curves_down
    assert relative(entries(found), torch.linalg.solve(K, entries(r))) <= 1e-8
    if hessian == "design":
        assert kkt.take_iterations() == 1
    kkt.destroy()


@pytest.mark.parametrize("name", NAMES)
def test_fixed_design_variables_are_left_out(options, name):
    options(test_kkt_precond="reduced")
    operator, K = at_random(name, "gauss-newton")
    problem, K = operator.problem, K.clone()
    fixed = torch.from_numpy(np.random.default_rng(0).random(problem.layout.design_size) < 0.4)
    kkt, r = KKTSolver(RieszMetric(problem), "gauss-newton", "test_"), randomize(problem.create_kkt(), 6)
    kkt.set_point(operator.lin, None, fixed)
    place = problem.layout.state_size + torch.nonzero(fixed)[:, 0]
    K[place], K[:, place] = 0.0, 0.0
    K[place, place] = kkt.operator.pin
    assert relative(entries(kkt.solve(r, 1e-11)), torch.linalg.solve(K, entries(r))) <= 1e-8
    kkt.destroy()


def concave(weight):
    """Heat with a price of the last state that is negative: the reduced Hessian has both signs."""
    return heat(6, objective=TerminalLoss(lambda u, p: -weight * (u**2).sum()))


@pytest.mark.parametrize("kind", ["stcg", "fcg"])
@pytest.mark.parametrize("weight", [30.0, 1e3])
def test_negative_curvature_is_told_and_the_step_leads_down(options, weight, kind):
    """Conjugate gradients stop before it: d'Hd > 0 and r'd > 0 there, and the linearized equation holds."""
    options(test_kkt_precond="reduced", test_kkt_reduced_ksp_type=kind)
    problem = concave(weight)
    operator, k = operator_at_random(problem, "full")
    K = dense_kkt(problem, k, "full")
    H = dense_reduced(problem, K)
    assert torch.linalg.eigvalsh(H)[0] < 0 < torch.linalg.eigvalsh(H)[-1]
    kkt, r = KKTSolver(RieszMetric(problem), "full", "test_"), randomize(problem.create_kkt(), 6)
    kkt.set_point(operator.lin, operator.lam)
    s = kkt.solve(r, 1e-8)
    assert kkt.curves_down
    first, last = problem.layout.state_size, problem.layout.primal_size
    residual = entries(r) - K @ entries(s)
    scale = K.abs().max() * entries(s).abs().max()
    assert residual[:first].abs().max() <= 1e-12 * scale and residual[last:].abs().max() <= 1e-12 * scale
    d = entries(s)[first:last]
    assert d @ (residual[first:last] + H @ d) > 0  # r'd, r the right-hand side of the reduced system
    kkt.destroy()


def test_newton_leaves_a_concave_region(options):
    """Of a double well of the last state, whose curvature has both signs; the end is a minimum."""
    options(sqp_kkt_precond="reduced", sqp_type="newton")
    double_well = TerminalLoss(lambda u, p: (((2.0 * u) ** 2 - 1.0) ** 2).sum() - 0.1 * u.sum())
    problem = heat(6, 1e-3, objective=double_well)
    result = SQPSolver(problem).solve(randomize(problem.create_primal(), 1))
    assert result.converged and "no minimum" not in result.message
    lin = problem.at(problem.join(result.state, result.design))
    operator = KKTOperator(RieszMetric(problem), "full")
    operator.set_point(lin, result.multiplier)
    matrix = ReducedHessian(operator).shell()
    assert torch.linalg.eigvalsh(dense(matrix))[0] > 0
    matrix.destroy()


class Counted(ControlBlock):
    """A preconditioner of the control block of one's own: the usual one, whose calls are counted."""

    calls = 0

    def apply(self, pc, x, y):
        assert isinstance(pc.getOperators()[0].getPythonContext(), ReducedHessian)
        Counted.calls += 1
        super().apply(pc, x, y)


def test_the_control_block_has_a_hook(options):
    options(test_kkt_precond="reduced", test_kkt_reduced_pc_type="python")
    options(test_kkt_reduced_pc_python_type=f"{__name__}.Counted")
    operator, _ = operator_at_random(examples.heat(), "gauss-newton")
    kkt, r = KKTSolver(RieszMetric(operator.problem), "gauss-newton", "test_"), operator.problem.create_kkt()
    kkt.set_point(operator.lin)
    kkt.solve(randomize(r, 6), 1e-8)
    assert Counted.calls > 0
    kkt.destroy()


def at_zero(problem):
    return problem.at(problem.create_primal())


def iterations(problem):
    kkt = KKTSolver(RieszMetric(problem), "gauss-newton", "test_", "reduced")
    lin = at_zero(problem)
    kkt.set_point(lin)
    kkt.solve_blocks(lin.gradient, lin.residual, 1e-8)
    taken = kkt.take_iterations()
    kkt.destroy()
    return taken


@pytest.mark.parametrize("objective", [None, TerminalLoss(lambda u, p: 0.5 * (u - 1).square().mean())])
def test_iterations_depend_neither_on_the_mesh_nor_on_the_steps(objective):
    counts = [iterations(heat(N, 1e-2, n, objective=objective)) for N in (16, 64) for n in (7, 31)]
    assert max(counts) - min(counts) <= 4 and max(counts) <= 20


@pytest.mark.parametrize("make", [lambda: heat(32, 1e-3), lambda: examples.burgers(nt=32)])
def test_sweeps_by_cycles_are_as_accurate_as_they_must_be(options, make):
    """The true residual is below the tolerance at once, and by the iterations of exact sweeps."""
    options(mgrit_window=4)
    for rtol in (1e-3, 1e-8):
        its, sweeps = {}, {}
        for kind in ("serial", "mgrit", "exact"):
            options(propagator="serial" if kind == "serial" else "mgrit")
            options(test_kkt_reduced_ksp_type="fcg" if kind == "mgrit" else "cg")
            problem = make()
            kkt, lin = KKTSolver(RieszMetric(problem), "gauss-newton", "test_", "reduced"), at_zero(problem)
            kkt.set_point(lin)
            r = problem.layout.join_kkt(lin.gradient, lin.residual, problem.create_kkt())
            with counted(TimeSystem, "sweep") as cycles, counted(KKTSolver, "_correct") as solves:
                s = kkt.solve(r, rtol)
            missed = r.duplicate()
            kkt.operator.mult(None, s, missed)
            missed.aypx(-1.0, r)
            assert kkt.norm(missed) <= rtol * kkt.norm(r) and solves[0] == 1
            its[kind], sweeps[kind] = kkt.take_iterations(), cycles[0]
            kkt.destroy()
        assert max(its.values()) - min(its.values()) <= 2
        assert sweeps["mgrit"] <= 0.85 * sweeps["exact"]


def test_step_solves_are_as_accurate_as_they_must_be(options):
    """With Krylov methods inside the steps: fewer of their iterations, and the true residual below the tolerance."""
    taken = {}
    for kind, step_rtol in (("fcg", 1e-10), ("cg", 1e-12)):  # plain conjugate gradients ask for exact products
        options(test_kkt_reduced_ksp_type=kind, step_pc_type="gamg", step_ksp_rtol=step_rtol)
        problem = heat(12, 1e-4, 40)
        kkt, lin = KKTSolver(RieszMetric(problem), "gauss-newton", "test_", "reduced"), at_zero(problem)
        kkt.set_point(lin)
        r, before = problem.layout.join_kkt(lin.gradient, lin.residual, problem.create_kkt()), StepCounter.iterations
        with counted(KKTSolver, "_correct") as solves:
            s = kkt.solve(r, 1e-8)
        taken[kind] = StepCounter.iterations - before
        missed = r.duplicate()
        kkt.operator.mult(None, s, missed)
        missed.aypx(-1.0, r)
        assert kkt.norm(missed) <= 1e-8 * kkt.norm(r) and solves[0] == 1
        kkt.destroy()
    assert taken["fcg"] <= 0.7 * taken["cg"]


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_do_not_matter(ranks):
    check("reduced", ranks)


REFERENCES = {
    "burgers": ({"nx": 32, "nt": 32}, 0.05469007214503),
    "heat": ({"nx": 12, "ny": 4, "nt": 8}, 0.00105448677191),
    "klein_gordon": ({"nx": 16, "nt": 32}, 0.5476383833738),
}


@pytest.mark.parametrize("kind", ["newton", "composite"])
@pytest.mark.parametrize("name", REFERENCES)
def test_the_references_of_all_three_problems(options, name, kind):
    from problems.benchmarks.kkt_work import problem_of

    sizes, expected = REFERENCES[name]
    options(sqp_kkt_precond="reduced")
    result = SQPSolver(problem_of(name, **sizes), type=kind).solve()
    assert result.converged and result.objective == pytest.approx(expected, rel=1e-8)
    assert math.isfinite(result.history[-1].optimality)
