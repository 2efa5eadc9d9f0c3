"""Bounds on the controls: the KKT conditions on the dense oracle, and the theory of active sets."""

import json

import numpy as np
import pytest
import torch

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.metric import RieszMetric
from pdeopt.control.objective import Objective
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.control.verify import randomize, symmetry_error
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.kkt.operator import KKTOperator
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.optimize.parts.bounds import Bounds
from pdeopt.optimize.tao import TaoSolver
from pdeopt.steps.timegrid import TimeGrid
from problems import burgers, heat, klein_gordon
from problems.benchmarks.defaults import car
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import dense, entries, python, random_design, relative, vector


def bounded(problem, **words):
    return SQPSolver(problem, type="active_set", **{"opt_tol": 1e-10, "feas_tol": 1e-10} | words)


def narrow_box(problem):
    """The middle of what the optimum without bounds uses."""
    z = problem.layout.design_fields(bounded(problem).solve().design)[0]
    return {"lower": float(z.quantile(0.2)), "upper": float(z.quantile(0.7))}


def problem_and_result(name, options):
    options(sqp_kkt_precond="direct" if name in examples.PATTERNED else "none")
    problem = examples.EXAMPLES[name]()
    box = narrow_box(problem)
    return problem, box, bounded(problem, **box).solve()


def is_active(z, box):
    return (abs(z - box["lower"]) < 1e-8) | (abs(z - box["upper"]) < 1e-8)


# -- optimality --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heat", "burgers", "burgers nodal", "dense nodal", "layer"])
def test_the_kkt_conditions_hold_in_every_component(name, options):
    problem, box, result = problem_and_result(name, options)
    assert result.reason == Reason.CONVERGED_OPTIMALITY, result.message
    oracle = Oracle(problem)
    k = torch.cat([entries(part) for part in (result.state, result.design, result.multiplier)])
    gradient = torch.func.grad(oracle.L)(k)
    start, z = problem.layout.state_size, problem.layout.design_fields(result.design)[0]
    mu = -gradient[start : start + len(z)]
    gradient[start : start + len(z)] = 0.0
    assert gradient.abs().max() <= 1e-9  # L_u, L_p and F
    low, high = (abs(z - box[end]) < 1e-8 for end in ("lower", "upper"))
    assert (z >= box["lower"] - 1e-8).all() and (z <= box["upper"] + 1e-8).all()
    assert low.any() and high.any() and (mu[~low & ~high].abs() <= 1e-9).all()
    assert (mu[low] <= 1e-9).all() and (mu[high] >= -1e-9).all()
    assert result.objective == pytest.approx(float(oracle.J(k)), rel=1e-13)


@pytest.mark.parametrize("name", ["burgers", "burgers nodal"])
def test_tao_finds_the_same_optimum(name, options):
    problem, box, result = problem_and_result(name, options)
    options(tao_type="bnls")
    expected = TaoSolver(ReducedObjective(problem), *box.values(), opt_tol=1e-10).solve()
    assert result.objective == pytest.approx(expected.objective, rel=1e-10)
    assert relative(entries(result.design), entries(expected.design)) <= 1e-7


def test_quadratic_programs_take_over_where_full_steps_do_not_contract(options):
    options(sqp_kkt_precond="direct", tao_type="bnls")
    problem = burgers.BurgersCase(burgers.BurgersSettings(nx=32, nt=32)).problem
    found = bounded(problem, lower=-0.2, upper=0.6).solve()
    expected = TaoSolver(ReducedObjective(problem), -0.2, 0.6, opt_tol=1e-10).solve()
    assert found.objective == pytest.approx(expected.objective, rel=1e-10)
    notes = found.history["note"]
    first = next(k for k, note in enumerate(notes) if "sets" in note)
    assert "into the box" in notes[first - 1] and all("sets" in note for note in notes[first:])
    assert found.history[-2].optimality <= 1e-4 and found.iterations <= 16  # fast in the end


# -- the active set strategy -----------------------------------------------------------------------------------


