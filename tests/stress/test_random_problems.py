"""Random small control problems against dense derivatives of formulas that are written down once more."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd

from pdeopt.control.metric import RieszMetric
from pdeopt.control.reduced import ReducedObjective
from pdeopt.control.verify import randomize
from pdeopt.functions.petsc import PetscFunction
from pdeopt.kkt.operator import KKTOperator
from tests.helpers import random_problems as random
from tests.helpers.stress import many
from tests.helpers.support import dense, entries, random_design, relative

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

CHOICES = st.builds(
    random.Choice,
    n=st.integers(1, 4),
    m=st.integers(1, 3),
    params=st.integers(0, 2),
    steps=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    terms=st.sampled_from(random.TERMS),
    masses=st.sampled_from(random.MASSES),
    controls=st.sampled_from(random.CONTROLS),
    matrix_free=st.booleans(),
    target=st.sampled_from(random.TARGETS),
    observed=st.booleans(),
    coupled=st.booleans(),
    terminal=st.booleans(),
)


def check_derivatives(problem, formulas, seed):
    """Value, constraint, gradient, Jacobian and Hessian product at a random point; all within rounding."""
    x, lam = randomize(problem.create_primal(), seed), randomize(problem.create_multiplier(), seed + 1)
    x.scale(0.5)
    dx, point = randomize(problem.create_primal(), seed + 2), entries(x)
    lin = problem.at(x)
    scale = max(1.0, abs(float(formulas.J(point))))
    assert abs(lin.value - float(formulas.J(point))) <= 1e-13 * scale
    assert relative(entries(lin.residual), formulas.F(point)) <= 1e-12
    assert relative(entries(lin.gradient), grad(formulas.J)(point)) <= 1e-12
    F = jacfwd(formulas.F)(point)
    assert relative(entries(lin.jvp(dx, problem.create_multiplier())), F @ entries(dx)) <= 1e-12
    assert relative(entries(lin.vjp(lam, problem.create_primal())), F.T @ entries(lam)) <= 1e-12
    W = hessian(lambda x: formulas.L(torch.cat([x, entries(lam)])))(point)
    assert relative(entries(lin.hvp(lam, dx, x.duplicate())), W @ entries(dx)) <= 1e-11
    return lin, lam, torch.cat([point, entries(lam)])


def check_kkt(problem, formulas, lin, lam, k):
    """The KKT matrix, as products and assembled."""
    for kind in ("metric", "full", "gauss-newton"):
        operator = KKTOperator(RieszMetric(problem), kind)
        operator.set_point(lin, lam)
        expected, shell = formulas.kkt(k, kind), operator.shell()
        v = randomize(problem.create_kkt(), 7)
        w = v.duplicate()
        shell.mult(v, w)
        assert relative(entries(w), expected @ entries(v)) <= 1e-11, kind
        shell.destroy()
        if problem.constraint.pattern is not None:
            assert relative(dense(operator.assemble()), expected) <= 1e-11, kind
            operator.free()


def check_reduced(problem, formulas, seed):
    """The reduced objective, its gradient, and a Hessian product by central differences of exact gradients."""
    z, dz = random_design(problem, seed, 0.2), random_design(problem, seed + 1)
    function, g = PetscFunction(ReducedObjective(problem)), z.duplicate()
    value = function.value_and_gradient(z, g)
    x = torch.cat([entries(problem.solve_state(z)), entries(z)])
    assert abs(value - float(formulas.J(x))) <= 1e-11 * max(1.0, abs(value))
    N = formulas.sizes[0]
    F, dJ = jacfwd(formulas.F)(x), grad(formulas.J)(x)
    lam = torch.linalg.solve(F[:, :N].T, -dJ[:N])
    assert relative(entries(g), dJ[N:] + F[:, N:].T @ lam) <= 1e-9
    S = torch.cat([-torch.linalg.solve(F[:, :N], F[:, N:]), torch.eye(len(x) - N, dtype=torch.float64)])
    W = hessian(lambda x: formulas.L(torch.cat([x, lam])))(x)
    h = function.hvp(z, dz, dz.duplicate())
    assert relative(entries(h), S.T @ W @ S @ entries(dz)) <= 1e-8


def test_random_problems_have_the_derivatives_of_their_formulas(tally):
    @many(200, 3)
    @hypothesis.given(CHOICES)
    def one(choice):
        tally.tried += 1
        problem, formulas = random.random_problem(choice)
        lin, lam, k = check_derivatives(problem, formulas, choice.seed % 1000)
        check_kkt(problem, formulas, lin, lam, k)
        check_reduced(problem, formulas, choice.seed % 1000)

    one()
