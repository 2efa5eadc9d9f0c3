import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.func import jvp, vmap

from pdeopt.core.errors import InputError
from pdeopt.steps import sparse, sparsity
from pdeopt.steps.sparse import StepMatrix, StepPattern, block_diagonal, combination
from pdeopt.steps.sparsity import Sparsity, fill_by_rows
from tests.helpers.matrices import densify, randn, random_pattern, random_steps


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


def test_the_users_matrix_stays_as_it_was():
    """Columns in no order are sorted in copies: the user's values would lose their places otherwise."""
    matrix = sp.csr_matrix((np.array([1.0, 2.0, 3.0]), np.array([2, 0, 1]), np.array([0, 2, 3])), shape=(2, 3))
    dense = matrix.toarray()
    Sparsity(matrix), StepMatrix.constant(matrix)
    assert np.array_equal(matrix.toarray(), dense)


def test_an_empty_pattern_is_the_zero_matrix():
    zero = StepMatrix(Sparsity.empty(3, 4), torch.zeros(2, 0, dtype=torch.float64))
    assert torch.equal(zero(randn(2, 4)), torch.zeros(2, 3)) and torch.equal(
        zero.transpose(randn(2, 3)), torch.zeros(2, 4)
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_products_outside_and_under_transforms_are_the_same(batch):
    """Outside, SciPy and PETSc multiply; under a transform, entries are gathered."""
    matrix, x, y = random_steps(random_pattern(6, 9), batch), randn(4, 9), randn(4, 6, seed=2)
    assert torch.allclose(matrix(x), vmap(matrix)(x[None])[0], atol=1e-14)
    assert torch.allclose(matrix.transpose(y), vmap(matrix.transpose)(y[None])[0], atol=1e-14)


@pytest.mark.parametrize("batch", [1, 4])
def test_no_rows_have_no_products(batch):
    """As on a rank where no window starts."""
    matrix = random_steps(random_pattern(6, 9), batch)[np.empty(0, dtype=np.int64)]
    assert matrix(randn(0, 9)).shape == (0, 6) and matrix.transpose(randn(0, 6)).shape == (0, 9)


def test_products_take_views():
    matrix, x = random_steps(random_pattern(6, 9), 1), randn(9, 4).T
    assert torch.allclose(matrix(x), matrix(x.clone()), atol=1e-15)


@pytest.mark.parametrize("batches", [(1, 1), (1, 3), (3, 1), (3, 3)])
@pytest.mark.parametrize("same", [True, False])
def test_combinations_are_sums_of_dense_matrices(batches, same):
    patterns = [random_pattern(4, 5, seed=3)] * 2 if same else [random_pattern(4, 5, seed=k) for k in (3, 4)]
    left, right = (random_steps(pattern, batch, seed=k) for k, (pattern, batch) in enumerate(zip(patterns, batches)))
    found = combination([(2.0, left), (-0.5, right)])
    assert torch.allclose(densify(found), 2 * densify(left) - 0.5 * densify(right), atol=1e-15)
    assert found.is_constant == (batches == (1, 1))
    assert set(zip(found.sparsity.rows, found.sparsity.cols)) == {
        pair for pattern in patterns for pair in zip(pattern.rows, pattern.cols)
    }


def test_a_combination_keeps_a_pattern_that_covers_the_others():
    large, small = Sparsity.banded(5, 2), Sparsity.banded(5)
    assert combination([(1.0, random_steps(large, 1)), (1.0, random_steps(small, 1))]).sparsity is large


def test_a_pattern_covers_what_it_holds():
    large, small, empty = Sparsity.banded(5, 2), Sparsity.banded(5), Sparsity.empty(5, 5)
    assert large.covers(small) and large.covers(large) and large.covers(empty)
    assert not small.covers(large) and not empty.covers(small)
    places = large.places(small)
    assert np.array_equal(large.rows[places], small.rows) and np.array_equal(large.cols[places], small.cols)


@pytest.mark.parametrize("batch", [1, 3])
def test_row_sums_and_absolute_values_are_those_of_the_dense_matrix(batch):
    matrix = random_steps(random_pattern(4, 5), batch)
    assert torch.allclose(matrix.row_sums(), densify(matrix).abs().sum(2), atol=1e-15)
    assert torch.equal(densify(matrix.absolute()), densify(matrix).abs())


@pytest.mark.parametrize("seed", range(3))
def test_columns_of_one_color_share_no_row(seed):
    pattern = random_pattern(12, 9, 0.25, seed)
    for color in range(int(pattern.coloring.colors.max()) + 1):
        columns = pattern.csr.toarray()[:, pattern.coloring.colors == color]
        assert columns.sum(axis=1).max() <= 1
    assert set(np.flatnonzero(pattern.coloring.colors >= 0)) == set(pattern.cols)


def test_a_tridiagonal_matrix_needs_three_colors():
    assert Sparsity.banded(50).coloring.number == 3


def test_coloring_recovers_every_entry():
    matrix = random_steps(random_pattern(8, 6), 3)
    values, are_all = matrix.sparsity.fill(lambda d: matrix(d.expand(3, -1)))
    assert are_all and torch.allclose(values, matrix.values, atol=1e-15)


@pytest.fixture
def large(monkeypatch):
    """All patterns count as large: nothing that follows from them is kept."""
    for module, name in ((sparsity, "KEPT_ENTRIES"), (sparse, "KEPT_ENTRIES"), (sparsity, "FEW_NUMBERS")):
        monkeypatch.setattr(module, name, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_large_patterns_keep_nothing_and_give_the_same(large, batch):
    """Entries from one direction after the other, products with rows, and entries that a pattern misses."""
    pattern = random_pattern(8, 6)
    matrix, x, y = random_steps(pattern, batch), randn(batch, 6), randn(batch, 8)
    before, whole = set(pattern.__dict__), densify(matrix)
    values, are_all = pattern.fill(lambda d: matrix(d.expand(batch, -1)))
    assert are_all and torch.allclose(values, matrix.values, atol=1e-15)
    assert torch.allclose(matrix(x), (whole @ x[:, :, None])[..., 0], atol=1e-14)
    assert torch.allclose(matrix.transpose(y), (whole.mT @ y[:, :, None])[..., 0], atol=1e-14)
    assert set(pattern.__dict__) <= before | {"_digest"} and pattern.coloring is not pattern.coloring
    csr = pattern.csr.tolil()
    csr[pattern.rows[0], pattern.cols[0]] = 0
    assert not Sparsity(csr.tocsr()).fill(lambda d: matrix(d.expand(batch, -1)))[1]


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


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 4), (3, 1)])
def test_rows_are_filled_by_transposed_products_as_columns_are(shape):
    matrix = random_steps(random_pattern(*shape), 4)
    pattern, dense = matrix.sparsity, densify(matrix)
    by_columns, all_columns = pattern.fill(lambda d: dense @ d)
    by_rows, all_rows = fill_by_rows(pattern, lambda w: dense.mT @ w)
    assert torch.equal(by_columns, matrix.values) and torch.equal(by_rows, matrix.values)
    assert all_columns and all_rows


