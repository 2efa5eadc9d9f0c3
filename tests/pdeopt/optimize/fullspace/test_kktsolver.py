import numpy as np
import pytest
import torch
from petsc4py import PETSc

from pdeopt.control.metric import RieszMetric
from pdeopt.control.objective import TerminalLoss, Tracking
from pdeopt.control.verify import randomize
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.kkt.operator import KKTOperator
from pdeopt.optimize.fullspace import kktchoice
from pdeopt.optimize.fullspace.kktsolver import KKTSolver, use_direct
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.precond.direct import KKTDirectPC
from tests.helpers import examples, krylov
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries, relative

HESSIANS = ["metric", "full", "gauss-newton"]


def at_random(name, hessian):
    problem = examples.EXAMPLES[name]()
    x, lam = randomize(problem.create_primal(), 4), randomize(problem.create_multiplier(), 5)
    x.scale(0.5)
    return problem, problem.at(x), lam, Oracle(problem).kkt(torch.cat([entries(x), entries(lam)]), hessian)


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_solution_is_that_of_the_dense_matrix(name, hessian):
    problem, lin, lam, K = at_random(name, hessian)
    solver, r = KKTSolver(RieszMetric(problem), hessian, "test_"), randomize(problem.create_kkt(), 6)
    solver.set_point(lin, lam)
    found = solver.solve(r, 1e-12)
    if solver.curves_down:  # without factors a Hessian that is not positive is told, not inverted
        assert (name, hessian) == ("layer", "full")
    else:
        assert relative(entries(found), torch.linalg.solve(K, entries(r))) <= 1e-8
    solver.destroy()


@pytest.mark.parametrize("rtol", [1e-1, 1e-5, 1e-10])
def test_iterative_solves_meet_the_tolerance_in_the_problems_norm(options, rtol):
    options(test_kkt_mat_type="shell", test_kkt_ksp_type="gmres", test_kkt_ksp_gmres_restart=200)
    problem, lin, lam, K = at_random("burgers", "metric")
    solver, r = KKTSolver(RieszMetric(problem), "metric", "test_"), randomize(problem.create_kkt(), 6)
    solver.set_point(lin, lam)
    s, remainder = solver.solve(r, rtol), r.duplicate()
    remainder.setArray((entries(r) - K @ entries(s)).numpy())
    assert solver.norm(remainder) <= rtol * solver.norm(r) * (1 + 1e-6)
    taken = solver.take_iterations()
    assert taken > 0 and solver.take_iterations() == 0
    solver.destroy()


def test_iterations_are_what_ksp_reports(options):
    options(test_kkt_mat_type="shell", test_kkt_ksp_type="gmres", test_kkt_ksp_gmres_restart=200)
    problem, lin, lam, _ = at_random("burgers", "metric")
    solver, counts = KKTSolver(RieszMetric(problem), "metric", "test_"), []
    solver._ksp.setMonitor(lambda ksp, iteration, size: counts.append(iteration))
    solver.set_point(lin, lam)
    solver.solve(randomize(problem.create_kkt(), 6), 1e-8)
    assert solver.take_iterations() == sum(1 for iteration in counts if iteration > 0)
    solver.destroy()


def test_a_solver_follows_the_point():
    problem, lin, lam, _ = at_random("dense", "full")
    solver, r = KKTSolver(RieszMetric(problem), "full", "test_"), randomize(problem.create_kkt(), 6)
    solver.set_point(lin, lam)
    solver.solve(r, 1e-10)
    x, mu = randomize(problem.create_primal(), 14), randomize(problem.create_multiplier(), 15)
    solver.set_point(problem.at(x), mu)
    K = Oracle(problem).kkt(torch.cat([entries(x), entries(mu)]), "full")
    assert relative(entries(solver.solve(r, 1e-12)), torch.linalg.solve(K, entries(r))) <= 1e-8
    solver.destroy()


def test_the_zero_right_hand_side_has_the_zero_solution():
    problem, lin, lam, _ = at_random("heat", "full")
    solver = KKTSolver(RieszMetric(problem), "full", "test_")
    solver.set_point(lin, lam)
    assert solver.solve(problem.create_kkt(), 1e-8).norm() == 0.0
    solver.destroy()


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", examples.PATTERNED)
def test_the_factorization_without_mumps_is_exact(name, hessian):
    problem, lin, lam, K = at_random(name, hessian)
    operator = KKTOperator(RieszMetric(problem), hessian)
    operator.set_point(lin, lam)
    ksp = PETSc.KSP().create()
    ksp.setType("preonly")
    ksp.getPC().setType("python")
    ksp.getPC().setPythonContext(KKTDirectPC(operator.layout))
    ksp.setOperators(operator.assemble())
    r, s = randomize(problem.create_kkt(), 6), problem.create_kkt()
    ksp.solve(r, s)
    assert relative(entries(s), torch.linalg.solve(K, entries(r))) <= 1e-8
    ksp.destroy(), operator.free()


