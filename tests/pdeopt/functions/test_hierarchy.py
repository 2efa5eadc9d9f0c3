"""Hierarchies: transfers between levels, functions on them, samples and windows of time."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from mpi4py import MPI

from pdeopt.core.errors import InputError
from pdeopt.functions.hierarchy import Hierarchy, Transfer, as_hierarchy, sample_hierarchy, window_transfer
from pdeopt.functions.smooth import FirstOrderConsistent, SampledFunction
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers.energies import Energy, interpolation, poisson


def random(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Squares(SampledFunction):
    """mean_i (a_i.x - b_i)^2 / 2."""

    def __init__(self, A, b, costs=None, tally=None):
        super().__init__(A.shape[1], len(A), costs=costs, tally=tally)
        self.A, self.b = A, b

    def _value_and_gradient(self, x):
        r = self.A @ x - self.b
        return 0.5 * float(r @ r) / self.samples, self.A.T @ r / self.samples

    def subset(self, indices):
        costs = self.costs.times(len(indices) / self.samples)
        return Squares(self.A[indices], self.b[indices], costs, self.tally)


TRANSFERS = {
    "interpolation": interpolation(31),
    "aggregates": Transfer.aggregates([0, 0, 1, 2, 2, 2]),
    "weighted": Transfer.aggregates([0, 1, 0, 1], [1.0, 2.0, 3.0, 4.0]),
    "grid": window_transfer(TimeGrid([0.0, 0.5, 0.6, 1.0, 2.0, 2.5], MPI.COMM_SELF), 3),
}


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=TRANSFERS)
def test_restriction_is_the_transpose_and_projection_undoes_prolongation(transfer):
    d, g = random(transfer.coarse), random(transfer.fine, 1)
    assert float(transfer.prolong(d) @ g) == pytest.approx(float(d @ transfer.restrict(g)), rel=1e-13)
    assert torch.allclose(transfer.project(transfer.prolong(d)), d, rtol=1e-13, atol=1e-13)
    largest = np.linalg.norm(transfer.P.toarray(), 2)
    assert largest <= transfer.norm * (1 + 1e-12) and transfer.norm <= 1.01 * largest


@pytest.mark.parametrize("name", ["aggregates", "weighted", "grid"])
def test_aggregates_keep_lengths_and_project_by_the_restriction(name):
    transfer, x = TRANSFERS[name], random(TRANSFERS[name].fine)
    assert transfer.norm == pytest.approx(1.0, rel=1e-14)
    assert torch.allclose(transfer.project(x), transfer.restrict(x), rtol=1e-13)
    d = random(transfer.coarse, 2)
    assert float(transfer.prolong(d).norm()) == pytest.approx(float(d.norm()), rel=1e-14)


def test_a_control_that_is_constant_on_windows_is_so_on_both_grids():
    """y = sqrt(dt) z: the same z on both grids is prolonged to itself."""
    times = [0.0, 0.5, 0.6, 1.0, 2.0]
    grid, coarse = TimeGrid(times, MPI.COMM_SELF), TimeGrid(times, MPI.COMM_SELF).coarsen(2)
    z = random(2 * 3).reshape(2, 3)
    y, y_fine = coarse.steps.dt.sqrt()[:, None] * z, grid.steps.dt.sqrt()[:, None] * z.repeat_interleave(2, 0)
    assert torch.allclose(window_transfer(grid, 3).prolong(y.reshape(-1)), y_fine.reshape(-1), rtol=1e-13)


def test_coarse_models_have_the_restricted_gradient():
    hierarchy = poisson(31, 3)
    x = random(31)
    g = hierarchy.value_and_gradient(x)[1]
    for function, transfer in zip(hierarchy.functions[1:], hierarchy.transfers):
        x, g = transfer.project(x), transfer.restrict(g)
        model = FirstOrderConsistent(function, x, g)
        found = model.value_and_gradient(x)[1]
        assert float((found - g).norm()) <= 1e-12 * float(g.norm())


def test_the_finest_function_is_the_hierarchy_and_all_calls_count_once():
    hierarchy, x = poisson(15, 2), random(15)
    assert hierarchy.value(x) == hierarchy.functions[0]._value(x)
    assert torch.equal(hierarchy.value_and_gradient(x)[1], hierarchy.functions[0]._value_and_gradient(x)[1])
    assert torch.equal(hierarchy.hvp(x, x), hierarchy.functions[0]._hvp(x, x))
    hierarchy.functions[1].value_and_gradient(random(7))
    tally = hierarchy.tally
    assert (tally.values, tally.gradients, tally.hessian_products) == (1, 2, 1)
    assert tally.work == pytest.approx(1 / 3 + 1 + 2 + 0.5)
    assert as_hierarchy(hierarchy) is hierarchy and len(as_hierarchy(Energy(7))) == 1


def test_samples_are_nested_subsets_that_cost_their_part():
    A, b = random(60).reshape(20, 3), random(20, 1)
    hierarchy = sample_hierarchy(Squares(A, b), [10, 5], torch.Generator().manual_seed(0))
    rows = [{tuple(row.tolist()) for row in f.A} for f in hierarchy.functions]
    assert [len(r) for r in rows] == [20, 10, 5] and rows[2] < rows[1] < rows[0]
    assert [f.costs.gradient for f in hierarchy.functions] == [1.0, 0.5, 0.25]
    x = random(3, 2)
    assert torch.equal(hierarchy.transfers[0].prolong(x), x) and torch.equal(hierarchy.transfers[1].project(x), x)


def test_bad_hierarchies_are_named():
    fine, coarse = Energy(31), Energy(15)
    for functions, transfers in (([], []), ([fine, coarse], []), ([fine], [interpolation(31)])):
        with pytest.raises(InputError, match="a transfer between neighbors"):
            Hierarchy(functions, transfers)
    with pytest.raises(InputError, match=r"level 0 to 1: got sizes \(63, 31\)"):
        Hierarchy([fine, coarse], [interpolation(63)])
    with pytest.raises(InputError, match="orthogonal columns, or a projection"):
        Transfer(interpolation(7).P)
    with pytest.raises(InputError, match="projection P = 1"):
        Transfer(sp.identity(3), 2 * sp.identity(3))
    with pytest.raises(InputError, match="projection: got shape"):
        Transfer(interpolation(7).P, sp.identity(3))
    with pytest.raises(InputError, match="without gaps"):
        Transfer.aggregates([0, 2, 2])
    A = random(6).reshape(3, 2)
    for sizes in ([3], [2, 2], [0]):
        with pytest.raises(InputError, match="decrease from 3 to 1"):
            sample_hierarchy(Squares(A, random(3)), sizes, torch.Generator())
