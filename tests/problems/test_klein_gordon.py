"""The Klein-Gordon problem against theorems, independent solutions and optima of other programs."""

import numpy as np
import pytest
import torch
from scipy.io import loadmat

from pdeopt.control.objective import ControlCost
from pdeopt.control.problem import ControlProblem
from pdeopt.control.stepjacobian import SparseStepJacobian, StepJacobian
from pdeopt.control.verify import assert_consistent
from pdeopt.core.errors import InputError
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.steps.timegrid import TimeGrid
from problems.klein_gordon import (
    CubicKleinGordon,
    KleinGordon,
    KleinGordonCase,
    KleinGordonSettings,
    main,
    pad,
    stencil,
)
from tests.helpers.support import ROOT, python, relative

REFERENCES = sorted((ROOT / "tests/reference").glob("klein_gordon_*.mat"))
CONSTRAINTS = {
    "midpoint": lambda: KleinGordon(6, 1.5),
    "unforced": lambda: KleinGordon(5, -0.7, forced=False),
    "cubic": lambda: CubicKleinGordon(6, 1.5),
    "one free node": lambda: KleinGordon(2, 1.0),
}


def solve(method="newton", tolerance=1e-12, **words):
    case = KleinGordonCase(KleinGordonSettings(**words))
    result = SQPSolver(case.problem, type=method, opt_tol=tolerance, feas_tol=tolerance).solve()
    assert result.converged, result.message
    return case, result


def test_there_are_references():
    assert len(REFERENCES) == 8


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.stem.removeprefix("klein_gordon_"))
def test_solutions_are_those_of_the_independent_script(file):
    reference = loadmat(file, squeeze_me=True)
    words = {name: float(reference[name]) for name in ("alpha", "g", "T")}
    sizes = {name: int(reference[name]) for name in ("nx", "nt")}
    case, result = solve(variant=str(reference["variant"]), **words, **sizes)
    arrays = case.arrays(result)
    assert result.objective == pytest.approx(float(reference["objective"]), rel=1e-10)
    for name, rows in {"u": "state", "v": "velocity"}.items():
        assert relative(arrays[rows][1:, 1:-1], reference[name]) <= 1e-8, rows
    for name, rows in {"lam": "multiplier", "mu": "multiplier_u"}.items():
        assert relative(arrays[rows][:, 1:-1], reference[name]) <= 1e-8, rows
    assert relative(arrays["control"], reference["z"]) <= 1e-8


def test_the_plans_optimum():
    words = ["-nx", "16", "-nt", "32", "-solver", "newton", "-sqp_opt_tol", "1e-11", "-sqp_feas_tol", "1e-11"]
    assert main(words) == pytest.approx(0.5476383833738, abs=1e-13)


@pytest.mark.parametrize(
    "n, J", [(16, 0.092687799047), (32, 0.092467998144), pytest.param(64, 0.092407139139, marks=pytest.mark.slow)]
)
def test_optima_of_the_cubic_equation(n, J):
    assert solve(variant="cubic", nx=n, nt=n, tolerance=1e-9)[1].objective == pytest.approx(J, abs=1e-12)


@pytest.mark.parametrize("words", [dict(nx=16, nt=32), dict(nx=10, nt=20, variant="cubic")], ids=["boundary", "cubic"])
def test_the_composite_step_finds_the_same_optimum(words):
    (case, newton), (_, composite) = solve(**words), solve("composite", 1e-10, **words)
    expected, found = case.arrays(newton), case.arrays(composite)
    assert composite.objective == pytest.approx(newton.objective, rel=1e-12)
    for name in ("state", "velocity", "control", "multiplier", "multiplier_u"):
        assert relative(found[name], expected[name]) <= 1e-7, name


def trajectory(constraint, steps, T):
    """The states for z = 0 and g as given, (steps + 1, state_dim)."""
    problem = ControlProblem(constraint, ControlCost(1.0), TimeGrid.uniform(steps, T))
    u = torch.from_numpy(problem.solve_state(problem.create_design()).getArray().reshape(steps, -1).copy())
    return torch.cat([constraint.initial_state(u[:0, 0])[None], u])


def test_without_control_the_solution_is_x_cos_t_to_second_order():
    def error(n):
        kg = KleinGordon(n, 1.0)
        u, v = trajectory(kg, 4 * n, 6.0).chunk(2, dim=1)
        t, x = torch.linspace(0, 6.0, 4 * n + 1, dtype=u.dtype)[:, None], kg.nodes[1:-1]
        return float(max((u - x * torch.cos(t)).abs().amax(), (v + x * torch.sin(t)).abs().amax()))

    errors = np.array([error(n) for n in (8, 16, 32)])
    assert np.log2(errors[:-1] / errors[1:]) == pytest.approx(2, abs=0.1)
    assert errors[-1] < 1e-2


