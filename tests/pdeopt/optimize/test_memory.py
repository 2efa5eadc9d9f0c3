"""PETSc objects of solves that are over are freed."""

import gc
import resource

import pytest

from pdeopt.core.arrays import free_garbage
from pdeopt.optimize.fullspace.sqp import SQPSolver
from tests.helpers import examples
from tests.helpers.krylov import heat


def resident():
    """Memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, words", [(lambda: examples.burgers(nt=8), dict(type="composite")), (lambda: heat(12), dict(type="newton"))]
)
def test_two_hundred_solves_leave_nothing_behind(make, words, options):
    options(sqp_kkt_precond="wathen")
    problem, sizes = make(), []
    for solve in range(250):
        SQPSolver(problem, **words).solve()
        if solve in (49, 249):
            gc.collect()
            free_garbage(problem.grid.comm)
            sizes.append(resident())
    assert sizes[1] - sizes[0] < 2.0, sizes  # a KKT solver of these problems holds about 1 MB
