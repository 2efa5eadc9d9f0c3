"""Kronecker blocks against dense matrices, as a PC and as a metric."""

import numpy as np
import pytest
import torch
from petsc4py import PETSc

from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.lowrank.kronecker import KroneckerBlocks, KroneckerMetric, KroneckerPC
from tests.helpers.support import relative


def spd(n, seed=0, rank=None):
    B = torch.randn(n, rank or n + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return B @ B.T / n


def eye(n):
    return torch.eye(n, dtype=torch.float64)


@pytest.fixture
def blocks():
    return KroneckerBlocks([spd(4), spd(3, 1), torch.ones(1, 1).double()], [spd(3, 2), spd(2, 3), spd(5, 4)])


def dense(blocks):
    return torch.block_diag(*[torch.kron(g, a) for a, g in zip(blocks.A, blocks.G)])


def vector(size, seed=9):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_products_are_those_of_the_dense_matrix(blocks):
    v = vector(blocks.size)
    assert relative(blocks.apply(v), dense(blocks) @ v) <= 1e-14


def test_the_damped_inverse_is_that_of_the_damped_factors(blocks):
    v = vector(blocks.size)
    expected = []
    for a, g, part in zip(blocks.A[:2], blocks.G[:2], v.split(blocks.sizes)):
        ratio = (a.trace() / len(a) / (g.trace() / len(g))).sqrt()
        damped = torch.kron(g + 0.1 / ratio * eye(len(g)), a + 0.1 * ratio * eye(len(a)))
        expected.append(torch.linalg.solve(damped, part))
    expected.append(torch.linalg.solve(blocks.G[2] + 0.01 * eye(5), v[-5:]))  # a dense block has the damping alone
    assert relative(blocks.solve(v, 0.01), torch.cat(expected)) <= 1e-12
    assert relative(blocks.inverse().apply(blocks.apply(v)), v) <= 1e-10


def test_exact_damping_is_that_of_the_dense_matrix(blocks):
    v = vector(blocks.size)
    expected = torch.linalg.solve(dense(blocks) + 0.01 * eye(blocks.size), v)
    assert relative(blocks.solve(v, 0.01, exact=True), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("exact", [True, False])
def test_singular_and_indefinite_factors_give_the_pseudo_inverse(dtype, exact):
    indefinite = torch.diag(torch.tensor([2.0, 1.0, 0.0, -1e-3], dtype=torch.float64))
    A, G = [spd(6, 1, rank=3), torch.zeros(2, 2), indefinite], [spd(4, 2, rank=2), spd(3), spd(2)]
    blocks = KroneckerBlocks([a.to(dtype) for a in A], [g.to(dtype) for g in G])
    v = vector(blocks.size).to(dtype)
    found = blocks.solve(v, exact=exact)
    positive = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    expected = dense(KroneckerBlocks([A[0], A[1].double(), positive], G))
    pseudo = torch.linalg.pinv(expected, rtol=1e-10, hermitian=True) @ v.double()
    assert relative(found.double(), pseudo) <= (1e-9 if dtype == torch.float64 else 1e-2)
    assert blocks.solve(v, 1e-30).isfinite().all() and blocks.solve(v, 1e-30, exact=True).isfinite().all()


def test_factors_that_are_not_finite_are_told():
    broken = KroneckerBlocks([spd(3)], [torch.full((2, 2), torch.nan, dtype=torch.float64)])
    for exact in (True, False):
        with pytest.raises(SolveFailure, match="not finite"):
            broken.solve(vector(6), 0.1, exact)


def test_wrong_shapes_are_told(blocks):
    with pytest.raises(InputError, match="as many A as G"):
        KroneckerBlocks([spd(3)], [])
    with pytest.raises(InputError, match=r"\(26,\)|size|legal"):
        blocks.apply(vector(blocks.size + 1))


def test_as_a_preconditioner_it_is_exact_for_its_own_matrix(blocks):
    damped = blocks.damped(1e-3)
    matrix = PETSc.Mat().createDense(blocks.size, array=dense(damped).numpy(), comm=PETSc.COMM_SELF)
    matrix.assemble()
    ksp = PETSc.KSP().create(PETSc.COMM_SELF)
    ksp.setOperators(matrix)
    ksp.setType("cg")
    ksp.setTolerances(rtol=1e-10)
    ksp.getPC().setType("python")
    ksp.getPC().setPythonContext(KroneckerPC(blocks, 1e-3))
    right, left = matrix.createVecs()
    right.array = vector(blocks.size).numpy()
    ksp.solve(right, left)
    assert ksp.getIterationNumber() == 1
    assert np.allclose(left.array, torch.linalg.solve(dense(damped), vector(blocks.size)), rtol=1e-9)
    ksp.destroy()


def test_the_metric_is_a_riesz_map(blocks):
    metric, v, g = KroneckerMetric(blocks, 1e-2), vector(blocks.size), vector(blocks.size, 5)
    assert relative(metric.solve(metric.multiply(v)), v) <= 1e-11
    assert metric.dual_norm(g) == pytest.approx(float(g @ metric.solve(g)) / metric.norm(metric.solve(g)), rel=1e-12)
    assert float(g @ v) <= metric.dual_norm(g) * metric.norm(v)