@pytest.mark.parametrize(
    "constraint", [KleinGordon(16, 0.0, forced=False), CubicKleinGordon(16, 0.0)], ids=["midpoint", "trapezoidal"]
)
def test_energy_is_conserved(constraint):
    """(|v|^2 + |u_x|^2 + r |u|^2) / 2 over 10^4 steps of the linear, unforced and uncontrolled equation."""
    u, v = trajectory(constraint, 10_000, 200.0).chunk(2, dim=1)
    energy = 0.5 * (v * stencil(constraint.mass, pad(v)) + u * stencil(constraint.stiffness, pad(u))).sum(1)
    assert energy[0] > 0.1
    assert float((energy / energy[0] - 1).abs().amax()) <= 1e-10


@pytest.mark.parametrize("n", [8, 16])
def test_the_nonlinear_term_is_integrated_exactly(n):
    """Of int u^2 phi_i for u = x, by hand: h (x_i^2 + h^2 / 6)."""
    kg = KleinGordon(n, 1.0)
    expected = kg.h * (kg.nodes[1:-1] ** 2 + kg.h**2 / 6)
    assert torch.allclose(kg.nonlinear(kg.nodes), expected, atol=1e-15)


def point(name):
    """A constraint, random unknowns of five unequal steps, and these steps."""
    constraint, draw = CONSTRAINTS[name](), torch.Generator().manual_seed(0)
    steps = TimeGrid(np.cumsum(0.1 + 0.05 * np.sin(np.arange(6)))).steps
    n, m = constraint.state_dim, constraint.control_dim
    return constraint, [torch.randn(5, size, generator=draw, dtype=torch.float64) for size in (n, n, m)], steps


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_detection_finds_the_declared_pattern(name):
    constraint = CONSTRAINTS[name]()
    found, declared = constraint.detect_pattern(), constraint.pattern
    for block in "ABCW":
        assert (getattr(found, block).csr != getattr(declared, block).csr).nnz == 0, block


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_first_derivatives_are_those_of_automatic_differentiation(name):
    constraint, where, steps = point(name)
    coded = constraint.linearize(*where, steps)
    found = SparseStepJacobian.colored(constraint, *where, steps, constraint.pattern)
    for block in "ABC":
        assert torch.allclose(coded.blocks[block].values, found.blocks[block].values, atol=1e-14), block


@pytest.mark.parametrize("directions", ["111", "100", "010", "001", "000"])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_second_derivatives_are_those_of_automatic_differentiation(name, directions):
    constraint, where, steps = point(name)
    lam = torch.sin(torch.arange(where[1].numel(), dtype=torch.float64)).reshape(where[1].shape)
    d = [torch.cos(part) if chosen == "1" else None for part, chosen in zip(where, directions)]
    coded = constraint.linearize(*where, steps).hvp(lam, *d)
    found = StepJacobian(constraint, *where, steps).hvp(lam, *d)
    for ours, theirs in zip(coded, found):
        assert torch.allclose(ours, theirs, atol=1e-14)


@pytest.mark.parametrize("variant", ["boundary", "cubic"])
def test_derivatives_of_the_whole_problem_fit(variant):
    assert_consistent(KleinGordonCase(KleinGordonSettings(nx=5, nt=6, T=2.0, variant=variant)).problem)


@pytest.mark.parametrize("words", [dict(nx=1), dict(T=0.0), dict(alpha=0.0), dict(g=np.nan), dict(variant="quartic")])
def test_parameters_that_are_not_legal_are_refused(words):
    with pytest.raises(InputError):
        KleinGordonCase(KleinGordonSettings(**words))


@pytest.mark.mpi
@pytest.mark.parametrize(
    "variant, ranks", [pytest.param("boundary", 2, marks=pytest.mark.slow), ("boundary", 3), ("cubic", 2)]
)
def test_several_ranks_find_the_solution_of_one(tmp_path, variant, ranks):
    case, result = solve(variant=variant, nx=8, nt=15, tolerance=1e-11)
    words = ("-nx", 8, "-nt", 15, "-variant", variant, "-solver", "newton")
    done = python(
        "-m",
        "problems.klein_gordon",
        *words,
        "-sqp_opt_tol",
        1e-11,
        "-sqp_feas_tol",
        1e-11,
        "-output",
        tmp_path / "found.npz",
        ranks=ranks,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    for name, expected in case.arrays(result).items():
        assert relative(found[name], expected) <= 1e-10, name
