from dataclasses import replace

import pytest
import torch
from petsc4py import PETSc

from pdeopt.control.metric import RieszMetric
from pdeopt.control.verify import randomize
from pdeopt.core.errors import InputError, as_raised
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.precond.operator import BlockOperator
from pdeopt.precond.wathen import WathenPC
from pdeopt.steps.sparse import StepMatrix
from tests.helpers import examples
from tests.helpers.krylov import (
    applied,
    fields,
    heat,
    history,
    iterations,
    matrix_of,
    newton_right_hand_side,
    operator_at_random,
    operator_at_zero,
    preconditioner,
    solver,
)
from tests.helpers.matrices import randn
from tests.helpers.oracle import Oracle
from tests.helpers.parallel_time import RANKS, check
from tests.helpers.support import dense, entries, relative

HESSIANS = ["metric", "full", "gauss-newton"]


@pytest.mark.parametrize("name", examples.PATTERNED)
def test_with_the_exact_schur_complement_one_application_solves(options, name):
    options(wathen_schur="exact")
    operator, k = operator_at_random(examples.EXAMPLES[name](), "metric")
    K = Oracle(operator.problem).kkt(k, "metric")
    x = randn(len(K), 3)
    assert relative(preconditioner(operator, WathenPC(), K @ x), x) <= 1e-9
    assert iterations(operator, WathenPC(), randomize(operator.problem.create_kkt(), 6)) == 1


@pytest.mark.parametrize("name", examples.PATTERNED)
def test_with_a_tolerance_on_the_schur_complement_one_application_solves(options, name):
    options(test_wathen_ksp_type="cg", test_wathen_ksp_rtol=1e-13, test_wathen_ksp_max_it=100)
    options(test_wathen_ksp_norm_type="natural")
    operator, _ = operator_at_random(examples.EXAMPLES[name](), "metric")
    assert iterations(operator, WathenPC(), randomize(operator.problem.create_kkt(), 6)) <= 2


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", examples.PATTERNED)
def test_preconditioned_solves_give_the_solution_of_the_dense_matrix(options, name, hessian):
    options(test_kkt_precond="wathen")
    problem = examples.EXAMPLES[name]()
    operator, k = operator_at_random(problem, hessian)
    kkt, r = KKTSolver(RieszMetric(problem), hessian, "test_"), randomize(problem.create_kkt(), 6)
    kkt.set_point(operator.lin, operator.lam)
    expected = torch.linalg.solve(Oracle(problem).kkt(k, hessian), entries(r))
    assert relative(entries(kkt.solve(r, 1e-10)), expected) <= 1e-6
    kkt.destroy()


@pytest.mark.parametrize("form", ["shell", "assemble"])
@pytest.mark.parametrize("method", ["gmres", "minres", "bcgs"])
def test_methods_that_take_it_for_one_matrix_are_refused(options, method, form):
    """GMRES ends at a residual of its own that is small, and a solution that is wrong."""
    operator, _ = operator_at_random(examples.burgers(), "full")
    matrix, right = getattr(operator, form)(), randomize(operator.problem.create_kkt(), 6)

    def solve(method):
        ksp = PETSc.KSP().create()
        ksp.setOperators(matrix)
        ksp.setType(method)
        ksp.setTolerances(rtol=1e-10, max_it=300)
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(WathenPC())
        left, residual = right.duplicate(), right.duplicate()
        try:
            with as_raised():
                ksp.solve(right, left)
        finally:
            ksp.destroy()
        matrix.mult(left, residual)
        residual.axpy(-1.0, right)
        return residual.norm() / right.norm()

    with pytest.raises(InputError, match="fgmres"):
        solve(method)
    assert solve("fgmres") <= 1e-9
    options(wathen_ksp_type="preonly")
    assert solve("gmres") <= 1e-6
    operator.free()
    if form == "shell":
        matrix.destroy()


def schur_parts(operator):
    """The dense Schur complement and the dense approximate inverse of it."""
    with solver(operator, WathenPC()) as ksp:
        ksp.setUp()
        inner = ksp.getPC().getPythonContext().schur_solver
        return dense(inner.getOperators()[0]), applied(inner.getPC())


def matched_eigenvalues(operator):
    S, inverse = schur_parts(operator)
    values = torch.linalg.eigvals(inverse @ S)
    assert values.imag.abs().max() <= 1e-10
    return values.real


@pytest.mark.parametrize(
    "N, alpha", [(N, alpha) for N in (4, 16) for alpha in (1.0, 1e-2, 1e-4, 1e-6, 1e-8)] + [(64, 1e-6)]
)
def test_the_matched_approximation_is_as_good_for_all_prices_and_steps(options, N, alpha):
    """Eigenvalues lie in [1/2, 1]. The last step has half the weight, where N W^-1 N' is 2 C Wzz^-1 C': so at most n
    of them, one for each unknown of a state, are below 1/2, and none below 1/3."""
    options(wathen_propagator="forward")
    values = matched_eigenvalues(operator_at_zero(heat(N, alpha)))
    assert values.max() <= 1 + 1e-10
    assert (values < 0.5 - 1e-10).sum() <= 3 and values.min() >= 1 / 3


