"""Oracles: eigenvalues of the dense matrix, made to be what each case says."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pdeopt.core.errors import InputError
from pdeopt.steps import forms
from pdeopt.steps.forms import real_matrix, require_form
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import Sparsity


def with_eigenvalues(values, seed=0):
    """A dense symmetric matrix with these eigenvalues."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return q @ np.diag(values) @ q.T


def neumann(n):
    """Finite differences of -u'' whose constants have no length: singular, and positive semidefinite."""
    diagonal = np.full(n, 2.0)
    diagonal[[0, -1]] = 1.0
    return sp.diags([np.full(n - 1, -1.0), diagonal, np.full(n - 1, -1.0)], [-1, 0, 1])


def consistent(n):
    """A mass matrix of bilinear elements on a square; its rows are not diagonally dominant."""
    line = sp.diags([1 / 6, 2 / 3, 1 / 6], [-1, 0, 1], (n, n))
    return sp.kron(line, line)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("n", [1, 2, 3, 12])
@pytest.mark.parametrize("least", [-1.0, -1e-3, -1e-6, 1e-6, 1e-3, 1.0])
def test_a_form_is_accepted_where_its_eigenvalues_are_positive(least, n, size):
    values = np.linspace(1.0, 2.0, n)
    values[0] = least
    matrix = size * with_eigenvalues(values)
    matrix = 0.5 * (matrix + matrix.T)
    for semidefinite in (False, True):
        if least > 0:
            assert np.array_equal(require_form(matrix, "M", semidefinite).toarray(), matrix)
        else:
            with pytest.raises(InputError, match=r"^M: got .* positive"):
                require_form(matrix, "M", semidefinite)


@pytest.mark.parametrize("n", [2, 50, 5000])
def test_singular_forms_are_semidefinite(n):
    require_form(neumann(n), "M", semidefinite=True)
    with pytest.raises(InputError, match="singular or indefinite"):
        require_form(neumann(n), "M")
    with pytest.raises(InputError, match=r"0 at \(1, 1\)"):
        require_form(sp.diags([1.0, 0.0, 1.0]), "M")
    require_form(sp.diags([1.0, 0.0, 1.0]), "M", semidefinite=True)


def test_badly_scaled_unknowns_are_seen_alike():
    d = sp.diags(10.0 ** np.arange(-20, 20, 4))
    good = sp.diags([0.4, 1.0, 0.4], [-1, 0, 1], (10, 10))
    require_form(d @ good @ d, "M")
    for wrong in (sp.diags([0.4, 1.0, 0.5], [-1, 0, 1], (10, 10)), sp.diags([0.8, 1.0, 0.8], [-1, 0, 1], (10, 10))):
        with pytest.raises(InputError):
            require_form(d @ wrong @ d, "M")


def test_a_form_is_symmetric_to_rounding_and_then_to_the_last_bit():
    M = consistent(6).toarray()
    M[0, 1] *= 1 + 1e-14
    form = require_form(M, "M")
    assert (form != form.T).nnz == 0 and np.allclose(form.toarray(), M, rtol=1e-13)
    M[0, 1] *= 1 + 1e-9
    with pytest.raises(InputError, match=r"not symmetric: 0\.111111 at \(0, 1\)"):
        require_form(M, "M")
    require_form(M.astype(np.float32), "M")  # as symmetric as single precision can say


@pytest.mark.parametrize("limit", ["FACTORED_UNKNOWNS", "FACTORED_WORK"])
def test_large_forms_are_tried(monkeypatch, limit):
    monkeypatch.setattr(forms, limit, 10)
    M = consistent(20).tolil()
    require_form(M, "M")
    M[7, 7] *= 0.1  # all entries are below the roots of their diagonal's product
    assert np.linalg.eigvalsh(M.toarray())[0] < 0
    with pytest.raises(InputError, match="indefinite"):
        require_form(M, "M", semidefinite=True)


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (0.5, "two axes"),
        (np.ones(3), "two axes"),
        (np.eye(3)[:2], r"shape \(2, 3\)"),
        (1j * sp.eye(2), "complex128"),
        (torch.eye(2, dtype=torch.complex64), "complex64"),
        (np.array([["a"]]), "real numbers"),
        ([[1.0, 2.0], [3.0]], "real numbers"),
        (np.full((2, 2), np.nan), "finite"),
        (np.inf * sp.eye(2), "finite"),
        (np.ma.masked_greater(np.eye(2), 0.5), "masked"),
        (sp.csr_matrix((4, 4)), "zeros"),
        (-sp.eye(2), r"-1 at \(0, 0\)"),
        (object(), "real numbers"),
    ],
)
def test_what_is_no_form(matrix, said):
    with pytest.raises(InputError, match=said) as caught:
        require_form(matrix, "mass of X", semidefinite=True)
    assert caught.value.what == "mass of X"


@pytest.mark.parametrize(
    "matrix",
    [
        np.diag([2, 3]),
        sp.coo_matrix(([1, 1, 3], ([0, 0, 1], [0, 0, 1])), (2, 2)),
        sp.csr_matrix(np.diag([2.0, 3.0]), dtype=np.float32),
        np.diag([2.0, 3.0]).astype(">f8")[::-1][::-1],
        torch.diag(torch.tensor([2.0, 3.0])).requires_grad_(),
        torch.diag(torch.tensor([2.0, 3.0])).to_sparse(),
        [[2, 0], [0, 3]],
    ],
)
def test_matrices_of_any_kind(matrix):
    assert real_matrix(matrix, "M").toarray().tolist() == [[2.0, 0.0], [0.0, 3.0]]


def test_a_matrix_is_copied():
    given = sp.csr_matrix(np.eye(2))
    kept = StepMatrix.constant(given)
    given.data[:] = 7.0
    assert kept.values.tolist() == [[1.0, 1.0]]


def test_a_step_matrix_is_checked_once(monkeypatch):
    M = StepMatrix.constant(consistent(4))
    assert StepMatrix.form(M, 16) is M
    monkeypatch.setattr("pdeopt.steps.sparse.require_form", None)
    assert StepMatrix.form(M, 16) is M
    with pytest.raises(InputError, match=r"shape of mine: got \(16, 16\); legal: \(4, 4\)"):
        StepMatrix.form(M, 4, "mine")


def test_a_form_is_one_matrix():
    with pytest.raises(InputError, match="3 matrices"):
        StepMatrix.form(StepMatrix(Sparsity(np.eye(1)), torch.ones(3, 1, dtype=torch.float64)), 1)


@pytest.mark.parametrize("values", [torch.ones(1, 2, dtype=torch.complex128), torch.ones(2), torch.ones(1, 3)])
def test_values_belong_to_their_pattern(values):
    with pytest.raises(InputError, match="StepMatrix"):
        StepMatrix(Sparsity(np.eye(2)), values)
