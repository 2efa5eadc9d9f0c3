"""What all tests share: PETSc options for the length of a test, and cores of its own for each worker."""

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


def pytest_configure(config: pytest.Config) -> None:
    """Each of several workers (pytest-xdist) has cores of its own, and so have the processes that it starts.

    Ranks that wait for a message hand on their core, to the rank that is to send it; shared with a process that never
    waits, each message would cost a time slice of the system.
    """
    if hasattr(config, "workerinput"):
        workers, worker = config.workerinput["workercount"], int(config.workerinput["workerid"].removeprefix("gw"))
        cores = sorted(os.sched_getaffinity(0))
        if share := cores[worker * len(cores) // workers : (worker + 1) * len(cores) // workers]:
            os.sched_setaffinity(0, share)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker has all tests of a file, and of the files that share a run on several ranks."""
    for item in items:
        names = vars(getattr(item, "module", item)).values()
        shares = item.get_closest_marker("mpi") and any(is_shared(each) for each in names)
        item.add_marker(pytest.mark.xdist_group("parallel_time" if shares else item.path.stem))


def is_shared(found: object) -> bool:
    """Whether it is what asks `tests.helpers.parallel_time` for its run."""
    return getattr(found, "__module__", "") == "tests.helpers.parallel_time"


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
