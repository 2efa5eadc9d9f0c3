import pytest
import torch

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.core.errors import SolveFailure
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples


@pytest.mark.parametrize("name", ["burgers", "burgers theta", "burgers nodal"])
def test_detection_finds_the_declared_pattern(name):
    c = examples.EXAMPLES[name]().constraint
    found = c.detect_pattern()
    for block in "ABCW":
        expected = getattr(c.pattern, block).csr.toarray().astype(bool)
        assert (getattr(found, block).csr.toarray().astype(bool) == expected).all(), block


class Scalar(TimeDependentConstraint):
    """One unknown, one control; `function` of (u_old, u_new, z)."""

    state_dim = control_dim = 1

    def __init__(self, function):
        self.function = function

    def initial_state(self, p):
        return torch.ones(1, dtype=torch.float64)

    def residual(self, u_old, u_new, z, steps):
        return self.function(u_old, u_new, z)


def advance(constraint, z=0.0, u_old=1.0):
    steps = TimeGrid.uniform(1, 1.0).steps
    return constraint.advance(*(torch.full((1, 1), v, dtype=torch.float64) for v in (u_old, z)), steps)


@pytest.mark.parametrize("name", ["dense", "burgers", "heat", "layer"])
def test_advance_solves_the_step(name):
    c, (u_old, _, z), steps, _ = examples.step_point(name)
    u = c.advance(u_old, z, steps)
    assert c.residual(u_old, u, z, steps).abs().max() <= 1e-12 * (1 + u.abs().max())


def test_advance_halves_steps_where_newton_overshoots():
    """Newton's method for arctan diverges from 3."""
    u = advance(Scalar(lambda u_old, u, z: torch.atan(u)), u_old=3.0)
    assert float(u) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda u_old, u, z: u**2 + 1,  # no solution
        lambda u_old, u, z: 0 * u + 1,  # singular
        lambda u_old, u, z: torch.log(-u),  # not a number
    ],
)
def test_a_step_without_solution_is_a_solve_failure(function):
    with pytest.raises(SolveFailure):
        advance(Scalar(function))


def test_a_residual_that_is_nowhere_finite_has_no_pattern():
    assert Scalar(lambda u_old, u, z: u / 0.0 * 0.0).pattern is None


def test_steps_without_controls_or_coupling_are_fine():
    c = Scalar(lambda u_old, u, z: u - 2.0)
    assert c.pattern.B.nnz == c.pattern.C.nnz == c.pattern.W.nnz == 0
    assert float(advance(c)) == 2.0