def test_a_quadratic_problem_ends_after_finitely_many_sets_at_an_exact_solution(options):
    options(sqp_kkt_precond="direct")
    problem = examples.heat(n=12, num_steps=16)
    result = bounded(problem, **narrow_box(problem), kkt_rtol=1e-12).solve()
    errors = [max(pair) for pair in zip(result.history["optimality"], result.history["feasibility"])]
    assert result.converged and result.iterations <= 8
    assert errors[-1] <= 1e-12 and min(errors[1:-1]) >= 1e-5  # not a limit, but a hit
    assert "Gauss" not in "".join(result.history["note"]) and set(result.history["radius"]) == {1.0}


def test_counts_do_not_depend_on_the_mesh(options):
    options(sqp_kkt_precond="direct")
    counts = []
    for n in (8, 16, 32):
        problem = examples.heat(n=n, num_steps=n)
        counts.append(bounded(problem, lower=-0.1, upper=0.3).solve().iterations)
    assert max(counts) - min(counts) <= 2, counts


@pytest.mark.parametrize("name", ["heat", "burgers"])
def test_bounds_that_do_not_bind_leave_newtons_iterates(name, options):
    options(sqp_kkt_precond="direct")
    problem = examples.EXAMPLES[name]()
    expected = SQPSolver(problem, type="newton", opt_tol=1e-10, feas_tol=1e-10).solve()
    for box in ({}, {"lower": -1e3}, {"upper": 1e3}, {"lower": -1e3, "upper": 1e3}):
        found = bounded(problem, **box).solve()
        assert found.iterations == expected.iterations
        assert relative(entries(found.design), entries(expected.design)) <= 1e-10
        assert found.history[-1].note.startswith("0 active")


def test_bounds_that_are_equal_fix_the_control(options):
    options(sqp_kkt_precond="direct")
    problem = examples.burgers()
    design = random_design(problem, 3, 0.3)
    result = bounded(problem, lower=entries(design), upper=entries(design)).solve()
    assert result.converged and relative(entries(result.design), entries(design)) <= 1e-14
    assert relative(entries(result.state), entries(problem.solve_state(design))) <= 1e-8


def test_every_start_leads_to_the_same_optimum(options):
    options(sqp_kkt_precond="direct")
    problem = examples.burgers()
    box = narrow_box(problem)
    expected, solver = bounded(problem, **box).solve(), bounded(problem, **box)
    for seed in range(3):
        found = solver.solve(solver.start(random_design(problem, seed, 0.5)))
        assert found.converged and relative(entries(found.design), entries(expected.design)) <= 1e-7


def test_cheap_control_follows_a_path_of_prices(options):
    """Full steps throw the controls of this problem from bound to bound; the result meets the KKT conditions."""
    options(sqp_kkt_precond="direct", tao_type="bqnls")
    problem = heat.HeatCase(heat.HeatSettings(nx=6, ny=3, nt=32, alpha=1e-6)).problem
    result = bounded(problem, lower=-1.0, upper=1.0).solve()
    notes = result.history["note"]
    assert result.converged and any("dearer prices" in note for note in notes), (result.message, notes)
    assert sum(result.history["krylov"]) <= 40  # one a set, those of the path counted
    lin, z = problem.at(problem.join(result.state, result.design)), entries(result.design)
    mu = -entries(lin.lagrangian_gradient(result.multiplier))
    assert mu[: problem.layout.state_size].abs().max() <= 1e-10 and entries(lin.residual).abs().max() <= 1e-10
    mu = mu[problem.layout.state_size :]
    assert (z.abs() <= 1.0).all() and mu[z.abs() < 1.0 - 1e-9].abs().max() <= 1e-10
    assert (mu * z >= -1e-12).all() and (z.abs() == 1.0).double().mean() > 0.3


def test_controls_of_a_wave_that_cost_little_do_not_swing_from_bound_to_bound():
    """A multiplier of the wrong sign frees a control first; at once on the other bound, all of them came back."""
    settings = klein_gordon.KleinGordonSettings(nx=16, nt=32, alpha=1e-6)
    problem = klein_gordon.KleinGordonCase(settings).problem
    result = SQPSolver(problem, type="active_set", lower=-0.5, upper=0.5).solve()
    assert result.converged and result.iterations <= 40, result.message
    inside = SQPSolver(problem, type="interior", lower=-0.5, upper=0.5).solve()
    assert result.objective == pytest.approx(inside.objective, abs=1e-7) and result.objective <= inside.objective


