"""Gram sums: least squares over samples that come in batches, fade, and lie on several ranks."""

import json

import numpy as np
import pytest
import torch

from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.messages import Messages
from pdeopt.squares.gram import GramSum, add_gram
from pdeopt.squares.gramshares import GramShares
from pdeopt.squares.sharedgrams import SharedGrams
from tests.helpers.parallel_grams import BATCHES, SHAPES, solutions
from tests.helpers.support import gloo, python
from tests.helpers.threads import on_threads

#: Errors of sums of numbers of size 1 in messages of a precision, relative.
ROUNDING = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}


def samples(n, inputs=6, outputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (inputs, outputs))


def test_batches_are_least_squares_over_all_samples():
    a, z = samples(50)
    sums = GramSum(6, 3)
    for rows in torch.arange(50).split(17):
        sums.add(a[rows], z[rows])
    expected = np.linalg.lstsq(a.numpy(), z.numpy(), rcond=None)[0].T
    assert np.allclose(sums.solve(), expected, rtol=0, atol=1e-13)


def test_sums_of_transformed_rows_and_products_in_single_precision():
    a, z = samples(50)
    T = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums, expected, single = GramSum(6, 3), GramSum(6, 3), GramSum(6, 3)
    sums.add(a, z)
    single.add(a, z, product=torch.float32)
    assert 1e-9 < float((single.gram - sums.gram).abs().max()) < 1e-4 and single.gram.dtype == torch.float64
    sums.transform(T)
    expected.add(a @ T.T, z)
    assert torch.allclose(sums.gram, expected.gram) and torch.allclose(sums.cross, expected.cross)


def test_ridge_and_proximal_term():
    a, z = samples(50)
    center = torch.ones(3, 6, dtype=torch.float64)
    sums = GramSum(6, 3)
    sums.add(a, z)
    X = sums.solve(ridge=0.2, prox=0.3, center=center)
    gradient = (X @ a.T - z.T) @ a / 50 + 0.2 * X + 0.3 * (X - center)
    assert gradient.abs().max() < 1e-14


def test_weights_fade_without_a_bias_of_the_start():
    a, z = samples(60)
    sums = GramSum(6, 3)
    for rows in torch.arange(60).split(20):
        sums.forget(0.5, cross=0.0)
        sums.add(a[rows], z[rows])
    w = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64).repeat_interleave(20)
    assert torch.allclose(sums.gram / sums.weights[0], (w[:, None] * a).T @ a / w.sum())
    assert torch.allclose(sums.cross / sums.weights[1], z[40:].T @ a[40:] / 20)


def test_a_dead_entry_gives_the_solution_of_least_norm():
    a, z = samples(50)
    a[:, 2] = 0.0
    sums = GramSum(6, 3)
    sums.add(a, z)
    assert sums.singular
    expected = np.linalg.lstsq(a.numpy(), z.numpy(), rcond=None)[0].T
    with pytest.warns(UserWarning, match="6 inputs is singular"):
        found = sums.solve()
    assert np.allclose(found, expected, rtol=0, atol=1e-12)


def test_rows_may_belong_to_fewer_samples():
    """As the positions of a convolution: the mean is that over samples of sums over rows."""
    a, z = samples(50)
    sums = GramSum(6, 3)
    for rows in torch.arange(50).split(25):
        sums.add(a[rows], z[rows], samples=5)
    expected = np.linalg.solve((a.T @ a / 10 + 0.2 * torch.eye(6).double()).numpy(), (a.T @ z / 10).numpy()).T
    assert np.allclose(sums.solve(ridge=0.2), expected, rtol=0, atol=1e-13)


def test_packed_sums_come_back():
    a, z = samples(10)
    sums, other = GramSum(6, 3), GramSum(6, 3)
    sums.add(a, z)
    assert len(sums.triangle) == 21
    other.triangle = sums.triangle
    assert torch.equal(other.gram, sums.gram) and torch.equal(sums.gram, sums.gram.T)


def test_bad_input_is_named():
    sums = GramSum(6, 3)
    with pytest.raises(InputError, match="samples"):
        sums.solve()
    with pytest.raises(InputError, match="forgetting"):
        sums.forget(1.5)
    with pytest.raises(SolveFailure, match="not finite"):
        GramSum.solve(_nan())
    with pytest.raises(InputError, match="float32"):
        Messages(None, 3, "float8")
    with pytest.raises(InputError, match="add up to 3"):
        Messages(None, 3, parts=[2])
    grams = SharedGrams([(2, 1), (2, 1)])
    grams.add(0, torch.ones(1, 2), torch.ones(1, 1))
    with pytest.raises(InputError, match="the same number for each layer"):
        grams.reduce()


def test_sums_go_on_from_their_memory():
    a, z = samples(40)
    whole, first, second = (SharedGrams([(6, 3)], rho=0.9, cross=0.0) for _ in range(3))
    for grams, rows in ((whole, slice(0, 20)), (first, slice(0, 20))):
        grams.add(0, a[rows], z[rows])
        grams.reduce()
    second.recall(first.memory())
    for grams in (whole, second):
        grams.add(0, a[20:], z[20:])
        grams.reduce()
    assert torch.equal(whole.solve([0.1])[0], second.solve([0.1])[0])


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-9])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_squares_are_those_of_the_rows_however_small_these_are(size, share):
    """Rows of 1e-9 beside a ridge of 0.1: <X, R/v> and ridge |X|^2 agree in all their digits."""
    a, z = samples(40)
    grams = SharedGrams([(6, 3)])
    grams.add(0, size * a, z)
    grams.reduce()
    (X,) = grams.solve([0.1], share)
    before, expected = grams.solves, float((size * a @ X.T).square().sum()) / 40
    assert float(grams.squares([X], [0.1], share)) == pytest.approx(expected, rel=1e-12)
    assert grams.solves - before == (0 if size == 1.0 else 3 * 6**2)