@pytest.mark.parametrize("name", ["burgers", "burgers nodal", "dense nodal"])
def test_sqp_without_mumps_finds_the_same_optimum(name, monkeypatch):
    def without_mumps(pc, layout):
        pc.setType("python")
        pc.setPythonContext(KKTDirectPC(layout))

    problem = examples.EXAMPLES[name]()
    expected = SQPSolver(problem).solve()
    monkeypatch.setattr("pdeopt.optimize.fullspace.kktsolver.use_direct", without_mumps)
    found = SQPSolver(problem).solve()
    assert found.converged and found.objective == pytest.approx(expected.objective, rel=1e-12)


def test_a_singular_matrix_is_a_solve_failure_with_a_remedy():
    problem, lin, lam, _ = at_random("heat", "full")
    solver, r = KKTSolver(RieszMetric(problem), "full", "test_"), randomize(problem.create_kkt(), 6)
    solver.set_point(lin, lam)
    solver._matrix.zeroEntries()
    with pytest.raises(SolveFailure, match="KKT"):
        solver.solve(r, 1e-8)
    solver.destroy()


def test_a_right_hand_side_of_nan_is_a_solve_failure():
    problem, lin, lam, _ = at_random("heat", "full")
    solver, r = KKTSolver(RieszMetric(problem), "full", "test_"), problem.create_kkt()
    r.set(float("nan"))
    solver.set_point(lin, lam)
    with pytest.raises(SolveFailure):
        solver.solve(r, 1e-8)
    solver.destroy()


def test_an_unknown_matrix_type_names_the_legal_ones(options):
    options(test_kkt_mat_type="dense")
    with pytest.raises(InputError, match=r"aij \| shell"):
        KKTSolver(RieszMetric(examples.heat()), "full", "test_")


@pytest.mark.parametrize("word", ["mgrit_window", "wathen_schur"])
def test_auto_takes_a_wrong_option_for_no_reason_to_go_another_way(options, word):
    options(**{word: "1.5"})
    with pytest.raises(InputError, match=f"^-{word}: got '?1.5"):
        SQPSolver(examples.heat()).solve()


SOLVERS = {
    "gmres and mumps": dict(ksp_type="gmres", pc_type="lu", pc_factor_mat_solver_type="mumps"),
    "fgmres without preconditioner": dict(ksp_type="fgmres", pc_type="none", ksp_gmres_restart=500, ksp_max_it=500),
    "minres on the shell": dict(mat_type="shell", ksp_type="minres", pc_type="none", ksp_max_it=2000),
    "gmres on the shell": dict(mat_type="shell", ksp_gmres_restart=500),
    "svd": dict(ksp_type="preonly", pc_type="svd"),
    "schur complement": dict(
        ksp_type="fgmres",
        pc_type="fieldsplit",
        pc_fieldsplit_type="schur",
        pc_fieldsplit_schur_fact_type="full",
        fieldsplit_primal_ksp_type="preonly",
        fieldsplit_primal_pc_type="lu",
        fieldsplit_multiplier_ksp_type="gmres",
        fieldsplit_multiplier_pc_type="none",
        fieldsplit_multiplier_ksp_rtol=1e-10,
        fieldsplit_multiplier_ksp_gmres_restart=200,
        fieldsplit_multiplier_ksp_max_it=500,
    ),
    "all three fields": dict(
        ksp_type="gmres",
        ksp_gmres_restart=500,
        pc_type="fieldsplit",
        pc_fieldsplit_type="additive",
        fieldsplit_state_pc_type="lu",
        fieldsplit_control_pc_type="lu",
        fieldsplit_multiplier_pc_type="none",
    ),
}


@pytest.mark.parametrize("name", ["burgers", "burgers nodal"])
@pytest.mark.parametrize("how", SOLVERS)
def test_petsc_options_change_the_linear_solver_and_not_the_optimum(options, how, name):
    from pdeopt.core.options import unread

    if "mumps" in how and not PETSc.Sys.hasExternalPackage("mumps"):
        pytest.skip("this PETSc has no MUMPS")
    problem = examples.EXAMPLES[name]()
    expected = SQPSolver(problem).solve()
    options(**{f"sqp_kkt_{word}": value for word, value in SOLVERS[how].items()})
    found = SQPSolver(problem).solve()
    assert found.converged, found.message
    assert relative(entries(found.design), entries(expected.design)) <= 1e-6
    assert not [word for word in unread() if word.startswith("sqp_kkt_")]


