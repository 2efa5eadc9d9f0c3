"""Parameters have what controls have: an inner product of their own, and bounds, in full and in reduced space."""

import numpy as np
import pytest
import torch

import pdeopt as po
from pdeopt.optimize.parts.bounds import Bounds
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries, python, relative


def box_of(problem, low, high):
    """Bounds on the parameters alone."""
    free = np.full(problem.control_size, np.inf)
    P = np.ones(problem.param_dim)
    return {"lower": np.r_[-free, low * P], "upper": np.r_[free, high * P]}


CASES = {"field": (examples.conductor, -1.0, 0.0), "with controls": (examples.dense, -0.1, 0.2)}


@pytest.mark.parametrize("case", CASES)
def test_active_sets_and_tao_agree_and_the_kkt_conditions_hold(case):
    make, low, high = CASES[case]
    problem = make()
    box = box_of(problem, low, high)
    sets = po.solve(problem, **box, opt_tol=1e-10, feas_tol=1e-10)
    assert sets.method == "active_set" and sets.reason == po.Reason.CONVERGED_OPTIMALITY, sets.message
    reduced = po.solve(problem, method="tao", tao_type="bnls", **box, opt_tol=1e-9)
    assert sets.objective == pytest.approx(reduced.objective, rel=1e-10)
    assert relative(entries(reduced.design), entries(sets.design)) <= 1e-5
    k = torch.cat([entries(part) for part in (sets.state, sets.design, sets.multiplier)])
    g = torch.func.grad(Oracle(problem).L)(k)
    start = problem.layout.state_size + problem.control_size
    p, mu = entries(sets.design)[problem.control_size :], -g[start : start + problem.param_dim]
    g[start : start + problem.param_dim] = 0.0
    at_low, at_high = p == low, p == high  # to the last bit
    assert g.abs().max() <= 1e-8 and p.min() >= low and p.max() <= high
    assert (mu[at_low] <= 1e-9).all() and (mu[at_high] >= -1e-9).all()
    assert (mu[~at_low & ~at_high].abs() <= 1e-8).all() and (at_low | at_high).any()


def test_a_number_bounds_the_parameters_where_there_are_no_controls():
    problem = examples.conductor()
    found = [po.solve(problem, method, lower=-1.0) for method in ("active_set", "tao")]
    listed = po.solve(problem, lower=[-1.0] * problem.param_dim)
    assert entries(found[0].design).min() == -1.0 and found[0].objective == listed.objective
    assert found[1].objective == pytest.approx(found[0].objective, rel=1e-8)


def test_counts_of_a_field_with_its_inner_product_do_not_depend_on_its_mesh():
    counts = [po.solve(examples.conductor(n), method="newton").iterations for n in (7, 14)]
    assert max(counts) - min(counts) <= 1, counts


def test_the_tolerance_is_that_of_the_dual_norm_of_the_field():
    problem = examples.conductor()
    P = torch.from_numpy(problem.constraint.param_mass.toarray())
    g = problem.create_design()
    g.setArray(np.sin(np.arange(problem.param_dim)))
    expected = float(entries(g) @ torch.linalg.solve(P, entries(g))) ** 0.5
    assert po.RieszMetric(problem).design_dual_norm(g) == pytest.approx(expected, rel=1e-12)


def test_values_and_derivatives_do_not_depend_on_the_inner_product():
    problem = examples.conductor()
    f, z, dz = po.ReducedObjective(problem), problem.create_design(), problem.create_design()
    po.randomize(dz, 1)
    remainders = po.taylor_remainders(f, z, dz)
    for degree, name in enumerate(("value", "gradient", "hessian"), 1):
        assert po.taylor_rates(remainders[name])[-1] == pytest.approx(degree, abs=0.1)


@pytest.mark.parametrize("mass", [-np.eye(8), np.eye(3), np.triu(np.ones((8, 8))), np.nan * np.eye(8)])
def test_a_wrong_inner_product_is_refused(mass):
    rod = examples.Rod(7)
    rod.param_mass = mass
    with pytest.raises(po.InputError, match="param_mass"):
        po.ControlProblem(rod, po.Tracking(np.zeros(7)), po.TimeGrid.uniform(4, 1.0))


ON_RANKS = """
import numpy as np
import pdeopt as po
from petsc4py import PETSc
from tests.helpers import examples

problem = examples.dense()
free = np.full(problem.control_size, np.inf)
result = po.solve(problem, lower=np.r_[-free, -0.1, -0.1], upper=np.r_[np.full(problem.control_size, 0.3), 0.2, 0.2])
PETSc.Sys.Print(result.method, result.iterations, f"{result.objective:.10f}", problem.unpack(result)[2].tolist())
"""


@pytest.mark.mpi
def test_parameters_are_bounded_alike_on_two_ranks():
    """They stand on the first; all ranks name all of them."""
    outputs = [python("-c", ON_RANKS, ranks=ranks) for ranks in (1, 2)]
    assert [done.returncode for done in outputs] == [0, 0], outputs[1].stderr
    assert outputs[0].stdout == outputs[1].stdout and outputs[0].stdout.startswith("active_set")


WRONG_BOUNDS = {
    "transposed": lambda n, m: np.zeros((m, n)),
    "complex": lambda n, m: np.zeros(n * m) + 0j,
    "text": lambda n, m: ["0"] * (n * m),
    "objects": lambda n, m: np.array([None] * (n * m)),
    "nan": lambda n, m: np.full(n * m, np.nan),
}
RIGHT_BOUNDS = {
    "single precision": lambda n, m: np.full((n, m), -0.5, dtype=np.float32),
    "big-endian": lambda n, m: np.full(n * m, -0.5, dtype=">f8"),
    "every second": lambda n, m: np.full(2 * n * m, -0.5)[::2],
    "bfloat16": lambda n, m: torch.full((n * m,), -0.5, dtype=torch.bfloat16),
    "zero-dimensional": lambda n, m: torch.tensor(-0.5, requires_grad=True),
    "rows": lambda n, m: [[-0.5] * m] * n,
}


@pytest.mark.parametrize("form", WRONG_BOUNDS)
@pytest.mark.parametrize(
    "solver", [po.SQPSolver, lambda problem, **box: po.TaoSolver(po.ReducedObjective(problem), **box)]
)
def test_what_is_no_bound_is_refused_by_every_solver(solver, form):
    problem = examples.heat()
    with pytest.raises(po.InputError):
        solver(problem, lower=WRONG_BOUNDS[form](problem.grid.n_local, problem.m))


@pytest.mark.parametrize("form", RIGHT_BOUNDS)
def test_bounds_may_be_of_any_real_type(form):
    problem = examples.heat()
    bounds = Bounds.of(problem, RIGHT_BOUNDS[form](problem.grid.n_local, problem.m))
    assert bounds.lower.tolist() == [-0.5] * problem.control_size and bounds.lower.dtype == torch.float64


@pytest.mark.parametrize("method", ["active_set", "tao"])
@pytest.mark.parametrize("seed", range(2))
def test_a_control_is_in_its_box_to_the_last_bit(method, seed):
    problem = examples.burgers(nx=8, nt=8)
    draw = np.random.default_rng(seed)
    low = -0.3 * draw.random(problem.control_size)
    high = low + 0.3 * draw.random(problem.control_size)
    for words in ({}, {"max_it": 1}):
        z = entries(po.solve(problem, method, lower=low, upper=high, start=5.0, **words).design).numpy()
        assert (low <= z).all() and (z <= high).all()