class Nothing(TimeDependentConstraint):
    """u_new = 0 whatever the control."""

    state_dim = control_dim = 3

    def initial_state(self, p):
        return torch.zeros(3, dtype=torch.float64)

    def residual(self, u_old, u_new, z, steps):
        return u_new + 0.0 * z


class Quadratic(Objective):
    """z'Hz/2 + c'z, positive definite, on which active sets cycle (F. E. Curtis, Z. Han, D. P. Robinson, A globally
    convergent primal-dual active-set framework for large-scale convex quadratic optimization, 2015)."""

    H = torch.tensor([[4.0, 5, -5], [5, 9, -5], [-5, -5, 7]], dtype=torch.float64)
    c = torch.tensor([2.0, 1, -3], dtype=torch.float64)

    def value(self, u, z, steps):
        return (steps.dt > 0).double() * (0.5 * ((z @ self.H) * z).sum(-1) + z @ self.c + 0.5 * (u * u).sum(-1))


def test_active_sets_that_cycle_are_a_reason_with_a_remedy(options):
    options(sqp_kkt_precond="direct")
    problem = ControlProblem(Nothing(), Quadratic(), TimeGrid.uniform(1, 1.0))
    result = bounded(problem, upper=0.0).solve()
    assert result.reason == Reason.DIVERGED_CYCLE and "-solver tao" in result.message
    assert result.iterations <= 8 and (entries(result.design) <= 0.0).all()  # z is moved into the box


# -- linear systems with fixed controls ----------------------------------------------------------------------


def fixed_system(name, hessian):
    """A problem, a random point, fixed controls, and the dense matrix without their rows and columns."""
    problem = examples.EXAMPLES[name]()
    x, lam = randomize(problem.create_primal(), 4), randomize(problem.create_multiplier(), 5)
    x.scale(0.5)
    lin, fixed = problem.at(x), torch.arange(problem.layout.design_size) % 3 == 0
    K = Oracle(problem).kkt(torch.cat([entries(x), entries(lam)]), hessian)
    place = torch.nonzero(fixed)[:, 0] + problem.layout.state_size
    K[place], K[:, place] = 0.0, 0.0
    return problem, lin, lam, fixed, K, place


@pytest.mark.parametrize("hessian", ["metric", "full", "gauss-newton"])
@pytest.mark.parametrize("name", ["burgers", "dense nodal"])
def test_rows_and_columns_of_fixed_controls_are_those_of_a_multiple_of_the_identity(name, hessian):
    problem, lin, lam, fixed, K, place = fixed_system(name, hessian)
    operator = KKTOperator(RieszMetric(problem), hessian)
    operator.set_point(lin, lam)
    whole = dense(operator.assemble())
    operator.set_point(lin, lam, fixed)
    K[place, place] = operator.pin
    shell, matrix = operator.shell(), operator.assemble()
    for found in (shell, matrix):
        assert relative(dense(found), K) <= 1e-12 and symmetry_error(found) <= 1e-14
    operator.set_point(lin, lam)
    assert relative(dense(operator.assemble()), whole) <= 1e-14  # nothing is lost
    shell.destroy(), operator.free()


@pytest.mark.parametrize("precond", ["direct", "wathen", "block_jacobi", "multigrid"])
def test_every_preconditioner_knows_fixed_controls(precond, options):
    options(test_kkt_precond=precond)
    problem, lin, lam, fixed, K, place = fixed_system("heat", "full")
    solver = KKTSolver(RieszMetric(problem), "full", "test_")
    solver.set_point(lin, lam, fixed)
    K[place, place] = solver.operator.pin
    r = randomize(problem.create_kkt(), 6)
    r.setValues(place.tolist(), np.zeros(len(place)))
    r.assemble()
    s = solver.solve(r, 1e-11)
    assert not entries(s)[place].abs().max() > 1e-12
    assert relative(entries(s), torch.linalg.solve(K, entries(r))) <= 1e-7
    assert solver.take_iterations() <= 40
    solver.destroy()