def _nan():
    sums = GramSum(2, 1)
    sums.add(torch.full((3, 2), torch.nan), torch.ones(3, 1))
    return sums


def announced(ranks, precision):
    """Bytes of all ranks: numbers, the samples with each message of sums, and units of messages in float16."""
    shares = GramShares(SHAPES, ranks)
    numbers = sum(sum(shares.numbers(rank).values()) for rank in range(ranks))
    total = {"float64": 8, "float32": 4}.get(precision, 2) * numbers + 8 * ranks * (ranks - 1)
    if precision == "float16":
        pieces = sum(len(set(shares.groups[k]) - {rank}) for rank in range(ranks) for k, _, _ in shares.pieces(rank))
        total += 4 * (2 * ranks * (ranks - 1) + pieces)
    return BATCHES * total


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 20])
def test_threads_solve_what_one_rank_solves(ranks):
    """Fewer ranks than layers, groups of them, and more than there is work for: one result on all, the bytes of the
    formula."""
    whole = np.array(solutions(None, "float64")[0])
    found = on_threads(ranks, lambda team: solutions(team, "float64"))
    assert all(each == found[0] for each in found)
    assert np.abs(np.array(found[0][0]) - whole).max() < 1e-12
    assert found[0][1] == announced(ranks, "float64")


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_fixed_matrix_is_sent_and_factored_once(ranks):
    """Samples that stay with targets that change: the least squares of each round, and after a restart, too."""
    a, z = samples(30)

    def rounds(team):
        rank, size = (0, 1) if team is None else (team.rank, team.size)
        fixed, again = (SharedGrams([(6, 3)], team, rho=0.0, fixed=True) for _ in range(2))
        found, costs = [], []
        for place in range(3):
            if place == 2:
                again.recall(fixed.memory())
                fixed = again
            sent, solves = fixed.sent, fixed.solves
            fixed.add(0, a[rank::size], (place + 1) * z[rank::size])
            fixed.begin()
            fixed.advance()
            fixed.finish()
            found.append(fixed.solve([0.1])[0])
            costs.append((fixed.sent - sent, fixed.solves - solves))
        return found, costs

    one = GramSum(6, 3)
    one.add(a, z)
    for found, costs in [rounds(None)] if ranks == 1 else on_threads(ranks, rounds):
        for place, X in enumerate(found):
            assert torch.allclose(X, (place + 1) * one.solve(0.1), rtol=0, atol=1e-13)
        assert costs[1][1] == costs[0][1] - 6**3 // 3 == costs[2][1]
        assert costs[1][0] < costs[0][0] or ranks == 1


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_messages_are_short(ranks):
    """784-500-500-10: packed against whole matrices, sums and their way back, and numbers of 2 bytes against 8."""
    shapes = [(785, 500), (501, 500), (501, 10)]
    shares = GramShares(shapes, ranks)
    sums = sum(shares.numbers(rank)["sums"] for rank in range(ranks))
    whole = (ranks - 1) * sum(n * n + m * n for n, m in shapes)
    assert sums <= 0.69 * whole and 2 * sums <= 0.175 * 8 * whole
    everything = sum(sum(shares.numbers(rank).values()) for rank in range(ranks))
    assert everything <= 0.69 * 2 * whole  # of an allreduce of whole matrices


@pytest.mark.parametrize("ranks", [1, 2, 5, 64, 1000])
def test_work_is_dealt_out_evenly(ranks):
    shapes = [(785, 500), (501, 500), (501, 10)]
    shares = GramShares(shapes, ranks)
    for layer, (_, m) in enumerate(shapes):
        assert sum(shares.height(layer, rank) for rank in shares.groups[layer]) == m
    assert sum(size for rank in range(ranks) for _, _, size in shares.pieces(rank)) == sum(shares.filled)
    each = [cross + filled for cross, filled in zip(shares.crosses, shares.filled)]
    assert sum(each) == sum(n * (n + 1) // 2 + m * n for n, m in shapes)
    assert max(each) <= max(*shares.crosses, sum(each) // ranks + 1) if ranks > 1 else True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_of_symmetric_products(dtype):
    a = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    lower = torch.ones(5, 5, dtype=dtype)
    add_gram(lower, a[:0])
    for rows in (a[:4], a[4:]):
        add_gram(lower, rows.T.contiguous().T)  # by columns
    assert torch.allclose(lower.tril(), (1 + a.T @ a).tril(), rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.mpi
@pytest.mark.parametrize("backend, ranks", [("mpi", 3), pytest.param("gloo", 2, marks=pytest.mark.slow)])
def test_ranks_solve_what_one_rank_solves(tmp_path, backend, ranks):
    """Unequal shares; errors of the precision; equal on all ranks; the bytes that were announced."""
    file = tmp_path / "found.json"
    if backend == "gloo":
        gloo(ranks, "tests.helpers.parallel_grams", backend, file)
    else:
        done = python("-m", "tests.helpers.parallel_grams", backend, file, ranks=ranks)
        assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["equal"]
    whole = np.array(solutions(None, "float64")[0])
    for precision, (X, sent) in found["found"].items():
        assert np.abs(np.array(X) - whole).max() < ROUNDING[precision]
        assert sent == announced(ranks, precision)
    with_feedback, without = found["drift"]
    assert with_feedback < 0.1 and without > 0.1  # what rounding takes comes with the next message