@pytest.mark.parametrize("N", [4, 16])
def test_with_equal_weights_all_eigenvalues_are_between_a_half_and_one(options, N):
    options(wathen_propagator="forward")
    values = matched_eigenvalues(operator_at_zero(heat(N), "metric"))
    assert values.max() <= 1 + 1e-10 and values.min() >= 0.5 - 1e-10


@pytest.mark.parametrize(
    "schur, propagator",
    [
        ("matched", "forward"),
        ("matched", "mgrit"),
        ("matched", "window"),
        ("matched", "multigrid"),
        ("old_new", "mgrit"),
        ("new_state", "forward"),
    ],
)
def test_without_krylov_iterations_inside_it_is_symmetric_and_indefinite(options, schur, propagator):
    """As many negative eigenvalues as multipliers, like K: MINRES, which needs a positive one, cannot use it.

    Those of the preconditioned matrix are positive, 1 and those of the preconditioned Schur complement: GMRES and
    BiCGStab can.
    """
    options(wathen_schur=schur, wathen_propagator=propagator, test_wathen_ksp_type="preonly", mgrit_window=4)
    options(test_wathen_mg_levels_ksp_max_it=1, test_wathen_mg_levels_ksp_richardson_scale=1.0)
    operator = operator_at_zero(heat(8))
    P, lam = preconditioner(operator, WathenPC()), operator.problem.layout.state_size
    tolerance = 1e-12 if propagator != "multigrid" else 1e-8  # its coarsest problem is solved to 1e-10
    assert relative(P, P.T) <= tolerance
    assert int((torch.linalg.eigvalsh(0.5 * (P + P.T)) < 0).sum()) == lam
    S, inverse = schur_parts(operator)
    expected = torch.cat([torch.ones(len(P) - lam), torch.linalg.eigvals(inverse @ S).real]).sort().values
    found = torch.linalg.eigvals(P @ matrix_of(operator))
    assert found.imag.abs().max() <= 1e-4  # the eigenvalue 1 is defective
    assert torch.allclose(found.real.sort().values, expected, atol=1e-4)
    assert expected.min() > 0


@pytest.mark.parametrize("kind", ["gmres", "bcgs", "tfqmr", "gcr"])
def test_krylov_methods_that_are_not_flexible_may_use_it(options, kind):
    options(test_wathen_ksp_type="preonly", test_ksp_pc_side="right")
    assert iterations(operator_at_zero(heat(16)), WathenPC(), kind=kind) <= 12


@pytest.mark.parametrize("schur", ["matched", "old_new"])
@pytest.mark.parametrize(
    "same",
    [
        dict(wathen_propagator="window", mgrit_window=100),
        dict(wathen_propagator="mgrit", mgrit_window=100),
        dict(wathen_propagator="mgrit", mgrit_levels=1),
        dict(wathen_propagator="mgrit", mgrit_window=3, mgrit_cycles=3),
        dict(wathen_propagator="auto", mgrit_window=100),
    ],
)
def test_exact_propagators_are_the_serial_one(options, same, schur):
    options(wathen_schur=schur, test_wathen_ksp_type="preonly", wathen_propagator="forward")
    operator, x = operator_at_zero(heat(8)), randn(72, 3)
    expected = preconditioner(operator, WathenPC(), x)
    options(**same)
    assert relative(preconditioner(operator, WathenPC(), x), expected) <= 1e-12


