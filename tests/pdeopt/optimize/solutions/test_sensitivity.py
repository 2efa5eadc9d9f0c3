"""Derivatives of solutions are differences of solutions of neighboring problems, both ways, with bounds and paths."""

from functools import cache

import numpy as np
import pytest
import torch

import pdeopt as po
from tests.helpers.support import entries, python

STEP, BAR = 1e-4, 1e-7


class Oscillator(po.TimeDependentConstraint):
    """x' = (1 - y^2) x - y + a_0 z, y' = a_1 x + b p; u_0 = s + p."""

    state_dim, control_dim, param_dim = 2, 1, 1

    def __init__(self, a, s):
        self.a, self.s = a, s

    def initial_state(self, p):
        return self.s + 0.1 * p

    def residual(self, u_old, u_new, z, steps):
        x, y = (0.5 * (u_old + u_new)).chunk(2, dim=1)
        slope = torch.cat([(1 - y**2) * x - y + self.a[0] * z, self.a[1] * x + 0.3 * steps.p], dim=1)
        return u_new - u_old - steps.dt[:, None] * slope


def oscillator(a, s, d, c, limit=None):
    """Parameters: coefficients (2,), initial state (2,), target (N + 1, 2), price of control ()."""
    terms = po.Tracking(d) + po.ControlCost(c) + po.TerminalLoss(lambda u, p: (p - 0.2).square().sum() * (1 + c))
    return po.ControlProblem(Oscillator(a, s), terms, po.TimeGrid.uniform(12, T=3.0))


def parameters(seed=0):
    draw = np.random.default_rng(seed)
    values = np.array([1.0, 1.2]), np.array([0.3, 1.0]), 0.2 * draw.standard_normal((13, 2)), np.array(0.5)
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]


def path_of(limit):
    return po.PathConstraint(lambda u, z, steps: torch.where(steps.t_new > 0.5, u[:, 1] - limit, -torch.inf))


CASES = {
    "free": lambda q: {"method": "newton"},
    "reduced": lambda q: {"method": "tao", "tao_type": "nls"},
    "bounds": lambda q: {"lower": -0.08, "upper": 0.4},
    "state": lambda q: {"state_lower": -0.35},
    "path": lambda q: {"path": path_of(0.3 + 0.1 * q[0][1]), "lower": -0.6},
}
LIMITS = ("lower", "upper", "state_lower", "path")


def solved(case, q, start=None):
    """The problem and its solution; bounds and paths."""
    problem, words = oscillator(*q), CASES[case](q)
    result = po.solve(problem, opt_tol=1e-10, start=None if case == "free" else start, **words)
    assert result.converged, result.message
    return problem, result, {name: words[name] for name in LIMITS if name in words}


def flat(problem, result):
    """u, z, p, lam and J of a solution."""
    value = torch.tensor([result.objective], dtype=torch.float64)
    return torch.cat([*(x.reshape(-1) for x in problem.unpack(result)), entries(result.multiplier), value])


def moved(q, dq, size):
    return [(x + size * d).detach().requires_grad_() for x, d in zip(q, dq)]


def active(problem, result):
    """How many controls or inequalities are active."""
    if isinstance(result, po.InequalityResult):
        return sum(report.active for report in result.inequalities.values())
    z = problem.unpack(result)[1]
    return int(((z == -0.08) | (z == 0.4)).sum())


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in ("state", "reduced") else ()) for c in CASES]
)
def test_both_ways_are_the_difference_of_two_solutions(case):
    q = parameters()
    problem, result, limits = solved(case, q)
    assert active(problem, result) >= (1 if limits else 0)
    how, draw = po.Sensitivity(problem, result, q, **limits), torch.Generator().manual_seed(1)
    dq = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in q]
    after, before = (flat(*solved(case, moved(q, dq, size), result)[:2]) for size in (STEP, -STEP))
    expected = (after - before) / (2 * STEP)
    du, dz, dp, dlam, dJ = how.direct(*dq)
    found = torch.cat([du.reshape(-1), dz, dp, dlam.reshape(-1), dJ.reshape(1)])
    assert (found - expected).abs().max() <= BAR * expected.abs().max()
    w = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in (du, dz, dp, dlam, dJ)]
    product = sum(float((x * y).sum()) for x, y in zip(how.adjoint(*w), dq))
    assert product == pytest.approx(float(torch.cat([x.reshape(-1) for x in w]) @ found), rel=1e-9)