@pytest.mark.skipif(not PETSc.Sys.hasExternalPackage("mumps"), reason="this PETSc has no MUMPS")
def test_mumps_gets_more_room_where_its_guess_was_too_small(options):
    """Without spare workspace, delayed pivots do not fit: INFOG(1) = -9."""
    options(sqp_kkt_mat_mumps_icntl_14=0)
    problem = examples.burgers(nx=64, nt=64)
    assert SQPSolver(problem).solve().converged


@pytest.mark.parametrize(("limit", "method"), [(20, "preonly"), (1, "fgmres")])
def test_where_one_application_of_wathen_solves_no_krylov_method_is_around_it(options, limit, method):
    options(test_kkt_precond="wathen", test_kkt_wathen_ksp_max_it=limit)
    problem = krylov.heat(12)
    lin, lam = problem.at(problem.create_primal()), problem.create_multiplier()
    solver, r = KKTSolver(RieszMetric(problem), "full", "test_"), krylov.newton_right_hand_side(problem)
    K = Oracle(problem).kkt(torch.cat([entries(problem.create_primal()), entries(lam)]), "full")
    solver.set_point(lin, lam)
    assert relative(entries(solver.solve(r, 1e-9)), torch.linalg.solve(K, entries(r))) <= 1e-6
    assert solver.ksp.getType() == method  # where conjugate gradients inside have failed, one takes over
    solver.destroy()


def test_the_direct_default_takes_one_iteration_a_solve():
    pc = PETSc.PC().create()
    pc.setOptionsPrefix("test_")
    use_direct(pc, KKTOperator(RieszMetric(examples.heat()), "full").layout)
    assert pc.getType() in ("cholesky", "python")
    pc.destroy()


@pytest.mark.parametrize("precond", ["direct", "wathen"])
def test_the_matrix_is_shown_on_request(options, capfd, precond):
    """The shell is assembled for that."""
    options(test_kkt_mat_view="::ascii_info")
    problem, lin, lam, K = at_random("burgers", "full")
    solver = KKTSolver(RieszMetric(problem), "full", "test_", precond)
    solver.set_point(lin, lam)
    shown = capfd.readouterr().out
    assert f"rows={len(K)}" in shown and "seqaij" in shown and "(test_kkt_)" in shown
    solver.destroy()


def test_small_problems_are_factored_at_once(monkeypatch, options):
    """Of few states a step, or few unknowns; options win."""
    metric = RieszMetric(examples.heat(n=9, num_steps=4))

    def chosen():
        solver = KKTSolver(metric, "metric", "test_", "auto")
        solver.destroy()
        return solver.way

    assert chosen() == "direct"
    monkeypatch.setattr(kktchoice, "SMALL_MATRIX", 100)
    assert chosen() == "reduced"
    monkeypatch.setattr(kktchoice, "SMALL_STEP", 9)
    assert chosen() == "direct"
    options(test_kkt_precond="wathen")
    assert chosen() == "wathen"


@pytest.mark.parametrize(
    "alpha, seen, way, most",
    [
        (1e-7, "all", "wathen", 500),
        (1e-1, "all", "reduced", 500),
        (1e-6, "part", "direct", 500),
        (1e-6, "part", "circulant", 0),
        (1e-6, "last", "direct", 500),
        (1e-6, "last", "reduced", 0),
    ],
)
def test_auto_takes_the_way_that_suits(monkeypatch, alpha, seen, way, most):
    """Cheap controls everywhere take the matched Schur complement. Where a part is observed, or the last state alone,
    factors do that are not large; where they are, means over time do for a part, and fail for the last state."""
    monkeypatch.setattr(kktchoice, "MOST_FOR_FACTORS", most)
    monkeypatch.setattr(kktchoice, "SMALL_MATRIX", 0)
    monkeypatch.setattr(kktchoice, "SMALL_STEP", 0)
    objectives = {
        "all": None,
        "part": Tracking(lambda t: torch.cos(3 * t[:, None]).expand(-1, 7), observe=np.arange(7)),
        "last": TerminalLoss(lambda u, p: 0.5 * (u - 1).square().mean()),
    }
    problem = krylov.heat(32, alpha, 15, objective=objectives[seen])
    solver, lin = KKTSolver(RieszMetric(problem), "gauss-newton", "test_", "auto"), problem.at(problem.create_primal())
    solver.set_point(lin)
    x, lam = solver.solve_blocks(lin.gradient, lin.residual, 1e-9)
    assert solver.way == way and solver.choice.ways[-1] == way
    expected = KKTSolver(RieszMetric(problem), "gauss-newton", "test_", "direct")
    expected.set_point(lin)
    for found, exact in zip((x, lam), expected.solve_blocks(lin.gradient, lin.residual, 1e-12)):
        assert relative(entries(found), entries(exact)) <= 1e-5
    solver.destroy(), expected.destroy()