def test_rows_that_miss_entries_are_noticed():
    dense = randn(3, 4 * 4).reshape(3, 4, 4)
    for pattern in (np.eye(4), np.tri(4), np.ones((4, 4)) - np.eye(4)):
        assert not fill_by_rows(Sparsity(pattern), lambda w: dense.mT @ w)[1]


def test_products_are_recorded_for_reverse_mode_to_second_order():
    matrix, x = random_steps(random_pattern(4, 6), 3), randn(3, 6).requires_grad_()
    assert torch.autograd.gradcheck(matrix, x) and torch.autograd.gradgradcheck(lambda x: matrix(x).square(), x)
    y = randn(3, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(matrix.transpose, y)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape, offsets", [((5, 5), (-1, 0, 1)), ((3, 5), (0, 1, 2)), ((4, 4), (2,)), ((2, 2), ())])
def test_few_diagonals_give_the_product_of_the_gathered_form(shape, offsets, batch):
    """Incomplete ones, too."""
    full = sum((sp.eye(*shape, k=k) for k in offsets), sp.csr_matrix(shape)).tolil()
    if offsets:
        full[0, max(offsets)] = 0.0
    A = random_steps(Sparsity(sp.csr_matrix(full)), batch)
    x, y = randn(3, shape[1]), randn(3, shape[0])
    assert torch.allclose(A(x), A._by_row(x), rtol=0, atol=1e-14)
    assert torch.allclose(A.transpose(y), A._by_column(y), rtol=0, atol=1e-14)
