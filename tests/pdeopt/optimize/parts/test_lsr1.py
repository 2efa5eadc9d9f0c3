"""L-SR1 in compact form, and its steps, against dense matrices."""

import math

import pytest
import torch

from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.parts.lsr1 import LSR1
from pdeopt.optimize.parts.trustsubproblem import boxed, first_order, spectral, steihaug


class Plain(SmoothFunction):
    """Unknowns and their inner products."""

    def _value_and_gradient(self, x):
        return 0.0, torch.zeros_like(x)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(n, seed=0):
    A = numbers(n, n, seed=seed)
    return A + A.T


def dense_sr1(c, pairs, n):
    B = c * torch.eye(n, dtype=torch.float64)
    for s, y in pairs:
        r = y - B @ s
        B = B + torch.outer(r, r) / (r @ s)
    return B


def as_dense(B, n):
    return torch.stack([B.times(e) for e in torch.eye(n, dtype=torch.float64)], 1)


def taught(n=12, memory=4, steps=7, seed=0):
    """L-SR1 with pairs of a random indefinite Hessian, and those that it should have."""
    A, B, pairs = symmetric(n, seed), LSR1(Plain(n), memory), []
    for s in numbers(steps, n, seed=seed + 1):
        assert B.update(s, A @ s)
        pairs = [*pairs[-memory + 1 :], (s, A @ s)]
    return B, pairs


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_compact_form_is_the_dense_recursion(steps):
    B, pairs = taught(steps=steps)
    expected = dense_sr1(B.c, pairs, 12)
    assert (as_dense(B, 12) - expected).abs().max() <= 1e-10 * expected.abs().max()
    s, y = pairs[-1]
    assert (B.times(s) - y).norm() <= 1e-10 * y.norm()


def test_the_factored_form_has_the_same_eigenvalues():
    B, pairs = taught()
    found = torch.cat([B.eigenvalues, torch.full((8,), B.c, dtype=torch.float64)]).sort().values
    expected = torch.linalg.eigvalsh(dense_sr1(B.c, pairs, 12))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9) and found[0] < 0
    assert torch.allclose(B.basis.T @ B.basis, torch.eye(4, dtype=torch.float64), atol=1e-12)


def test_updates_on_top_and_restrictions_are_those_of_the_matrix():
    B, _ = taught()
    part = torch.tensor([1, 4, 5, 9])
    local = B.restricted(Plain(4), part)
    expected = as_dense(B, 12)[part][:, part]
    assert torch.allclose(as_dense(local, 4), expected, atol=1e-10)
    s, y = numbers(2, 4, seed=9)
    assert local.update(s, y)
    r = y - expected @ s
    assert torch.allclose(as_dense(local, 4), expected + torch.outer(r, r) / (r @ s), atol=1e-9)


def test_it_learns_a_quadratic_exactly():
    A = symmetric(6)
    B = LSR1(Plain(6), 6)
    for s in numbers(6, 6, seed=3):
        B.update(s, A @ s)
    assert (as_dense(B, 6) - A).abs().max() <= 1e-8 * A.abs().max()


def test_a_pair_that_says_nothing_new_is_refused():
    B = LSR1(Plain(3), 2)
    s = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert not B.update(s, s)  # B = I already
    assert not B.update(s, torch.full_like(s, math.nan))
    assert torch.equal(B.times(s), s)
    with pytest.raises(InputError, match="memory"):
        LSR1(Plain(3), 0)


def dense_step(B, g, radius):
    """Trust-region step by bisection on the shift, from all eigenvalues: d and the model's value."""
    values, Q = torch.linalg.eigh(B)
    a, lowest = Q.T @ g, float(values[0])

    def at(shift):
        return torch.where(a.abs() < 1e-13, torch.zeros_like(a), -a / (values + shift))

    low, high = max(0.0, -lowest), max(0.0, -lowest) + float(g.norm()) / radius + 1.0
    hard = abs(float(a[0])) < 1e-13 or lowest > 0
    if hard and at(low).norm() <= radius:
        d = at(low)
        if lowest < 0:
            d[0] += math.sqrt(radius**2 - float(d @ d))
    else:
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if at(middle).norm() > radius else (low, middle)
        d = at(high)
    d = Q @ d
    return d, float(g @ d + 0.5 * d @ B @ d)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("radius", [1e-3, 0.3, 10.0])
