import numpy as np
import pytest
import torch
from torch.func import grad, hessian

from pdeopt.control.objective import ControlCost, TerminalLoss, Tracking
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.errors import InputError
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples
from tests.helpers.matrices import densify

N, n, m = 4, 3, 2
GRID = TimeGrid([0.0, 0.2, 0.3, 0.6, 1.0])
P = torch.tensor([0.4, -0.7], dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(k):
    root = randn(k, k, seed=9).numpy()
    return root @ root.T + k * np.eye(k)


TERMS = {
    "tracking": Tracking(randn(N + 1, n), StepMatrix.constant(spd(n))),
    "tracking one target": Tracking(randn(n)),
    "tracking a function": Tracking(lambda t: torch.sin(t[:, None] + torch.arange(n)), StepMatrix.constant(spd(n))),
    "tracking a part": Tracking(randn(N + 1, 2), StepMatrix.constant(spd(2)), observe=np.array([2, 0])),
    "tracking sensors": Tracking(randn(N + 1, 2), spd(2), observe=randn(2, n, seed=8)),
    "tracking a part twice": Tracking(randn(3), spd(3), observe=[1, 1, 2]),
    "missing data": Tracking(np.ma.masked_less(randn(N + 1, n).numpy(), -0.3), spd(n)),
    "missing everywhere": Tracking(np.ma.masked_less(randn(n).numpy(), 0.0), spd(n)),
    "missing at sensors at times": Tracking(
        np.ma.masked_less(randn(3, 2, seed=5).numpy(), -0.3), spd(2), randn(2, n, seed=8), [1.0, 0.0, 0.3], [1, 2, 3]
    ),
    "missing in a function": Tracking(lambda t: np.ma.masked_less(np.sin(t[:, None] * np.arange(1, n + 1)), 0.5)),
    "control cost": ControlCost(0.3, StepMatrix.constant(spd(m))),
    "terminal loss": TerminalLoss(lambda u, p: torch.cosh(u).sum() * p[0] ** 2 + u[0] * p[1]),
    "coupling": examples.Coupling(),
}
TERMS["sum"] = TERMS["tracking"] + TERMS["coupling"] + (TERMS["control cost"] + TERMS["terminal loss"])


@pytest.fixture(params=TERMS)
def term(request):
    return TERMS[request.param]


def total(term):
    """The whole term as a function of one vector [u | z | p]."""

    def J(y):
        u, z, p = y.split([N * n, N * m, 2])
        return term.value(u.reshape(N, n), z.reshape(N, m), GRID.steps.with_parameters(p)).sum()

    return J


def test_gradients_and_hessians_are_those_of_the_value(term):
    u, z, steps = randn(N, n, seed=1), randn(N, m, seed=2), GRID.steps.with_parameters(P)
    y, d = torch.cat([u.ravel(), z.ravel(), P]), randn(N * (n + m) + 2, seed=3)
    du, dz, dp = d.split([N * n, N * m, 2])
    first = torch.cat([part.ravel() for part in term.gradient(u, z, steps)])
    second = torch.cat([part.ravel() for part in term.hvp(u, z, steps, du.reshape(N, n), dz.reshape(N, m), dp)])
    assert torch.allclose(first, grad(total(term))(y), atol=1e-13)
    assert torch.allclose(second, hessian(total(term))(y) @ d, atol=1e-12)


def test_hessian_sparsity_holds_every_entry(term):
    y = torch.cat([randn(N * n, seed=1), randn(N * m, seed=2), P])
    H, found = hessian(total(term))(y), torch.zeros(n + m, n + m, dtype=torch.bool)
    for i in range(N):
        own = torch.cat([torch.arange(i * n, (i + 1) * n), N * n + torch.arange(i * m, (i + 1) * m)])
        found |= H[own][:, own] != 0
    pattern = term.hessian_sparsity(n, m, GRID.samples().with_parameters(P)).csr.toarray() != 0
    assert not (found.numpy() & ~pattern).any()


def test_hessian_blocks_are_those_of_states_and_controls(term):
    u, z, steps = randn(N, n, seed=1), randn(N, m, seed=2), GRID.steps.with_parameters(P)
    H = hessian(total(term))(torch.cat([u.ravel(), z.ravel(), P]))
    for form, own in zip(term.hessian_blocks(u, z, steps), (slice(0, N * n), slice(N * n, N * (n + m)))):
        assert torch.allclose(torch.block_diag(*densify(form.spread())), H[own, own], atol=1e-12)


@pytest.mark.parametrize("name", ["tracking", "tracking a part", "control cost"])
def test_quadratic_terms_have_one_matrix_for_all_steps(name):
    for form in TERMS[name].hessian_blocks(randn(N, n), randn(N, m), GRID.steps.with_parameters(P)):
        assert form.matrix.is_constant


def test_a_term_of_the_last_state_is_zero_elsewhere():
    loss = TERMS["terminal loss"]
    u, z, steps = randn(N, n), randn(N, m), GRID.steps.with_parameters(P)
    assert torch.equal(loss.value(u[:3], z[:3], steps[:3]), torch.zeros(3))
    assert torch.equal(loss.value(u, z, steps)[:3], torch.zeros(3)) and loss.value(u, z, steps)[3] != 0


def test_tracking_at_the_target_is_free():
    term, steps = TERMS["tracking"], GRID.steps
    assert float(term.value(term.target[1:], randn(N, m), steps).abs().max()) == 0.0


@pytest.mark.parametrize(
    "target", [np.full(n, np.nan), np.full((N + 1, n), np.inf), np.zeros((2, 2, 2)), np.float64(1.0)]
)
def test_targets_that_are_none_are_refused(target):
    with pytest.raises(InputError, match="target"):
        Tracking(target)


@pytest.mark.parametrize("shape", [(n + 1,), (N, n), (N + 1, n + 1)])
def test_targets_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match="shape"):
        Tracking(np.zeros(shape)).value(randn(N, n), randn(N, m), GRID.steps)


