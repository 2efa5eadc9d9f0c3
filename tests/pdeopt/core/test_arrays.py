import pytest
import torch
from petsc4py import PETSc

from pdeopt.core.arrays import assign, copy, readonly, writable


@pytest.fixture
def vec():
    v = PETSc.Vec().createSeq(3)
    v.setArray([3.0, 0.0, 4.0])
    return v


def test_what_is_written_is_what_petsc_sees(vec):
    assert vec.norm() == 5.0  # now cached
    with writable(vec) as x:
        x *= 2
    assert vec.norm() == 10.0 and vec.getArray().tolist() == [6.0, 0.0, 8.0]


def test_views_alias_without_a_copy(vec):
    with readonly(vec) as x:
        assert x.data_ptr() == vec.getArray(readonly=True).ctypes.data


def test_writing_to_a_readonly_view_is_an_error(vec):
    with pytest.raises(RuntimeError, match="writable"), readonly(vec) as x:
        x[0] = 1.0


@pytest.mark.parametrize("view", [readonly, writable])
def test_a_view_is_empty_after_its_block(vec, view):
    with view(vec) as x:
        pass
    assert x.numel() == 0


def test_copies_stay(vec):
    kept = copy(vec)
    vec.set(0.0)
    assert kept.tolist() == [3.0, 0.0, 4.0]


def test_assign_writes_blocks_in_order(vec):
    assign(vec, torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64))
    assert vec.getArray().tolist() == [1.0, 2.0, 5.0]


def test_an_exception_inside_a_block_leaves_the_vec_usable(vec):
    with pytest.raises(ZeroDivisionError), writable(vec) as x:
        x[0] = 1.0
        raise ZeroDivisionError
    assert vec.sum() == 5.0
