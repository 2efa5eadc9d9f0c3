"""What all tests share: PETSc options for the length of a test, and MPI runs."""

from __future__ import annotations

import os
from contextlib import suppress

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
import torch
from petsc4py import PETSc

with suppress(ImportError):  # before DOLFINx, whose HDF5 is another one: h5py does not load after it
    import h5py  # noqa: F401

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers (pytest-xdist), one of them has all MPI runs: two at a time would fight for cores."""
    for item in items:
        if item.get_closest_marker("mpi"):
            item.add_marker(pytest.mark.xdist_group("mpi"))


@pytest.fixture
def options():
    """`options(sqp_max_it=3, sqp_monitor="")` sets PETSc options, which end with the test."""
    database, names = PETSc.Options(), []

    def put(**words: object) -> None:
        for name, value in words.items():
            database.setValue(name, str(value))
            names.append(name)

    yield put
    for name in names:
        database.delValue(name)