@pytest.mark.parametrize("alpha", ["1e-3", "1e-5"])
def test_the_matched_preconditioner_does_not_feel_the_price_of_the_free_controls(alpha, tmp_path):
    words = ["-nx", 10, "-ny", 4, "-nt", 16, "-alpha", alpha, "-solver", "active_set", "-upper", 0.5, "-sqp_max_it", 3]
    heat.main([str(word) for word in (*words, "-summary", tmp_path / "s.json")])
    assert max(json.loads((tmp_path / "s.json").read_text())["krylov_iterations"]) <= 40


def test_a_control_map_wants_the_direct_solver(options):
    options(sqp_kkt_precond="wathen")
    with pytest.raises(InputError, match="direct"):
        bounded(examples.burgers(nodal=True), upper=0.1).solve()


# -- bad bounds ------------------------------------------------------------------------------------------------

BAD = {
    "crossed": ({"lower": 1.0, "upper": 0.0}, "lower <= upper"),
    "nan": ({"lower": float("nan")}, "lower <= upper"),
    "size": ({"upper": np.ones(2)}, "a number, or values of this rank"),
    "type": ({"upper": 1.0, "type": "newton"}, "active_set"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bounds_are_named_with_what_is_legal(case):
    words, legal = BAD[case]
    with pytest.raises(InputError, match=legal):
        SQPSolver(examples.heat(), **{"type": "active_set"} | words)


def test_sides_of_the_box():
    problem = examples.heat(n=2, num_steps=2)
    box = Bounds.of(problem, [0.0, 0.0, 0.0, 1.0], 1.0)
    z, mu = torch.tensor([[1.0, 0.5, -0.1, 1.0], [0.0, 0.6, -0.6, 0.0]], dtype=torch.float64)
    assert box.side(z, mu).tolist() == [0, 1, -1, 1]
    assert box.miss(z, torch.tensor([0, 1, -1, 1])).tolist() == pytest.approx([0.0, -0.5, -0.1, 0.0])
    assert vector(problem.create_design(), box.nearest(z)).max()[1] == 1.0


# -- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_two_ranks_find_the_same_optimum_in_the_same_steps(tmp_path):
    words = ["-nx", 8, "-ny", 4, "-nt", 7, "-solver", "active_set", "-upper", 0.4, "-sqp_kkt_rtol", "1e-11"]
    files = [["-summary", f"{tmp_path}/{r}.json", "-output", f"{tmp_path}/{r}.npz"] for r in (1, 2)]
    heat.main([*map(str, words), *files[0]])
    done = python("-m", "problems.heat", *words, *files[1], ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (1, 2))
    z = [np.load(tmp_path / f"{r}.npz")["control"] for r in (1, 2)]
    assert one["iterations"] == two["iterations"] and one["reason"] > 0
    assert two["objective"] == pytest.approx(one["objective"], rel=1e-12) and relative(*z) <= 1e-8


def test_a_restart_goes_on_with_the_same_iterates(tmp_path):
    words = ["-nx", 16, "-nt", 8, "-solver", "active_set", "-lower", -0.2, "-upper", 0.3, "-sqp_kkt_precond", "direct"]
    run = lambda *more: burgers.main([str(word) for word in (*words, *more)])  # noqa: E731
    expected = run("-summary", tmp_path / "a.json")
    run("-sqp_max_it", 2, "-checkpoint", tmp_path / "c")
    assert run("-restart", tmp_path / "c", "-summary", tmp_path / "b.json") == pytest.approx(expected, rel=1e-12)
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["iterations"] == b["iterations"]


def test_where_sets_come_back_the_default_goes_on_from_inside():
    """Minimum time: nearly all of the control stands at a bound."""
    problem = car(1e-3)
    sets, solver = (
        SQPSolver(problem, type="active_set", lower=-1.0, upper=1.0),
        SQPSolver(problem, lower=-1.0, upper=1.0),
    )
    assert sets.solve().reason == Reason.DIVERGED_CYCLE
    result = solver.solve()
    assert result.converged and solver.kind == "interior" and "as active sets came back" in result.message
    z, p = problem.unpack(result)[1:]
    assert z.abs().max() <= 1.0 and float(p.exp()) == pytest.approx(2.0, rel=1e-2)  # bang-bang: T = 2
    assert (z.abs() > 0.99).double().mean() > 0.9
