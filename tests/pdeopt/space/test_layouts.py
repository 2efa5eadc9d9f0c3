"""Layouts on one rank; what several ranks exchange is in `tests/helpers/parallel_space.py`."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from mpi4py import MPI

import pdeopt as po
from tests.helpers import parallel_space


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", parallel_space.RANKS)
@pytest.mark.parametrize("part", ["exchange", "layouts"])
def test_several_ranks(part, ranks):
    parallel_space.check(part, ranks)


def test_one_rank_sees_itself():
    layout = po.Layout(MPI.COMM_SELF, 3)
    x = torch.rand(2, 3, dtype=torch.float64)
    assert layout.is_silent and layout.extend(x) is x and layout.collect(x) is x
    assert layout.size == layout.n_all == 3 and layout.neighbors == []


@pytest.mark.parametrize("ghosts", [[0], [7], [-1]])
def test_ghosts_are_unknowns_of_others(ghosts):
    with pytest.raises(po.InputError, match="ghosts"):
        po.Layout(MPI.COMM_SELF, 3, ghosts)


def test_natural_numbers_are_as_many_as_owned_unknowns():
    with pytest.raises(po.InputError, match="natural"):
        po.Layout(MPI.COMM_SELF, 3, natural=[0, 1])


def test_a_grid_on_one_rank_is_whole():
    patch = po.grid_layout(MPI.COMM_SELF, (3, 4))
    assert patch.box == (slice(0, 3), slice(0, 4)) and np.array_equal(patch.layout.natural, np.arange(12))
    assert np.array_equal(patch.order[1:-1, 1:-1], np.arange(12).reshape(3, 4))
    assert (patch.order[0] == 12).all()  # outside
    neighbors = sp.kron(sp.identity(3), sp.diags([1.0, 1.0, 1.0], [-1, 0, 1], (4, 4))) + sp.kron(
        sp.diags([1.0, 1.0], [-1, 1], (3, 3)), sp.identity(4)
    )
    assert ((patch.stencil() != 0) != (neighbors != 0)).nnz == 0


@pytest.mark.parametrize("shape, stencil", [((3,) * 4, "star"), ((3, 0), "star"), ((3, 3), "cross")])
def test_a_grid_that_is_none(shape, stencil):
    with pytest.raises(po.InputError, match="grid"):
        po.grid_layout(MPI.COMM_SELF, shape, 1, stencil)


def test_a_pattern_is_square():
    with pytest.raises(po.InputError, match="pattern of a layout"):
        po.pattern_layout(MPI.COMM_SELF, np.ones((2, 3)))