def test_its_steps_are_those_of_dense_matrices(seed, radius):
    B, _ = taught(seed=seed)
    g = numbers(12, seed=seed + 50)
    step = B.step(g, radius)
    matrix = as_dense(B, 12)
    d, value = dense_step(matrix, g, radius)
    assert torch.allclose(step.d, d, rtol=1e-7, atol=1e-9 * radius)
    assert step.decrease == pytest.approx(-value, rel=1e-9)
    assert step.on_boundary == (abs(float(step.d.norm()) - radius) <= 1e-8 * radius)
    assert step.decrease == pytest.approx(-float(g @ step.d + 0.5 * step.d @ matrix @ step.d), rel=1e-9)


def test_the_hard_case():
    """g is orthogonal to the eigenvectors of the smallest eigenvalue: the step has a part along them all the same."""
    values = torch.tensor([-2.0, -2.0, 1.0, 3.0], dtype=torch.float64)
    g = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    d, shift = spectral(values, g, 5.0)
    assert shift == pytest.approx(2.0) and d.norm() == pytest.approx(5.0)
    assert torch.allclose((values + shift) * d, -g, atol=1e-12)
    _, expected = dense_step(torch.diag(values), g, 5.0)
    assert float(g @ d + 0.5 * (values * d) @ d) == pytest.approx(expected, rel=1e-12)
    inside, shift = spectral(values, g, 0.1)  # a small radius is not hard
    assert shift > 2.0 and inside.norm() == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize("tiny", [1e-4, 1e-8, 1e-12])
def test_almost_the_hard_case(tiny):
    values = torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64)
    g = torch.tensor([tiny, 1.0, 1.0], dtype=torch.float64)
    d, shift = spectral(values, g, 5.0)
    assert d.norm() == pytest.approx(5.0, rel=1e-8) and shift >= 2.0
    _, expected = dense_step(torch.diag(values), g, 5.0)
    assert float(g @ d + 0.5 * (values * d) @ d) <= expected + 1e-8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("radius", [0.01, 0.5])
def test_conjugate_gradients_stay_inside_and_go_below_the_cauchy_point(seed, radius):
    A, g, f = symmetric(10, seed), numbers(10, seed=seed + 20), Plain(10)
    for solve, norm in ((steihaug, 2), (boxed, math.inf)):
        step = solve(f, lambda d: A @ d, g, radius, 1e-8, 50)
        assert torch.linalg.vector_norm(step.d, norm) <= radius * (1 + 1e-12)
        assert step.decrease == pytest.approx(-float(g @ step.d + 0.5 * step.d @ A @ step.d), rel=1e-10)
        slope, curvature = float(g @ g), float(g @ A @ g)
        longest = radius / float(torch.linalg.vector_norm(g, norm))
        t = min(longest, slope / curvature) if curvature > 0 else longest
        assert step.decrease >= 0.2 * (t * slope - 0.5 * t * t * curvature)


@pytest.mark.parametrize("seed", range(3))
def test_the_box_is_solved_where_the_model_is_convex(seed):
    """First-order conditions of min g.d + d.A d / 2, |d_i| <= radius, to the tolerance."""
    A = symmetric(10, seed)
    A = A @ A + torch.eye(10, dtype=torch.float64)
    g, radius = numbers(10, seed=seed + 20), 0.02
    step = boxed(Plain(10), lambda d: A @ d, g, radius, 1e-10, 1000)
    slope = g + A @ step.d
    projected = step.d - (step.d - slope).clamp(-radius, radius)
    assert projected.abs().max() <= 1e-8 and step.on_boundary


def test_steps_of_order_one():
    g = torch.tensor([3.0, -4.0], dtype=torch.float64)
    step = first_order(Plain(2), g, 0.5)
    assert torch.allclose(step.d, torch.tensor([-0.3, 0.4], dtype=torch.float64)) and step.decrease == 2.5
    step = first_order(Plain(2), g, 0.5, "inf")
    assert step.d.tolist() == [-0.5, 0.5] and step.decrease == 3.5
