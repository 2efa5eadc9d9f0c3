"""Least squares against NumPy, part by part and over ranks; and the alternation with gradient steps."""

import numpy as np
import pytest
import torch
from torch import nn

from nn_adapters.training.last_layer import LSGD, Triangle, least_squares, lsgd
from pdeopt.core.errors import InputError, SolveFailure
from tests.helpers.parallel_last_layer import coefficients, deficient, distributed, random, regression, with_ones
from tests.helpers.support import python, relative

# -- least squares -------------------------------------------------------------------------------------------


def test_full_rank_is_as_torch_solves_it():
    x, y = random(50, 7), random(50, 3, seed=1)
    weight, bias = least_squares(x, y)
    assert weight.shape == (3, 7) and bias.shape == (3,)
    expected = torch.linalg.lstsq(with_ones(x), y).solution
    assert relative(coefficients(weight, bias), expected) <= 1e-12


@pytest.mark.parametrize("samples", [40, 3])
def test_of_many_solutions_it_is_the_one_of_least_norm(samples):
    """Dependent features; and fewer samples than features."""
    x, y = (part[:samples] for part in deficient())
    expected = np.linalg.lstsq(with_ones(x).numpy(), y.numpy(), rcond=1e-12)[0]
    assert relative(coefficients(*least_squares(x, y, rtol=1e-12)), expected) <= 1e-10
    assert relative(coefficients(*least_squares(x, y)), expected) <= 1e-10  # the default sees the rank, too


@pytest.mark.parametrize("chunk", [1, 7, 39, 1000])
def test_parts_are_the_same_as_the_whole(chunk):
    for x, y in (deficient(), (random(40, 5), random(40, seed=1))):
        whole, parts = (coefficients(*least_squares(x, y, rtol=1e-12, chunk=c)) for c in (40, chunk))
        assert relative(parts, whole) <= 1e-11


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_the_ridge_is_tikhonovs(ridge):
    """The gradient of 1/n |X w - Y|^2 + ridge |w|^2 vanishes."""
    x, y = deficient()
    w, X = coefficients(*least_squares(x, y, ridge=ridge)), with_ones(x)
    expected = torch.linalg.solve(X.T @ X / 40 + ridge * torch.eye(7, dtype=torch.float64), X.T @ y / 40)
    assert relative(w, expected) <= 1e-8


def test_it_does_not_square_the_condition():
    """Features of condition 1e9: the normal equations have no correct digit left."""
    U, V = torch.linalg.qr(random(60, 6))[0], torch.linalg.qr(random(6, 6, seed=1))[0]
    x = U * torch.logspace(0, -9, 6, dtype=torch.float64) @ V
    w = random(1, 6, seed=2)
    weight, bias = least_squares(x, x @ w.T + 5.0, chunk=16)
    assert relative(x @ weight.T + bias, x @ w.T + 5.0) <= 1e-13 and relative(weight, w) <= 1e-5


def test_single_precision_is_added_up_in_double():
    x, y = random(200, 5).float(), random(200, 1, seed=1).float()
    weight, bias = least_squares(x, y)
    expected = torch.linalg.lstsq(with_ones(x.double()), y.double()).solution
    assert weight.dtype == torch.float32 and relative(coefficients(weight, bias), expected.float()) <= 1e-6
    copies = torch.cat([x, x * 1.7 / 1.7], dim=1)  # equal but for rounding
    assert coefficients(*least_squares(copies, y)).abs().max() < 10


def test_the_triangle_knows_the_loss_of_any_head():
    x, y = random(30, 4), random(30, 2, seed=1)
    for bias in (True, False):
        triangle = Triangle(4, 2, bias)
        triangle.add(x[:11], y[:11])
        triangle.add(x[11:], y[11:])
        weight, offset = random(2, 4, seed=2), random(2, seed=3)
        expected = nn.functional.mse_loss(x @ weight.T + (offset if bias else 0), y)
        assert triangle.loss(weight, offset) == pytest.approx(float(expected), rel=1e-12)
        assert triangle.loss(*triangle.solve()) < float(expected)


