"""Patterns of matrices of which products alone are known."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.steps.matrices.recovery import FULLEST, sparse_pattern


class Products:
    """Of some matrices with directions; counts these."""

    def __init__(self, *matrices):
        self.matrices, self.count = matrices, 0

    def __call__(self, directions):
        self.count += len(directions)
        return torch.from_numpy(np.stack([(A @ directions.numpy().T).T for A in self.matrices], axis=1))

    @property
    def expected(self):
        return sum(abs(A) for A in self.matrices).toarray() != 0


def random_matrix(rows, columns, entries, seed, decades):
    random = np.random.default_rng(seed)
    row = np.arange(rows).repeat(entries)
    values = random.normal(size=len(row)) * 10.0 ** random.uniform(-decades, decades, len(row))
    return sp.csr_matrix((values, (row, random.integers(columns, size=len(row)))), shape=(rows, columns))


@pytest.mark.parametrize("entries, decades", [(1, 0), (9, 0), (40, 0), (20, 3)])
def test_every_entry_is_found_and_no_other(entries, decades):
    """Of three matrices with patterns of their own, entries over six orders of magnitude."""
    products = Products(*(random_matrix(200, 6000, entries, seed, decades) for seed in range(3)))
    found = sparse_pattern(products, 3, (200, 6000))
    assert (found.toarray() == products.expected).all()
    assert products.count < 6000  # one by one


def test_directions_depend_on_the_entries_of_a_row_and_not_on_the_size():
    counts = []
    for n in (4000, 32_000):
        products = Products(sp.diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(n, n), format="csr"))
        found = sparse_pattern(products, 1, (n, n))
        assert (found != (abs(products.matrices[0]) > 0)).nnz == 0
        counts.append(products.count)
    assert counts[1] <= 1.1 * counts[0] < 900


def test_entries_that_cancel_in_sums_of_columns_are_found():
    A = sp.csr_matrix(np.r_[np.ones(6), -np.ones(6)][None])
    assert sparse_pattern(Products(A), 1, A.shape).toarray().all()


def test_full_rows_and_products_that_are_not_finite_have_no_pattern():
    full = sp.vstack([sp.eye(20, 5000), np.ones((1, 5000))]).tocsr()
    assert sparse_pattern(Products(full), 1, full.shape) is None
    wide = sp.csr_matrix(np.ones((1, 2 * FULLEST)))
    assert sparse_pattern(Products(wide), 1, wide.shape) is None
    assert sparse_pattern(Products(full * np.nan), 1, full.shape) is None


def test_nothing_has_the_empty_pattern():
    for shape in ((0, 3), (3, 0), (40, 5000)):
        found = sparse_pattern(Products(sp.csr_matrix(shape)), 1, shape)
        assert found.shape == shape and found.nnz == 0


class Line(TimeDependentConstraint):
    """u' = u_xx - u u_x + z, backward Euler, with more unknowns than are differentiated one by one."""

    def __init__(self, n):
        self.state_dim = self.control_dim = n

    def initial_state(self, p):
        return torch.zeros(self.state_dim, dtype=torch.float64)

    def residual(self, u_old, u_new, z, steps):
        v = torch.nn.functional.pad(u_new, (1, 1))
        left, mid, right = v[:, :-2], v[:, 1:-1], v[:, 2:]
        return mid - u_old - steps.dt[:, None] * (right - 2 * mid + left - mid * (right - left) / 2 + z)


def test_a_constraint_of_many_unknowns_finds_its_pattern():
    n = 1400
    found = Line(n).pattern
    band, nothing = sp.diags([1.0, 1.0, 1.0], [-1, 0, 1], shape=(n, n)), sp.csr_matrix((n, n))
    sides = sp.diags([1.0, 1.0], [-1, 1], shape=(n, n))
    expected = {"A": band, "B": sp.eye(n), "C": sp.eye(n), "W": sp.block_diag([nothing, sides, nothing])}
    for block, pattern in expected.items():
        assert (getattr(found, block).csr.astype(bool) != pattern.tocsr().astype(bool)).nnz == 0, block
