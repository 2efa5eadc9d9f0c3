"""Matrices as users give them, and what makes one of them an inner product: checked at the border, once.

A form that is not symmetric gives wrong gradients, and one that is not positive a problem without a minimum, both
without a word. So masses of constraints and objectives, and forms of own terms, all pass `require_form`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import reverse_cuthill_mckee
from scipy.sparse.linalg import splu

from pdeopt.core.arrays import Array, real_array
from pdeopt.core.errors import InputError
from pdeopt.space.layouts.layout import Layout

#: How far entries (i, j) and (j, i) may differ, relative to the root of the product of diagonal entries i and j; a
#: matrix of single precision is as symmetric as its rounding.
SYMMETRY_TOLERANCE = {4: 1e-5, 8: 1e-12}

#: With the diagonal scaled to 1, eigenvalues above the first are positive, and those above the second not negative.
LEAST_DEFINITE, LEAST_SEMIDEFINITE = 1e-13, -1e-12

#: The most unknowns, and multiplications of a banded Cholesky factorization, for which definiteness is proved.
FACTORED_UNKNOWNS, FACTORED_WORK = 100_000, 2.5e10

#: Directions at which the form is tried where it is too large to factor.
TRIED_DIRECTIONS = 50

#: Random rows in which a form is tried whose rows are spread over ranks.
TRIED_SPREAD = 3

#: Digests of the matrices that have been found positive.
_positive: set[bytes] = set()


def real_matrix(matrix: Any, what: str) -> sp.csr_matrix:
    """A scipy or dense matrix, or a tensor, as a new sparse matrix in double precision, entries sorted.

    Args:
        matrix: real numbers, two axes; stored zeros stay.
        what: it is, for the error.

    Raises:
        InputError: no matrix, complex or other entries than numbers, or entries that are NaN or infinite.
    """
    if isinstance(matrix, torch.Tensor) and matrix.layout != torch.strided:
        matrix = matrix.detach().to_dense()
    if not sp.issparse(matrix):
        entries = real_array(matrix, what)
        if isinstance(entries, np.ma.MaskedArray) or entries.ndim != 2:
            masked = isinstance(entries, np.ma.MaskedArray)
            raise InputError(what, "masked entries" if masked else f"shape {entries.shape}", "a matrix, with two axes")
        csr = sp.csr_matrix(entries)
    elif matrix.dtype.kind not in "fiub":
        raise InputError(what, f"entries of type {matrix.dtype}", "real numbers")
    else:
        csr = sp.csr_matrix(matrix, dtype=np.float64, copy=True)
    if not np.isfinite(csr.data).all():
        raise InputError(what, "NaN or infinite entries", "finite numbers")
    csr.sum_duplicates()
    csr.sort_indices()
    return csr


def require_form(matrix: Any, what: str, semidefinite: bool = False) -> sp.csr_matrix:
    """A matrix as a symmetric positive (semi)definite form, its two triangles equal to the last bit.

    Up to `FACTORED_UNKNOWNS` unknowns with little fill a Cholesky factorization proves that the form is definite;
    above, the diagonal, all pairs of unknowns and the directions of some iterations of conjugate gradients are tried.

    Args:
        matrix: a scipy or dense matrix.
        what: the form's name, for the error.
        semidefinite: whether directions without length are legal.

    Raises:
        InputError: not square, real, finite and symmetric to rounding, not positive, or zero.
    """
    legal = f"a symmetric positive {'semidefinite' if semidefinite else 'definite'} matrix"
    csr, precision = real_matrix(matrix, what), getattr(getattr(matrix, "dtype", None), "itemsize", 8)
    n = csr.shape[0]
    if csr.shape != (n, n):
        raise InputError(what, f"shape {csr.shape}", legal)
    if n == 0:
        return csr
    size = np.abs(csr.data).max(initial=0.0)
    if size == 0:
        raise InputError(what, "a matrix of zeros", legal)
    # no form is larger off its diagonal than sqrt(a_ii a_jj), so this scaling makes all entries comparable
    diagonal = np.abs(csr.diagonal())
    scale = np.sqrt(np.where(diagonal > 0, diagonal, np.finfo(float).eps * size))
    csr = _symmetric(csr, scale, SYMMETRY_TOLERANCE[4 if precision <= 4 else 8], what, legal)
    _require_positive(csr, scale, semidefinite, what, legal)
    return csr


def require_spread_form(matrix: Any, columns: Layout, what: str, semidefinite: bool) -> None:
    """`require_form` for a matrix whose rows are spread over ranks: it is tried in random directions. Collective.

    Args:
        matrix: has `values`, products with rows and with the transpose.
        columns: the layout of its columns, and of its rows.
        what, semidefinite: as of `require_form`.

    Raises:
        InputError: not finite, not symmetric to rounding, or not positive where it is tried.
    """
    legal = f"a symmetric positive {'semidefinite' if semidefinite else 'definite'} matrix"
    if not columns.all(bool(matrix.values.isfinite().all())):
        raise InputError(what, "NaN or infinite entries", "finite numbers")
    generator = torch.Generator().manual_seed(columns.mpi.rank)
    x = torch.randn(TRIED_SPREAD, columns.n_owned, generator=generator, dtype=torch.float64)
    Ax = matrix(x)
    gap, size = columns.max(
        torch.stack([(each).abs().amax() if x.numel() else x.new_zeros(()) for each in (Ax - matrix.transpose(x), Ax)])
    )
    if gap > SYMMETRY_TOLERANCE[8] * size:
        raise InputError(what, "a matrix that is not symmetric, in rows over ranks", legal)
    if size == 0:
        raise InputError(what, "a matrix of zeros", legal)
    r, d, square = x[:1], x[:1], columns.sum(x[:1].square().sum())
    start = square
    for _ in range(TRIED_DIRECTIONS):  # of conjugate gradients, which turn to where the form is small or negative
        product = matrix(d)
        curvature = columns.sum((d * product).sum())
        largest = size * columns.sum(d.square().sum())
        if not curvature > (LEAST_SEMIDEFINITE * largest if semidefinite else 0.0):
            raise InputError(what, "an indefinite matrix, in rows over ranks", legal)
        if curvature <= LEAST_DEFINITE * largest:  # flat: the next step would be of rounding
            break
        r = r - square / curvature * product
        last, square = square, columns.sum(r.square().sum())
        if square <= 1e-24 * start:
            break
        d = r + square / last * d


def _symmetric(csr: sp.csr_matrix, scale: Array, tolerance: float, what: str, legal: str) -> sp.csr_matrix:
    """The symmetric part; an error where it is not the whole."""
    difference = sp.coo_matrix(csr - csr.T)
    if not difference.nnz or not difference.data.any():
        return csr
    gap = np.abs(difference.data) / (scale[difference.row] * scale[difference.col])
    k = int(gap.argmax())
    if gap[k] > tolerance:
        i, j = int(difference.row[k]), int(difference.col[k])
        got = f"a matrix that is not symmetric: {csr[i, j]:.6g} at ({i}, {j}) and {csr[j, i]:.6g} at ({j}, {i})"
        raise InputError(what, got, legal)
    half = sp.csr_matrix(0.5 * (csr + csr.T))
    half.sort_indices()
    return half


def _require_positive(csr: sp.csr_matrix, scale: Array, semidefinite: bool, what: str, legal: str) -> None:
    diagonal, rows = csr.diagonal(), np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    i = int((diagonal / scale**2).argmin())
    if diagonal[i] < 0 or (diagonal[i] == 0 and not semidefinite):
        raise InputError(what, f"a matrix with {diagonal[i]:.6g} at ({i}, {i})", legal)
    scaled = sp.csr_matrix((csr.data / (scale[rows] * scale[csr.indices]), csr.indices, csr.indptr), shape=csr.shape)
    k = int(np.abs(scaled.data).argmax())
    if abs(scaled.data[k]) > 1 + 1e-12:
        i, j = int(rows[k]), int(csr.indices[k])
        got = f"an indefinite matrix: {csr.data[k]:.6g} at ({i}, {j}) is more than the root of the diagonal's product"
        raise InputError(what, got, legal)
    least = LEAST_SEMIDEFINITE if semidefinite else LEAST_DEFINITE
    # by Gershgorin's circles lumped masses and finite differences need no more than their row sums
    if (2 * scaled.diagonal() - np.abs(scaled).sum(axis=1).A1).min() > least:
        return
    shifted = sp.csc_matrix(scaled - least * sp.eye(csr.shape[0]))
    digest = hashlib.sha256(
        b"".join(part.tobytes() for part in (shifted.indptr, shifted.indices, shifted.data))
    ).digest()
    if digest in _positive:  # constraint and objective often have the same mass
        return
    if _has_cholesky(shifted) if _is_cheap(shifted) else _is_positive_where_tried(shifted):
        _positive.add(digest)
    else:
        kind = "an indefinite matrix" if semidefinite else "a singular or indefinite matrix"
        raise InputError(what, f"{kind} (its diagonal is positive)", legal)


def _is_cheap(matrix: sp.csc_matrix) -> bool:
    """Whether the factor is small: its work is bounded by that of a banded one, which an ordering has few lines for."""
    if matrix.shape[0] > FACTORED_UNKNOWNS:
        return False
    csr = sp.csr_matrix(matrix)
    place = np.argsort(reverse_cuthill_mckee(csr, symmetric_mode=True))
    rows = np.repeat(place, np.diff(csr.indptr))
    width = np.zeros(csr.shape[0])
    np.maximum.at(width, rows, rows - place[csr.indices])
    return float((width**2).sum()) <= FACTORED_WORK


def _has_cholesky(matrix: sp.csc_matrix) -> bool:
    """Whether all pivots of L D L', taken from the diagonal, are positive."""
    options = {"SymmetricMode": True, "Equil": False}
    try:
        factor = splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
    except RuntimeError:  # a pivot is zero
        return False
    return bool((factor.perm_r == factor.perm_c).all() and factor.U.diagonal().min() > 0)


def _is_positive_where_tried(matrix: sp.csc_matrix) -> bool:
    """Whether d'Ad > 0 at the directions of conjugate gradients, which turn to where the form is small or negative."""
    r = np.random.default_rng(0).standard_normal(matrix.shape[0])
    d, square = r.copy(), float(r @ r)
    start = square
    for _ in range(TRIED_DIRECTIONS):
        product = matrix @ d
        curvature = float(d @ product)
        if not curvature > 0:
            return False
        r -= square / curvature * product
        last, square = square, float(r @ r)
        if square <= 1e-24 * start:
            break
        d = r + square / last * d
    return True
