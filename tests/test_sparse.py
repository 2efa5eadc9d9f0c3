import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.func import jvp, vmap

from pdeopt.errors import InputError
from pdeopt.sparse import Sparsity, StepMatrix, StepPattern, block_diagonal


def random_pattern(rows, cols, density=0.3, seed=0, diagonal=False):
    mask = np.random.default_rng(seed).random((rows, cols)) < density
    return Sparsity(mask | np.eye(rows, cols, dtype=bool) if diagonal else mask)


def random_steps(pattern, batch, seed=0, shift=0.0):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, pattern.nnz, generator=draw, dtype=torch.float64)
    values[:, torch.from_numpy(pattern.rows == pattern.cols)] += shift
    return StepMatrix(pattern, values)


def densify(matrix):
    out = torch.zeros(len(matrix.values), *matrix.shape, dtype=torch.float64)
    out[:, matrix.sparsity.rows, matrix.sparsity.cols] = matrix.values
    return out


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_products_are_those_of_the_dense_matrix(shape, batch):
    matrix = random_steps(random_pattern(*shape), batch)
    D, x, y = densify(matrix), randn(3, shape[1]), randn(3, shape[0], seed=2)
    assert torch.allclose(matrix(x), (D @ x[..., None])[..., 0], atol=1e-14)
    assert torch.allclose(matrix.transpose(y), (D.mT @ y[..., None])[..., 0], atol=1e-14)


def test_transposed_product_is_the_adjoint():
    matrix = random_steps(random_pattern(6, 9), 4)
    x, y = randn(4, 9), randn(4, 6, seed=2)
    assert float((matrix(x) * y).sum() - (x * matrix.transpose(y)).sum()) == pytest.approx(0, abs=1e-12)


def test_products_work_under_transforms():
    matrix, x = StepMatrix.constant(sp.random(4, 6, 0.5, random_state=0)), randn(3, 6)
    assert torch.allclose(jvp(matrix, (x,), (x,))[1], matrix(x))
    stack = torch.stack([x, 2 * x])
    assert torch.allclose(vmap(matrix)(stack), torch.stack([matrix(x), 2 * matrix(x)]))


def test_an_empty_pattern_is_the_zero_matrix():
    zero = StepMatrix(Sparsity.empty(3, 4), torch.zeros(2, 0, dtype=torch.float64))
    assert torch.equal(zero(randn(2, 4)), torch.zeros(2, 3)) and torch.equal(
        zero.transpose(randn(2, 3)), torch.zeros(2, 4)
    )


@pytest.mark.parametrize("seed", range(3))
def test_columns_of_one_colour_share_no_row(seed):
    pattern = random_pattern(12, 9, 0.25, seed)
    for colour in range(int(pattern.colours.max()) + 1):
        columns = pattern.csr.toarray()[:, pattern.colours == colour]
        assert columns.sum(axis=1).max() <= 1
    assert set(np.flatnonzero(pattern.colours >= 0)) == set(pattern.cols)


def test_a_tridiagonal_matrix_needs_three_colours():
    assert len(Sparsity.banded(50).seeds) == 3


def test_colouring_recovers_every_entry():
    matrix = random_steps(random_pattern(8, 6), 3)
    assert torch.allclose(matrix.sparsity.fill(lambda d: matrix(d.expand(3, -1))), matrix.values, atol=1e-15)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_block_diagonal_places_each_step(lag):
    B = random_steps(random_pattern(3, 4), 5)
    whole = block_diagonal(B, lag=lag).toarray()
    for i in range(lag, 5):
        block = whole[3 * i : 3 * i + 3, 4 * (i - lag) : 4 * (i - lag) + 4].copy()
        assert np.array_equal(block, densify(B)[i].numpy())
        whole[3 * i : 3 * i + 3, 4 * (i - lag) : 4 * (i - lag) + 4] = 0
    assert not whole.any()


def test_stacked_values_split_into_the_blocks():
    A, B, C = random_pattern(4, 4, seed=1), random_pattern(4, 4, seed=2), random_pattern(4, 3, seed=3)
    pattern = StepPattern(A, B, C, Sparsity.empty(11, 11))
    stacked = random_steps(pattern.jacobian, 2)
    blocks = pattern.split(stacked.values)
    assert torch.equal(densify(stacked), torch.cat([densify(blocks[name]) for name in "BAC"], dim=2))


def test_a_step_pattern_of_wrong_shapes_is_refused():
    with pytest.raises(InputError, match="shapes"):
        StepPattern(np.eye(3), np.eye(3), np.ones((3, 2)), np.eye(7))
