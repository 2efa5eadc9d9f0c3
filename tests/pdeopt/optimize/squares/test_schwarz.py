"""Conjugate gradients with coarse spaces and local solves: symmetric, exact in their limits, and worth their price."""

import pytest
import torch

from pdeopt.core.errors import InputError
from pdeopt.optimize.squares.coarse import CoarseBasis, CoarseRows, spectral
from pdeopt.optimize.squares.damping import Products
from pdeopt.optimize.squares.levenberg import LevenbergMarquardt
from pdeopt.optimize.squares.localparts import LocalParts
from pdeopt.optimize.squares.schwarz import SchwarzSettings, schwarz
from pdeopt.optimize.squares.sharedjacobian import SharedJacobian
from pdeopt.squares.share import Share
from tests.helpers.residuals import Rows
from tests.helpers.support import relative

M, N, LAM, UNIT = 50, 36, 1e-3, 2.0
WAYS = [
    dict(coarse="rows", local="none"),
    dict(coarse="spectral", local="none"),
    dict(coarse="none", local="additive"),
    dict(coarse="none", local="multiplicative"),
    dict(coarse="spectral", local="additive"),
    dict(coarse="parts", local="additive"),
    dict(coarse="rows", local="multiplicative"),
    dict(coarse="parts", local="multiplicative", part_order="random"),
]


def matrix(decay=0.6):
    """Singular values that fall as those of smooth residuals do; neighboring rows are alike."""
    generator = torch.Generator().manual_seed(1)
    t, w = torch.linspace(0.0, 1.0, M, dtype=torch.float64), torch.arange(1.0, N + 1).double()
    V, _ = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))
    return torch.cos(torch.outer(t, w)) * decay**w @ V


def made(J, size=6, **words):
    s = SchwarzSettings(coarse_size=size, part_size=9, **words)
    rows = J[torch.linspace(0, M - 1, size).long()] if s.coarse == "rows" else None
    g = J.T @ torch.ones(M, dtype=torch.float64)
    return schwarz(s, SharedJacobian.alone(J), rows, M, g, UNIT)


@pytest.mark.parametrize("words", WAYS)
def test_preconditioners_are_symmetric_and_positive_and_give_the_same_solution(words):
    J = matrix()
    found = made(J, **words)
    found.set_damping(LAM)
    inverse = torch.stack([found.solve(unit) for unit in torch.eye(N, dtype=torch.float64)])
    assert relative(inverse, inverse.T) < 1e-9 and float(torch.linalg.eigvalsh(inverse)[0]) > 0.0
    assert found.multiplications > 0
    q = torch.sin(torch.arange(M)).double()
    D = torch.full((N,), UNIT, dtype=torch.float64)
    system = Products(lambda d: J @ d, lambda w: J.T @ w, D, 1e-12, 300, found)
    expected = -torch.linalg.solve(J.T @ J + LAM * UNIT * torch.eye(N).double(), J.T @ q)
    assert relative(system.solve(LAM, q), expected) < 1e-8


def test_exact_in_their_limits():
    J = torch.randn(M, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)  # all vectors are seen
    A = J.T @ J + LAM * UNIT * torch.eye(N, dtype=torch.float64)
    s = torch.cos(torch.arange(N)).double()
    whole = SharedJacobian.alone(J)
    one = LocalParts(whole, N, "neighbors", UNIT)
    for exact in (CoarseRows(J, M, UNIT, Share(None, N)), CoarseBasis(whole, spectral(whole, N), UNIT, True), one):
        exact.set_damping(LAM)
        assert relative(A @ exact.solve(s), s) < 1e-6
    blocks = LocalParts(whole, 9, "neighbors", UNIT)
    blocks.set_damping(LAM)
    diagonal = torch.block_diag(*[A[k : k + 9, k : k + 9] for k in range(0, N, 9)])
    assert relative(diagonal @ blocks.solve(s), s) < 1e-9


def test_a_coarse_space_takes_most_of_the_steps_away():
    J, q = matrix(decay=0.75), torch.sin(1.3 * torch.arange(M)).double()
    D = torch.full((N,), UNIT, dtype=torch.float64)

    def steps(found):
        system = Products(lambda d: J @ d, lambda w: J.T @ w, D, 1e-6, 300, found)
        system.solve(1e-5, q)
        return system.steps

    plain = steps(None)
    assert steps(made(J, 12, coarse="rows")) <= 0.7 * plain
    assert steps(made(J, 12, coarse="spectral")) <= 0.5 * plain


def test_it_serves_levenberg_marquardt():
    J = matrix()
    b = J @ torch.ones(N, dtype=torch.float64)
    for words in (*WAYS, dict(coarse="rows", keep="none"), dict(coarse="none", keep="single")):
        function = Rows(lambda x: J @ x + 0.1 * (J @ x) ** 2 - b, N, M)
        method = LevenbergMarquardt(function, linear="cg", part_size=9, coarse_size=10, rtol=1e-6, **words)
        assert method.minimize(torch.zeros(N)).converged, words


def test_what_does_not_go_together():
    function = Rows(lambda x: x[:3] ** 2, 4, 3)
    for words in (dict(local="additive"), dict(coarse="spectral")):
        with pytest.raises(InputError, match="without J"):
            LevenbergMarquardt(function, linear="cg", keep="none", **words).minimize(torch.ones(4))
    with pytest.raises(InputError, match=r"additive, with -lm_coarse rows"):
        LevenbergMarquardt(function, linear="cg", local="additive").minimize(torch.ones(4))