def test_a_solution_is_a_function_that_pytorch_differentiates():
    """Through computed parameters, several uses of the solution, and constants among the parameters."""
    a, s, d, c = (x.detach() for x in parameters())
    x = torch.tensor([0.2, 0.4], dtype=torch.float64, requires_grad=True)

    def loss(x):
        best = po.optimum(oscillator, a * (1 + 0.1 * x), s, d, c * x.exp().sum(), lower=-0.08, opt_tol=1e-11)
        return best.value + best.state[-1].square().sum() + best.control[3] * best.parameters[0] + best.multiplier[0, 0]

    found = torch.autograd.grad(loss(x), x)[0]
    dx = torch.tensor([1.0, -0.5], dtype=torch.float64)
    with torch.no_grad():
        expected = float(loss(x + STEP * dx) - loss(x - STEP * dx)) / (2 * STEP)
    assert float(found @ dx) == pytest.approx(expected, rel=1e-7)


def test_a_stationary_field_of_coefficients_and_a_target_given_as_a_function():
    """-(k u')' = z: the value's derivative by k and by what the target is made of."""
    n = 6

    def problem_of(k, scale):
        def residual(u, z):
            flow = k * torch.diff(torch.nn.functional.pad(u, (1, 1)), dim=1) * (n + 1)
            return -torch.diff(flow, dim=1) - z / (n + 1)

        target = po.Tracking(lambda t: scale * torch.ones(len(t), n, dtype=torch.float64))
        return po.stationary(residual, target + po.ControlCost(1e-2), n, n)

    k, scale = torch.linspace(1, 2, n + 1, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    q = [k.requires_grad_(), scale.requires_grad_()]
    problem = problem_of(*q)
    found = po.Sensitivity(problem, po.solve(problem, opt_tol=1e-12), q).adjoint(value=1.0)
    dq = [torch.sin(torch.arange(n + 1.0, dtype=torch.float64)), torch.tensor(-0.4, dtype=torch.float64)]
    ends = [po.solve(problem_of(*moved(q, dq, size)), opt_tol=1e-12).objective for size in (STEP, -STEP)]
    slope = sum(float((x * y).sum()) for x, y in zip(found, dq))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=BAR)


@cache
def bounded():
    q = parameters()
    return q, *solved("bounds", q)


def refused(case):
    """What is wrong, and the call."""
    q, problem, result, limits = bounded()
    if case == "converged":
        return po.Sensitivity(problem, po.solve(problem, max_it=1, **limits), q, **limits)
    if case == "bounds and paths are given again":
        return po.Sensitivity(problem, result, q)
    if case == "a result of this problem":
        return po.Sensitivity(oscillator(*q[:3], 2 * q[3]), result, q, **limits)
    if case == "nothing depends on":
        other = torch.ones(2, requires_grad=True)
        return po.Sensitivity(problem, result, [*q, other], **limits)
    if case == "requires gradients":
        return po.Sensitivity(problem, result, [q[0].detach()], **limits)
    how = po.Sensitivity(problem, result, q, **limits)
    return how.direct(q[0]) if case == "one for each" else how.adjoint(state=torch.zeros(3))


@pytest.mark.parametrize(
    "case",
    [
        "converged",
        "bounds and paths are given again",
        "a result of this problem",
        "nothing depends on",
        "requires gradients",
        "one for each",
        "shape",
    ],
)
def test_what_is_refused(case):
    with pytest.raises(po.InputError, match=case):
        refused(case)


def test_without_a_solution_there_is_nothing_to_differentiate():
    with pytest.raises(po.SolveFailure, match="max it"):
        po.optimum(oscillator, *parameters(), max_it=1)


ON_RANKS = """
import torch
import pdeopt as po
from petsc4py import PETSc
from tests.pdeopt.optimize.solutions.test_sensitivity import oscillator, parameters, path_of

q = parameters()
words = WORDS
problem = oscillator(*q)
result = po.solve(problem, opt_tol=1e-9, **words)
how = po.Sensitivity(problem, result, q, **words, precond="PRECOND")  # which nobody destroys
du, dz, dp, dlam, dJ = how.direct(*(torch.ones_like(x) for x in q))
sums = [problem.grid.sum(x.square().sum()) for x in (du, dz, dlam)]
numbers = [*sums, *dp, dJ, *(x.sum() for x in how.adjoint(du, dz, dp, dlam, dJ))]
PETSc.Sys.Print(" ".join(f"{float(x):.9e}" for x in numbers))
"""


@pytest.mark.mpi
@pytest.mark.parametrize(
    "words, precond",
    [
        ('{"lower": -0.08}', "reduced"),
        pytest.param('{"path": path_of(0.3 + 0.1 * q[0][1])}', "direct", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_have_the_same_numbers_and_end(words, precond):
    program = ON_RANKS.replace("WORDS", words).replace("PRECOND", precond)
    outputs = [python("-c", program, ranks=ranks) for ranks in (1, 2)]
    assert [done.returncode for done in outputs] == [0, 0], outputs[1].stderr
    one, two = (np.array(done.stdout.split(), dtype=float) for done in outputs)
    assert len(one) == 9 and np.allclose(one, two, rtol=1e-6)