@pytest.mark.parametrize("target", [lambda t: torch.zeros(len(t), 7), lambda t: torch.full((len(t), n), torch.nan)])
def test_functions_that_return_no_target_are_refused(target):
    with pytest.raises(InputError, match="target"):
        Tracking(target).value(randn(N, n), randn(N, m), GRID.steps)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_a_control_weight_must_be_positive(alpha):
    with pytest.raises(InputError, match="control_weight"):
        ControlCost(alpha)


def evaluated(term):
    """Value, gradient and a Hessian product of the reduced objective of the small heat problem."""
    heat = examples.heat(n=4, num_steps=5)
    reduced = ReducedObjective(ControlProblem(heat.constraint, term + ControlCost(1e-2), heat.grid))
    x = randn(reduced.size, seed=4)
    value, gradient = reduced.value_and_gradient(x)
    return torch.cat([torch.tensor([value]), gradient, reduced.hvp(x, gradient)])


DATA, SENSORS, TIMES = randn(6, 2, seed=6).numpy(), randn(2, 4, seed=7).numpy(), np.linspace(0.0, 0.5, 6)
ROWS = np.array([0, 2, 5])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            lambda: Tracking(np.ma.array(np.arange(4.0), mask=[0, 1, 0, 0]), spd(4)),
            lambda: Tracking([0.0, 2.0, 3.0], np.delete(np.delete(spd(4), 1, 0), 1, 1), observe=[0, 2, 3]),
        ),
        (
            lambda: Tracking(DATA[ROWS], spd(2), SENSORS, TIMES[ROWS]),
            lambda: Tracking(
                np.ma.array(DATA, mask=~np.isin(np.arange(6), ROWS)[:, None] | np.zeros((6, 2), dtype=bool)),
                spd(2),
                SENSORS,
            ),
        ),
        (lambda: Tracking(DATA, observe=np.eye(4)[[3, 3]]), lambda: Tracking(DATA, observe=[3, 3])),
        (lambda: Tracking(DATA, observe=slice(1, 3)), lambda: Tracking(DATA, observe=[False, True, True, False])),
        (
            lambda: Tracking(DATA, 3.0 * np.eye(2), SENSORS),
            lambda: Tracking(np.sqrt(3) * DATA, None, np.sqrt(3) * SENSORS),
        ),
        (
            lambda: Tracking(DATA, None, SENSORS, weight=2.0),
            lambda: Tracking(DATA, None, SENSORS, TIMES[::-1][::-1], weight=[2.0] * 6),
        ),
    ],
    ids=["missing", "times", "twice", "slice", "mass", "weight"],
)
def test_measurements_may_be_said_in_several_ways(one, other):
    assert torch.allclose(evaluated(one()), evaluated(other()), rtol=1e-12, atol=1e-13)
