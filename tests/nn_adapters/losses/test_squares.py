"""The squared loss of a network as a sum of squares."""

import pytest
import torch
from torch import nn

import pdeopt as po
from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.losses.network import NetworkLoss
from nn_adapters.losses.squares import NetworkSquares
from pdeopt.core.errors import InputError
from pdeopt.squares.sharedrows import SharedRows


def squares(samples=7, outputs=2, **words):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    y = torch.sin(x @ torch.randn(3, outputs, generator=generator, dtype=torch.float64))
    return NetworkSquares(NetworkLoss(network, nn.functional.mse_loss, x, y, **words))


def by_autograd(f, theta):
    """Rows and Jacobian, written out."""

    def rows(theta):
        parameters = dict(zip(f.loss._shapes, theta.split(f.loss._sizes)))
        parameters = {name: part.view(f.loss._shapes[name]) for name, part in parameters.items()}
        error = torch.func.functional_call(f.loss.network, parameters, (f.loss.x,)) - f.loss.y
        return torch.cat([(error / error.numel() ** 0.5).flatten(), (f.loss.tikhonov / 2) ** 0.5 * theta])

    return rows(theta), torch.autograd.functional.jacobian(rows, theta)


@pytest.mark.parametrize("chunk", [10_000, 3])
def test_rows_jacobian_and_products_are_those_of_autograd(chunk):
    f = squares(tikhonov=0.1, chunk=chunk)
    theta = f.loss.parameters()
    r, J = by_autograd(f, theta)
    d, w = torch.randn(f.size).double(), torch.randn(f.rows).double()
    some = torch.tensor([20, 3, 0, f.rows - 1, 13, 3])
    assert len(r) == f.rows == 14 + f.size
    for rows in (None, some):
        wanted = slice(None) if rows is None else rows
        found, matrix = f.linearize(theta, rows)
        assert torch.allclose(found, r[wanted], rtol=1e-13, atol=1e-15)
        assert torch.allclose(matrix, J[wanted], rtol=1e-12, atol=1e-14)
        assert torch.allclose(f.residual(theta, rows), r[wanted], rtol=1e-13, atol=1e-15)
        assert torch.allclose(f.jvp(theta, d, rows), J[wanted] @ d, rtol=1e-12, atol=1e-14)
        cotangent = w[: len(r[wanted])]
        assert torch.allclose(f.vjp(theta, cotangent, rows), J[wanted].T @ cotangent, rtol=1e-12, atol=1e-14)
    kept = torch.empty(f.rows, f.size, dtype=torch.float64)
    assert f.linearize(theta, out=kept)[1] is kept and torch.allclose(kept, J, rtol=1e-12, atol=1e-14)


def test_it_is_the_same_function_as_the_loss():
    f = squares(tikhonov=0.1, chunk=3)
    theta, d = f.loss.parameters(), torch.ones(f.size, dtype=torch.float64)
    value, gradient = f.loss.value_and_gradient(theta)
    found, g = f.value_and_gradient(theta)
    assert f.value(theta) == pytest.approx(found, rel=1e-14) == pytest.approx(value, rel=1e-14)
    assert torch.allclose(g, gradient, rtol=1e-13, atol=1e-15)
    assert torch.allclose(f.hvp(theta, d), f.loss.hvp(theta, d), rtol=1e-12, atol=1e-15)
    part = torch.tensor([4, 1])
    assert f.subset(part).value(theta) == pytest.approx(f.loss.subset(part).value(theta), rel=1e-14)


PRODUCTS = {"linear": "cg", "keep": "none", "coarse": "none"}


@pytest.mark.parametrize(("words", "iterations", "left"), [({}, 20, 1e-3), (PRODUCTS, 2, 0.5)])
def test_least_squares_fit_a_network(words, iterations, left):
    f = squares(samples=12)
    result = po.LevenbergMarquardt(f, max_it=iterations, **words).minimize(f.loss.parameters())
    assert result.objective < left * f.value(f.loss.parameters())
    assert result.objective == pytest.approx(f.loss.value(result.design), rel=1e-10)


def test_a_linear_network_is_solved_in_a_step():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    f = NetworkSquares(NetworkLoss(nn.Linear(3, 2).double(), nn.functional.mse_loss, x, y))
    result = po.LevenbergMarquardt(f, damping=1e-14, max_it=1).minimize(f.loss.parameters())
    W = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1)], 1), y).solution.T
    assert torch.allclose(result.design, torch.cat([W[:, :3].flatten(), W[:, 3]]), atol=1e-9)


def test_samples_are_drawn_with_all_of_their_rows_and_keep_the_mean():
    f = squares(samples=400, tikhonov=0.1)
    theta = f.loss.parameters()
    drawn = [f.sample(theta, 200, seed) for seed in range(20)]
    assert all(each.rows == 200 + f.size for each in drawn)
    mean = sum(each.value(theta) for each in drawn) / len(drawn)
    assert mean == pytest.approx(f.value(theta), rel=0.02)
    memory = drawn[0].sample_memory()
    assert f.recalled(memory).value(theta) == drawn[0].value(theta)
    r, J = drawn[0].linearize(theta)
    assert torch.allclose(2 * J.T @ r, drawn[0].value_and_gradient(theta)[1], rtol=1e-12, atol=1e-14)


def test_rows_may_be_shared_by_ranks():
    class Second:
        """The second of two ranks."""

        rank, size = 1, 2

    f = squares(tikhonov=0.1)
    theta, shared = f.loss.parameters(), SharedRows(f, Second())
    r, J = f.linearize(theta)
    own, J_own = f._linearize(theta, shared.own)
    assert len(own) == f.rows // 2
    assert torch.allclose(own, r[shared.share.own], rtol=1e-14) and torch.allclose(J_own, J[shared.share.own])


@pytest.mark.parametrize(
    ("loss", "y", "words", "told"),
    [
        (nn.functional.l1_loss, torch.zeros(5, 2), {}, "l1_loss.*mse_loss"),
        (nn.MSELoss(reduction="sum"), torch.zeros(5, 2), {}, "MSELoss.*mse_loss"),
        (nn.functional.mse_loss, torch.zeros(5), {}, r"\(5,\).*\(5, 2\)"),
        (nn.functional.mse_loss, torch.zeros(5, 2, dtype=torch.int64), {}, "int64.*real"),
        (nn.functional.mse_loss, torch.zeros(5, 2), {"constant": 1.0}, "a part"),
    ],
)
def test_what_is_no_sum_of_squares_is_refused(loss, y, words, told):
    with pytest.raises(InputError, match=told):
        NetworkSquares(NetworkLoss(nn.Linear(3, 2), loss, torch.zeros(5, 3), y, **words))


def test_parallel_layers_are_told_to_be_serial():
    network = LayerParallel(None, lambda: dense(2, "tanh"), 4).double()
    f = NetworkSquares(NetworkLoss(network, nn.functional.mse_loss, torch.ones(3, 2), torch.zeros(3, 2)))
    theta = f.loss.parameters()
    assert torch.allclose(f.value_and_gradient(theta)[1], f.loss.value_and_gradient(theta)[1])
    with pytest.raises(InputError, match="serial"):
        f.jacobian(theta)