@pytest.mark.parametrize(
    "words, legal",
    [
        (dict(features=random(5, 2), targets=random(4, 1)), r"\(n, in\)"),
        (dict(targets=random(5, 1, 1)), r"\(n, in\)"),
        (dict(features=random(0, 2), targets=random(0, 1)), "n >= 1"),
        (dict(ridge=-1.0), "ridge >= 0"),
        (dict(ridge=float("nan")), "ridge >= 0"),
        (dict(rtol=-1.0), "rtol >= 0"),
        (dict(chunk=0), "chunk >= 1"),
    ],
)
def test_what_is_not_legal_is_named(words, legal):
    with pytest.raises(InputError, match=legal):
        least_squares(**(dict(features=random(5, 2), targets=random(5, 1)) | words))


def test_numbers_that_are_not_finite_are_a_failure_with_a_remedy():
    x = random(5, 2)
    x[3, 1] = torch.inf
    with pytest.raises(SolveFailure, match="learning rate"):
        least_squares(x, random(5, 1))


# -- the alternation -----------------------------------------------------------------------------------------


def mse(hidden, head, x, y):
    with torch.no_grad():
        return float(nn.functional.mse_loss(head(hidden(x)), y))


@pytest.mark.parametrize("outputs, bias", [(1, True), (3, True), (2, False)])
def test_a_solve_never_raises_the_loss(outputs, bias):
    hidden, head, x, y = regression(outputs=outputs, bias=bias)
    method = LSGD(hidden, head, x, y, lr=1e-2)
    for _ in range(20):
        before = mse(hidden, head, x, y)
        after = method.solve_head()
        assert after == pytest.approx(mse(hidden, head, x, y), rel=1e-8)
        assert after <= before * (1 + 1e-10)
        method.step_hidden()


def test_the_history_is_that_of_the_losses_and_falls():
    hidden, head, x, y = regression()
    losses = lsgd(hidden, head, x, y, steps=60, lr=3e-3)
    assert len(losses) == 61 and losses[-1] < 0.5 * losses[0]
    assert losses[-1] == pytest.approx(mse(hidden, head, x, y), rel=1e-8)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
    ],
)
def test_any_optimizer_of_torchs_serves(make):
    hidden, head, x, y = regression()
    losses = lsgd(hidden, head, x, y, steps=10, optimizer=make(hidden.parameters()))
    assert losses[-1] < losses[0]


def test_chunks_change_nothing():
    histories = [lsgd(*regression(), steps=10, chunk=chunk) for chunk in (1000, 7)]
    assert relative(histories[1], histories[0]) <= 1e-8


def test_gradient_steps_are_those_of_the_loss_and_leave_the_head_alone():
    hidden, head, x, y = regression(outputs=2)
    method = LSGD(hidden, head, x, y, optimizer=torch.optim.SGD(hidden.parameters(), lr=0.0))
    method.solve_head()
    kept = head.weight.clone()
    method.step_hidden()
    expected = torch.autograd.grad(nn.functional.mse_loss(head(hidden(x)), y), tuple(hidden.parameters()))
    for parameter, gradient in zip(hidden.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
    assert torch.equal(head.weight, kept) and head.weight.grad is None


@pytest.mark.parametrize(
    "change, legal",
    [
        (dict(head=nn.ReLU()), "Linear"),
        (dict(lr=0.0), "> 0"),
        (dict(steps=-1), ">= 0"),
        (dict(y=random(40, 2)), "outputs of the head"),
        (dict(y=random(39, 1)), "n >= 1"),
        (dict(x=random(40)), "n >= 1"),
    ],
)
def test_arguments_that_are_not_legal_are_named(change, legal):
    hidden, head, x, y = regression()
    with pytest.raises(InputError, match=legal):
        lsgd(**(dict(hidden=hidden, head=head, x=x, y=y, steps=1) | change))


# -- on several ranks ----------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_samples_may_be_spread_over_ranks(tmp_path):
    distributed(tmp_path / "1.npz")
    done = python("-m", "tests.helpers.parallel_last_layer", tmp_path / "2.npz", ranks=2)
    assert done.returncode == 0, done.stderr
    serial, parallel = (np.load(tmp_path / f"{ranks}.npz") for ranks in (1, 2))
    for name in serial:
        assert relative(parallel[name], serial[name]) <= 1e-10
