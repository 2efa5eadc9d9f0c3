"""The rows of a rank as a part of a matrix of PETSc over all ranks of a step."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from petsc4py import PETSc

from pdeopt.core.arrays import index_array
from pdeopt.space.layouts.layout import Layout


def spread_aij(csr: sp.csr_matrix, columns: Layout) -> PETSc.Mat:
    """A matrix of type MPIAIJ over the ranks of a layout. Collective.

    Args:
        csr: the rows of this rank, columns in local numbers, owned unknowns before ghosts: (rows, columns.n_all).
        columns: whose owned unknowns the vectors have with which the matrix is multiplied.
    """
    numbers = index_array(columns.global_numbers)
    entries = csr.data.copy()  # they are sorted in place, and belong to the caller
    rows = sp.csr_matrix((entries, numbers[csr.indices], csr.indptr), shape=(csr.shape[0], columns.size))
    rows.sort_indices()
    sizes = ((rows.shape[0], None), (columns.n_owned, columns.size))
    arrays = index_array(rows.indptr), index_array(rows.indices), np.ascontiguousarray(rows.data)
    return PETSc.Mat().createAIJ(sizes, csr=arrays, comm=columns.comm)