@pytest.mark.parametrize("window", [1, 2, 3])
def test_blocks_that_are_cut_are_preconditioned_window_by_window(options, window):
    """The matrix then has no entries between windows, and each block is that of the window alone."""
    options(test_wathen_ksp_type="preonly", wathen_schur="old_new")
    blocks = replace(KKTBlocks.of(operator_at_zero(heat(6), "metric")).cut(window))
    P, (u, z, _, lam) = preconditioner(BlockOperator(blocks), WathenPC()), fields(blocks)
    step = torch.cat([torch.arange(len(own)) // (len(own) // 6) for own in (u, z, lam)])
    assert not P[step[:, None] // window != step // window].any()
    first = torch.nonzero(step < window)[:, 0]
    alone = KKTBlocks.of(operator_at_zero(heat(window, T=0.5 * window / 6), "metric"))
    assert relative(P[first][:, first], preconditioner(BlockOperator(alone), WathenPC())) <= 1e-12


def without_control(problem):
    blocks = KKTBlocks.of(operator_at_zero(problem))
    return replace(blocks, C=StepMatrix(blocks.C.sparsity, torch.zeros_like(blocks.C.values)))


@pytest.mark.parametrize("schur, N", [("old_new", 6), ("matched", 6), ("new_state", 1)])
def test_without_control_the_state_jacobian_is_all_there_is(options, schur, N):
    """S = T W^-1 T' then, which `old_new` inverts; for one step, so does `new_state`."""
    options(wathen_schur=schur, test_wathen_ksp_type="preonly", wathen_propagator="forward")
    operator = BlockOperator(without_control(heat(N)))
    K = matrix_of(operator)
    x = randn(len(K), 3)
    assert relative(preconditioner(operator, WathenPC(), K @ x), x) <= 1e-9


def test_where_control_is_dear_the_old_state_is_enough(options):
    options(wathen_schur="old_new")
    assert iterations(operator_at_zero(heat(16, alpha=1e4)), WathenPC()) <= 2


def test_dropping_the_coupling_of_the_steps_needs_more_iterations_on_more_steps(options):
    """So `new_state` is there for comparison; the others do not grow."""
    options(wathen_schur="new_state")
    few, many = (iterations(operator_at_zero(heat(N)), WathenPC()) for N in (8, 32))
    assert many >= 2 * few


def test_iterations_do_not_depend_on_the_window(options):
    operator, counts = operator_at_zero(heat(64, 1e-4)), []
    for window in (2, 4, 8, 16, 32):
        options(mgrit_window=window)
        counts.append(iterations(operator, WathenPC()))
    assert max(counts) - min(counts) <= 1


def test_iterations_hardly_depend_on_price_and_steps():
    counts = [
        iterations(operator_at_zero(heat(N, alpha)), WathenPC()) for N in (16, 64, 256) for alpha in (1.0, 1e-4, 1e-8)
    ]
    assert max(counts) - min(counts) <= 3 and max(counts) <= 7


def test_it_follows_the_point():
    problem = examples.burgers()
    operator, _ = operator_at_random(problem, "gauss-newton")
    other, _ = operator_at_random(problem, "gauss-newton", seed=11)
    with solver(operator, WathenPC()) as ksp:
        r, s = randomize(problem.create_kkt(), 6), problem.create_kkt()
        ksp.solve(r, s)
        operator.set_point(other.lin)
        ksp.getOperators()[0].stateIncrease()
        ksp.solve(r, s)
        moved = ksp.getConvergenceHistory()[-ksp.getIterationNumber() - 1 :]
    fresh = history(other, WathenPC(), r)
    assert len(moved) == len(fresh) and relative(moved, fresh) <= 1e-12


def settings_in_use(operator, prefix="test_"):
    with solver(operator, WathenPC(), prefix=prefix) as ksp:
        ksp.setUp()
        return ksp.getPC().getPythonContext().settings


def test_options_with_the_prefix_come_before_bare_ones(options):
    operator = operator_at_zero(heat(4))
    options(wathen_schur="old_new", wathen_propagator="forward")
    found = settings_in_use(operator)
    assert (found.schur, found.propagator) == ("old_new", "forward")
    options(test_wathen_schur="new_state")
    found = settings_in_use(operator)
    assert (found.schur, found.propagator) == ("new_state", "forward")
    assert settings_in_use(operator, "other_").schur == "old_new"
    assert settings_in_use(operator, "").schur == "old_new"


@pytest.mark.parametrize("prefix", ["", "test_"])
@pytest.mark.parametrize(
    "name, legal",
    [
        ("schur", r"new_state \| old_new \| matched \| exact"),
        ("propagator", r"window \| forward \| mgrit \| multigrid"),
    ],
)
def test_a_word_that_is_none_names_the_legal_ones(options, prefix, name, legal):
    options(**{f"{prefix}wathen_{name}": "magic"})
    with pytest.raises(InputError, match=f"{prefix}wathen_{name}.*{legal}"):
        settings_in_use(operator_at_zero(heat(4)))


def test_a_matrix_of_blocks_has_no_exact_schur_complement(options):
    options(wathen_schur="exact")
    with pytest.raises(InputError, match="KKT operator"):
        preconditioner(BlockOperator(KKTBlocks.of(operator_at_zero(heat(4)))), WathenPC())


def test_the_newton_step_of_the_linear_problem_is_its_optimum():
    """A check of the scaled right-hand side: one step from zero satisfies the optimality conditions."""
    problem = heat(8)
    operator = operator_at_zero(problem)
    with solver(operator, WathenPC(), rtol=1e-12) as ksp:
        b, s = newton_right_hand_side(problem), problem.create_kkt()
        ksp.solve(b, s)
    x, lam = problem.create_primal(), problem.create_multiplier()
    problem.layout.split_kkt(s, x, lam)
    x.scale(-1.0), lam.scale(-1.0)
    lin = problem.at(x)
    assert lin.lagrangian_gradient(lam).norm() <= 1e-9 * b.norm() and lin.residual.norm() <= 1e-9 * b.norm()


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_residuals_are_the_same_on_several_ranks(ranks):
    """Whole histories, for all approximations and propagators."""
    check("wathen", ranks)
