import pytest
import torch

from pdeopt.control.metric import RieszMetric
from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.functions.smooth import ScaledFunction
from pdeopt.optimize.descent.schwarz import SPQN
from pdeopt.optimize.tao import TaoSolver
from tests.helpers import examples
from tests.helpers.functions import start
from tests.helpers.support import entries, relative

NAMES = ["burgers", "burgers nodal", "layer"]


def scaled(reduced):
    """A function of y = D z, D^2 the lumped metric."""
    return ScaledFunction(reduced, entries(RieszMetric(reduced.problem).root()))


def function_of(name):
    problem = examples.EXAMPLES[name]()
    return scaled(ReducedObjective(problem))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_hessians_are_those_of_the_values(name):
    f = function_of(name)
    x, d = 0.1 * start(f.size), start(f.size, 1)
    _, g = f.value_and_gradient(x)
    eps = 1e-5
    slope = (f.value(x + eps * d) - f.value(x - eps * d)) / (2 * eps)
    assert slope == pytest.approx(float(g @ d), rel=1e-6)
    up, down = (f.value_and_gradient(x + s * eps * d)[1] for s in (1, -1))
    assert relative((up - down) / (2 * eps), f.hvp(x, d)) < 1e-6


@pytest.mark.parametrize("horizon", [0, 2, 100])
def test_windows_are_first_order_consistent(horizon):
    f = scaled(ReducedObjective(examples.burgers(nx=8, nt=12), horizon=horizon))
    x, d = 0.1 * start(f.size), f.decompose(5, overlap=1)
    value, g = f.value_and_gradient(x)
    for s, indices in enumerate(d.parts):
        local, zero = f.local(d, s, x), torch.zeros(len(indices), dtype=torch.float64)
        at_zero, gradient = local.value_and_gradient(zero)
        assert at_zero == pytest.approx(value, rel=1e-13)
        assert relative(gradient, g[indices]) < 1e-12
        step, eps = start(len(indices), s), 1e-5
        slope = (local.value(eps * step) - local.value(-eps * step)) / (2 * eps)
        assert slope == pytest.approx(float(gradient @ step), rel=1e-5)
        curvature = (local.value_and_gradient(eps * step)[1] - local.value_and_gradient(-eps * step)[1]) / (2 * eps)
        assert relative(curvature, local.hvp(zero, step)) < 1e-5


def test_a_window_with_the_whole_horizon_is_the_restriction():
    f = ReducedObjective(examples.burgers(nx=8, nt=12), horizon=100)
    x, d = 0.1 * start(f.size), f.decompose(3)
    f.value_and_gradient(x)
    for s, indices in enumerate(d.parts):
        step = 0.1 * start(len(indices), s)
        assert f.local(d, s, x).value(step) == pytest.approx(f.value(x + d.prolong(s, step)), rel=1e-12)


def test_windows_cost_their_share():
    f = ReducedObjective(examples.burgers(nx=8, nt=12))
    x = start(f.size)
    f.value_and_gradient(x)
    local, before = f.local(f.decompose(4), 2, x), f.tally.work
    local.value_and_gradient(torch.zeros(local.size, dtype=torch.float64))
    assert f.tally.work - before == pytest.approx(0.25)
    f.local(f.decompose(4), 2, x + 1.0)
    assert f.tally.work - before == pytest.approx(1.25)  # the state and adjoint at another point


def test_the_preconditioner_inverts_the_control_cost():
    """Without the state's part, the Hessian of J is that of the control cost."""
    problem = examples.burgers(nx=8, nt=6)
    f = scaled(ReducedObjective(problem))
    H, d = f.preconditioner(), start(f.size)
    z = (H(d) / f.scale).reshape(problem.grid.n_local, problem.m)
    _, gz, _ = problem.objective.gradient(
        problem.initial_state(torch.empty(0)).expand(len(z), -1), z, problem.grid.steps
    )
    assert relative(gz.reshape(-1) / f.scale, d) < 1e-10


@pytest.mark.parametrize("name", ["SPQN", "LBFGS", "SSBroyden"])
@pytest.mark.parametrize("problem", ["burgers", "burgers nodal"])
def test_tao_types_find_the_optimum(options, name, problem):
    expected = TaoSolver(ReducedObjective(examples.EXAMPLES[problem]())).solve()
    options(tao_type="python", tao_python_type=f"pdeopt.optimize.{name}", spqn_parts="2", spqn_local_it="2")
    found = TaoSolver(ReducedObjective(examples.EXAMPLES[problem]())).solve()
    assert found.reason == Reason.CONVERGED_OPTIMALITY, found.message
    assert found.objective == pytest.approx(expected.objective, rel=1e-9)
    assert relative(entries(found.design), entries(expected.design)) < 1e-4


def test_defaults_for_controls_do_not_stay(options):
    options(tao_type="python", tao_python_type="pdeopt.optimize.SPQN")
    assert TaoSolver(ReducedObjective(examples.burgers(nx=6, nt=8))).solve().converged
    assert SPQN(parts=2).settings.local_it == 10 and SPQN(local_it=3).settings.local_it == 3


@pytest.mark.parametrize("name", ["", "pdeopt.optimize.LBGFS"])
def test_unknown_types_are_named(options, name):
    options(tao_type="python", **({"tao_python_type": name} if name else {}))
    with pytest.raises(InputError, match=r"pdeopt\.optimize\.LBFGS"):
        TaoSolver(ReducedObjective(examples.burgers(nx=8, nt=12)))


def test_more_windows_than_steps_are_refused():
    with pytest.raises(InputError, match="1 to 12"):
        ReducedObjective(examples.burgers(nx=8, nt=12)).decompose(13)
