"""The coupled form against plain torch functions, theorems, and the standard form."""

import numpy as np
import pytest
import torch
from petsc4py import PETSc
from torch.func import hessian, jacfwd

from pdeopt.control.metric import RieszMetric
from pdeopt.control.verify import randomize, symmetry_error
from pdeopt.core.errors import InputError
from pdeopt.core.options import unread
from pdeopt.kkt.coupled import CoupledKKT
from pdeopt.kkt.operator import KKTOperator
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.precond.direct import KKTDirectPC
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import dense, entries, python, relative, vector

HESSIANS = ["metric", "full", "gauss-newton"]
WINDOWS = [1, 2, 3, 100]  # of 4 or 5 steps


class CoupledOracle(Oracle):
    """With the unknowns [u | z | p | lam | v | mu]: v and mu of every window but the first."""

    def __init__(self, problem, window):
        super().__init__(problem)
        self.window, self.N = window, problem.grid.num_steps
        self.starts = list(range(window, self.N, window))
        self.M = RieszMetric(problem).state_mass(torch.eye(problem.n, dtype=torch.float64))

    def split(self, k):
        standard, extra = sum(self.sizes), len(self.starts) * self.problem.n
        k, v, mu = k.split([standard, extra, extra])
        return k, v.reshape(-1, self.problem.n), mu.reshape(-1, self.problem.n)

    def lagrangian(self, which, k):
        k, v, mu = self.split(k)
        x, lam = k[: sum(self.sizes[:3])], k[sum(self.sizes[:3]) :].reshape(self.N, -1)
        levels, z, p = self._parts(x)
        total = {"full": self.J, "gauss-newton": self.J, "metric": lambda x: 0.5 * x @ self.metric() @ x}[which](x)
        for i in range(self.N):
            step = self.problem.grid.steps[i : i + 1].with_parameters(p)
            old = v[self.starts.index(i)] if i in self.starts else levels[i]
            F = self.problem.constraint.residual(old[None], levels[i + 1 : i + 2], z[i : i + 1], step)
            total = total + lam[i] @ F[0]
        for start, virtual, multiplier in zip(self.starts, v, mu):
            total = total + multiplier @ self.M @ (virtual - levels[start])
        return total

    def matrix(self, k, which):
        """Second derivatives; those of lam.F alone are left out but for "full"."""
        full = hessian(lambda k: self.lagrangian(which, k))(k)
        if which == "full":
            return full
        multipliers = self.multiplier_mask()
        flat = torch.where(multipliers, 0.0, k)
        F = jacfwd(jacfwd(lambda k: self.lagrangian(which, k)))(k)[multipliers][:, ~multipliers]
        W = hessian(lambda k: self.lagrangian(which, k))(flat)[~multipliers][:, ~multipliers]
        K = torch.zeros_like(full)
        K[torch.outer(~multipliers, ~multipliers)] = W.reshape(-1)
        K[torch.outer(multipliers, ~multipliers)] = F.reshape(-1)
        K[torch.outer(~multipliers, multipliers)] = F.T.reshape(-1)
        return K

    def multiplier_mask(self):
        counts = [*self.sizes, len(self.starts) * self.problem.n, len(self.starts) * self.problem.n]
        kinds = torch.tensor([False, False, False, True, False, True])
        return torch.repeat_interleave(kinds, torch.tensor(counts))

    def order(self):
        """The unknowns window by window: p, and [v u z lam mu] of each."""
        n, (states, controls, params, _) = self.problem.n, self.sizes
        control_step = [place * self.N // controls for place in range(controls)]
        lam, v = states + controls + params, sum(self.sizes)
        mu, found = v + len(self.starts) * n, list(range(states + controls, lam))
        for first in [0, *self.starts]:
            steps = range(first, min(first + self.window, self.N))
            virtual = [] if first == 0 else [self.starts.index(first) * n + dof for dof in range(n)]
            found += [v + k for k in virtual]
            found += [step * n + dof for step in steps for dof in range(n)]
            found += [states + place for place, step in enumerate(control_step) if step in steps]
            found += [lam + step * n + dof for step in steps for dof in range(n)]
            found += [mu + k for k in virtual]
        return found


def at_random(name, hessian, window, seed=4):
    problem = examples.EXAMPLES[name]()
    x, lam = randomize(problem.create_primal(), seed), randomize(problem.create_multiplier(), seed + 1)
    x.scale(0.5)
    operator = CoupledKKT(RieszMetric(problem), hessian, window)
    operator.set_point(problem.at(x), lam)
    return problem, operator, torch.cat([entries(x), entries(lam)])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", ["dense", "dense nodal", "burgers", "heat"])
def test_the_matrix_is_the_dense_hessian_of_the_coupled_lagrangian(name, hessian, window):
    problem, operator, k = at_random(name, hessian, window)
    oracle = CoupledOracle(problem, window)
    u = k[: problem.layout.state_size].reshape(-1, problem.n)
    v = u[[start - 1 for start in oracle.starts]].reshape(-1)
    k = torch.cat([k, v, torch.zeros_like(v)])  # v is u_prev, where the operator is linearized
    order, matrix = oracle.order(), operator.assemble()
    assert sorted(order) == list(range(len(k)))
    assert relative(dense(matrix), oracle.matrix(k, hessian)[order][:, order]) <= 1e-12
    assert symmetry_error(matrix) <= 1e-15
    operator.free()


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", examples.PATTERNED)
def test_both_forms_have_the_same_solution(name, hessian):
    problem, operator, k = at_random(name, hessian, 2)
    expected = Oracle(problem).kkt(k, hessian)
    r = randomize(problem.create_kkt(), 6)
    matrix, right = operator.assemble(), operator.to_coupled(r)
    solution = vector(right, torch.linalg.solve(dense(matrix), entries(right)))
    found = operator.to_standard(solution, r.duplicate())
    assert relative(entries(found), torch.linalg.solve(expected, entries(r))) <= 1e-10
    operator.free()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", ["dense nodal", "burgers theta", "heat"])
def test_continuity_multipliers_are_the_adjoint_where_a_window_starts(name, hessian, window):
    """M mu = -(B'lam + W_vx x), which is lam itself for the heat equation's implicit Euler steps."""
    problem, operator, _ = at_random(name, hessian, window)
    right = operator.to_coupled(randomize(problem.create_kkt(), 6))
    solution = vector(right, torch.linalg.solve(dense(operator.assemble()), entries(right)))
    x, lam = problem.create_primal(), problem.create_multiplier()
    problem.layout.split_kkt(operator.to_standard(solution, problem.create_kkt()), x, lam)
    lin, rows = operator.lin, entries(lam).reshape(-1, problem.n)
    expected = lin.jacobian.vjp(rows)[0]
    if hessian == "full":
        du, dz, dp = problem.fields(x)
        at = entries(operator.lam).reshape(-1, problem.n)
        expected = expected + lin.jacobian.hvp(at, problem.grid.shift(du), du, problem.controls(dz), dp)[0]
    starts = list(range(window, problem.grid.num_steps, window))
    mu = operator.continuity_multipliers(solution)
    assert mu.shape == (len(starts), problem.n)
    assert torch.allclose(operator.metric.state_mass(mu), -expected[starts], atol=1e-10 * float(expected.abs().max()))
    if name == "heat":
        assert torch.allclose(mu, rows[starts], atol=1e-10 * float(rows.abs().max()))
    operator.free()


def test_at_the_optimum_they_belong_to_the_multiplier_of_the_solution():
    problem = examples.burgers(nx=8, nt=8)
    result = SQPSolver(problem, type="newton", opt_tol=1e-12, feas_tol=1e-12).solve()
    operator, lin = CoupledKKT(RieszMetric(problem), "full", 3), problem.at(problem.join(result.state, result.design))
    operator.set_point(lin, result.multiplier)
    k = problem.layout.join_kkt(lin.gradient, lin.residual, problem.create_kkt())
    k.scale(-1.0)
    right = operator.to_coupled(k)
    solution = vector(right, torch.linalg.solve(dense(operator.assemble()), entries(right)))
    adjoint = -lin.jacobian.vjp(entries(result.multiplier).reshape(-1, problem.n))[0][[3, 6]]
    assert relative(operator.metric.state_mass(operator.continuity_multipliers(solution)), adjoint) <= 1e-9
    operator.free()


def test_off_the_windows_there_is_continuity_alone():
    problem, operator, _ = at_random("burgers", "full", 2)
    matrix, sets = operator.assemble(), operator.coupled.windows()
    first, second = (matrix.createSubMatrices(rows, cols)[0] for rows, cols in ((sets[0], sets[0]), (sets[1], sets[0])))
    n, m = problem.n, problem.m
    expected = torch.zeros(second.getSize(), dtype=torch.float64)
    M = operator.metric.state_mass(torch.eye(n, dtype=torch.float64))
    expected[-n:, n : 2 * n] = -M  # mu of the second window, the last state of the first
    assert torch.allclose(dense(second), expected, atol=1e-15)
    short = KKTOperator(RieszMetric(examples.burgers(nt=2, T=0.5)), "metric").layout
    assert first.getSize() == (short.global_size, short.global_size) == (2 * (2 * n + m), 2 * (2 * n + m))
    operator.free()


def test_a_matrix_refilled_at_another_point_is_that_of_the_point():
    problem, operator, _ = at_random("dense nodal", "full", 2)
    first = operator.assemble()
    x, lam = randomize(problem.create_primal(), 20), randomize(problem.create_multiplier(), 21)
    fresh = CoupledKKT(operator.metric, "full", 2)
    for each in (operator, fresh):
        each.set_point(problem.at(x), lam)
    second = operator.assemble()
    assert second.handle == first.handle
    assert torch.equal(dense(second), dense(fresh.assemble()))
    operator.free(), fresh.free()


@pytest.mark.parametrize("name", ["burgers", "burgers nodal"])
def test_fixed_controls_do_not_move(options, name):
    problem = examples.EXAMPLES[name]()
    x, lam = randomize(problem.create_primal(), 4), randomize(problem.create_multiplier(), 5)
    fixed, r = torch.arange(problem.layout.design_size) % 3 == 0, randomize(problem.create_kkt(), 6)
    found = []
    for form in ("standard", "coupled"):
        options(test_kkt_form=form, test_kkt_window=3)
        solver = KKTSolver(RieszMetric(problem), "gauss-newton", "test_")
        solver.set_point(problem.at(x), lam, fixed)
        found.append(entries(solver.solve(r, 1e-10)))
        solver.destroy()
    assert relative(found[1], found[0]) <= 1e-9


@pytest.mark.parametrize("window", [1, 3, 16])
@pytest.mark.parametrize("method", ["newton", "composite"])
@pytest.mark.parametrize("name", ["burgers", "burgers nodal", "heat"])
def test_both_forms_find_the_same_optimum(options, name, method, window):
    words = dict(type=method, opt_tol=1e-11, feas_tol=1e-11)
    expected = SQPSolver(examples.EXAMPLES[name](), **words).solve()
    options(kkt_form="coupled", kkt_window=window)
    found = SQPSolver(examples.EXAMPLES[name](), **words).solve()
    assert found.converged, found.message
    assert found.objective == pytest.approx(expected.objective, rel=1e-12)
    for part in ("state", "design", "multiplier"):
        assert relative(entries(getattr(found, part)), entries(getattr(expected, part))) <= 1e-10, part


SOLVERS = {
    "bjacobi": dict(pc_type="bjacobi"),
    "asm": dict(pc_type="asm", pc_asm_type="basic"),
    "gmres and svd of the windows": dict(ksp_type="gmres", pc_type="bjacobi", sub_pc_type="svd"),
}


@pytest.mark.parametrize("how", SOLVERS)
def test_petscs_preconditioners_work_window_by_window(options, how):
    if "svd" not in how and not PETSc.Sys.hasExternalPackage("mumps"):
        pytest.skip("this PETSc has no MUMPS")
    expected = SQPSolver(examples.burgers(nx=8, nt=8), type="newton", opt_tol=1e-10).solve()
    options(sqp_kkt_form="coupled", sqp_kkt_window=3, sqp_kkt_precond="none", kkt_window=5)
    options(**{f"sqp_kkt_{word}": value for word, value in SOLVERS[how].items()})
    found = SQPSolver(examples.burgers(nx=8, nt=8), type="newton", opt_tol=1e-10).solve()
    assert found.converged, found.message
    assert relative(entries(found.design), entries(expected.design)) <= 1e-6
    assert 2 <= max(found.history["krylov"]) <= 40
    assert not [word for word in unread() if word.startswith(("sqp_kkt_", "kkt_"))]


def test_one_window_is_one_block(options):
    """All of the matrix: one iteration."""
    options(kkt_form="coupled", kkt_window=8, kkt_precond="none", sqp_kkt_pc_type="bjacobi", sqp_kkt_sub_pc_type="svd")
    result = SQPSolver(examples.burgers(nx=8, nt=8), type="newton").solve()
    assert result.converged and max(result.history["krylov"]) == 1


def test_the_solvers_of_the_windows_leave_no_options_behind(options):
    """Block Jacobi in time has solvers of the same prefix, and shell matrices that no Cholesky factors."""
    options(sqp_kkt_form="coupled", sqp_kkt_window=3, sqp_kkt_precond="none", sqp_kkt_pc_type="asm")
    assert SQPSolver(examples.burgers(nx=8, nt=8), type="newton").solve().converged
    for word in ("form", "window", "precond", "pc_type"):
        PETSc.Options().delValue(f"sqp_kkt_{word}")
    options(sqp_kkt_precond="block_jacobi")
    assert SQPSolver(examples.burgers(nx=8, nt=8), type="newton").solve().converged


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", examples.PATTERNED)
def test_the_factorization_without_mumps_is_exact(name, window):
    problem, operator, k = at_random(name, "full", window)
    ksp = PETSc.KSP().create()
    ksp.setType("preonly")
    ksp.getPC().setType("python")
    ksp.getPC().setPythonContext(KKTDirectPC(operator.coupled))
    ksp.setOperators(operator.assemble())
    r = randomize(problem.create_kkt(), 6)
    right = operator.to_coupled(r)
    left = right.duplicate()
    ksp.solve(right, left)
    found = operator.to_standard(left, r.duplicate())
    assert relative(entries(found), torch.linalg.solve(Oracle(problem).kkt(k, "full"), entries(r))) <= 1e-8
    ksp.destroy(), operator.free()


def test_fields_partition_the_unknowns():
    _, operator, _ = at_random("dense nodal", "full", 2)
    for two, names in ((False, ["state", "control", "multiplier"]), (True, ["primal", "multiplier"])):
        sets = operator.coupled.index_sets(two)
        assert list(sets) == names
        numbers = np.concatenate([each.getIndices() for each in sets.values()])
        assert np.array_equal(np.sort(numbers), np.arange(operator.coupled.global_size))
    matrix, (multipliers,) = operator.assemble(), [operator.coupled.index_sets()["multiplier"]]
    assert not dense(matrix.createSubMatrix(multipliers, multipliers)).any()
    operator.free()


@pytest.mark.parametrize(
    "words, legal",
    [
        (dict(test_kkt_form="parallel"), r"standard \| coupled"),
        (dict(kkt_form="coupled", kkt_window=0), ">= 1"),
        (dict(test_kkt_form="coupled", test_kkt_precond="wathen"), r"direct \| none"),
        (dict(kkt_form="coupled", test_kkt_mat_type="shell"), r"auto \| aij"),
    ],
)
def test_settings_that_are_not_legal_are_refused(options, words, legal):
    options(**words)
    with pytest.raises(InputError, match=legal):
        KKTSolver(RieszMetric(examples.heat()), "full", "test_")


def test_a_matrix_free_constraint_has_no_coupled_form(options):
    options(kkt_form="coupled")
    with pytest.raises(InputError, match="pattern"):
        SQPSolver(examples.layer()).solve()


@pytest.mark.mpi
def test_the_same_on_several_ranks(tmp_path):
    """Solutions; and the matrix, where the windows are the same."""
    found = {}
    for ranks in (1, 2):
        done = python("-m", "tests.helpers.parallel", "coupled", tmp_path / f"{ranks}.npz", ranks=ranks)
        assert done.returncode == 0, done.stderr
        found[ranks] = np.load(tmp_path / f"{ranks}.npz")
    assert set(found[2]) == set(found[1])
    for name, expected in found[1].items():
        assert relative(found[2][name], expected) <= (1e-9 if "solution" in name else 1e-12), name
