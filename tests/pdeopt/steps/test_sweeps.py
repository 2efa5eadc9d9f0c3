import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import spsolve

import pdeopt.steps.sweeps as room
from pdeopt.core.errors import StepFailure
from pdeopt.steps.bands import BandFactor, CoupledBand, band_of
from pdeopt.steps.sparse import StepMatrix, block_diagonal
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.stepsolve import StagedSubstitution
from pdeopt.steps.sweeps import BandTriangles, SparseTriangles, Substitution, substitution
from tests.helpers.matrices import coupled, densify, heat_steps, randn, random_pattern, random_steps


def assert_solves(sweeps, A, B, batch, starts=(0,), tolerance=1e-12):
    """Both sweeps against SciPy's factors of the coupled matrix, relative to the solution."""
    wide = [StepMatrix(matrix.sparsity, matrix.values.expand(batch, -1).clone()) for matrix in (A, B)]
    wide[1].values[list(starts)] = 0.0
    K, r = block_diagonal(wide[0]) + block_diagonal(wide[1], lag=1), randn(batch, A.shape[0])
    kept = r.clone()
    for found, matrix in ((sweeps.forward(r), K), (sweeps.backward(r), K.T)):
        expected = spsolve(sp.csc_matrix(matrix), r.numpy().ravel())
        assert np.abs(found.numpy().ravel() - expected).max() <= tolerance * np.abs(expected).max()
    assert torch.equal(r, kept)  # right-hand sides stay as they are


@pytest.mark.parametrize("n, batch", [(5, 6), (1, 4), (5, 1), (1, 1), (2, 7)])
@pytest.mark.parametrize("pivoting", [False, True])
def test_substitution_inverts_the_coupled_matrix(n, batch, pivoting):
    A = random_steps(random_pattern(n, n, 0.5, 1, diagonal=True), batch, shift=0.0 if pivoting else 3.0)
    B = random_steps(random_pattern(n, n, 0.5, 2), batch, seed=5)
    assert_solves(Substitution(A, B, batch), A, B, batch, tolerance=1e-10 if pivoting else 1e-12)


@pytest.mark.parametrize("width", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("alike", [True, False])
def test_bands_and_sparse_factors_give_the_same(width, alike):
    n, batch = 20, 9
    A = random_steps(Sparsity.banded(n, width), 1 if alike else batch, shift=3.0 + 2 * width)
    B = random_steps(random_pattern(n, n, 0.3, 2), 1 if alike else batch, seed=5)
    sweeps = Substitution(A, B, batch)
    assert isinstance(sweeps._triangles, BandTriangles if width <= 4 else SparseTriangles)
    assert_solves(sweeps, A, B, batch)
    other, r = Substitution(A, B, batch), randn(batch, n)
    other._triangles = SparseTriangles(A, B)
    for one, two in ((sweeps.forward(r), other.forward(r)), (sweeps.backward(r), other.backward(r))):
        assert float((one - two).abs().max()) <= 1e-12 * float(one.abs().max())


def small_pivots(n, width, batch):
    """Random bands one of whose steps has a zero as its first pivot."""
    A = random_steps(Sparsity.banded(n, width), batch, shift=3.0 + 2 * width)
    rows, cols, first = A.sparsity.rows, A.sparsity.cols, band_of(A.sparsity).order[0]
    A.values[batch // 2, torch.from_numpy((rows == first) & (cols == first))] = 0.0
    return A


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("batch, length", [(1, 4), (5, 5)])
def test_a_small_pivot_is_exchanged(width, batch, length):
    A, B = small_pivots(10, width, batch), random_steps(Sparsity.banded(10), 1, seed=5)
    assert BandFactor(A, 2.0**-10).exchanged
    sweeps = Substitution(A, B, length)
    assert isinstance(sweeps._triangles, SparseTriangles)
    assert_solves(sweeps, A, B, length, tolerance=1e-11)


def test_rows_are_not_exchanged_for_a_pivot_that_is_a_little_smaller():
    A = StepMatrix.constant(np.array([[1.0, 50.0, 0.0], [50.0, 1.0, 50.0], [0.0, 50.0, 3.0]]))
    assert BandFactor(A).exchanged
    assert not BandFactor(A, 2.0**-10).exchanged
    assert_solves(Substitution(A, A, 4), A, A, 4)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("starts", [(0,), (0, 2, 4), (0, 3), (0, 1, 2, 3, 4, 5), (0, 5)])
def test_windows_and_chunks_are_solved_each_from_its_start(monkeypatch, alike, starts):
    N, n = 6, 4
    A = random_steps(random_pattern(n, n, 0.5, 1, diagonal=True), 1 if alike else N, shift=3.0)
    B = random_steps(random_pattern(n, n, 0.5, 2), 1 if alike else N, seed=5)
    for kind in (Substitution, StagedSubstitution):
        assert_solves(kind(A, B, N, np.array(starts)), A, B, N, starts)
    for entries in (1, 90):  # chunks of one step, of two or three
        monkeypatch.setattr(room, "LIKE_ENTRIES", entries)
        monkeypatch.setattr(room, "UNLIKE_ENTRIES", entries)
        monkeypatch.setattr(room, "GATHERED", 2 * n)
        sweeps = Substitution(A, B, N, np.array(starts))
        assert len(sweeps._chunks) >= (N if entries == 1 else 2)
        assert_solves(sweeps, A, B, N, starts)


@pytest.mark.parametrize("vary", ["A", "B"])
def test_one_of_the_matrices_may_be_the_same_in_all_steps(vary):
    A = random_steps(Sparsity.banded(4), 3 if vary == "A" else 1, shift=4.0)
    B = random_steps(random_pattern(4, 4, 0.5, 2), 3 if vary == "B" else 1, seed=5)
    assert_solves(Substitution(A, B, 3), A, B, 3)


def test_sweeps_share_memory_and_not_values():
    B, r = random_steps(Sparsity.banded(6), 1, seed=5), randn(4, 6)
    matrices = [random_steps(Sparsity.banded(6), 4, seed, shift=4.0) for seed in range(2)]
    sweeps = [Substitution(A, B, 4) for A in matrices]
    for _ in range(room.FEW_TURNS + 2):  # in the end each has its own
        for A, each in zip(matrices, sweeps):
            assert_solves(each, A, B, 4)
    assert all(each._matrices for each in sweeps) and not torch.equal(*(each.forward(r) for each in sweeps))


def test_layouts_are_kept_and_values_are_not():
    sparsity, B = Sparsity.banded(6), random_steps(Sparsity.banded(6), 1, seed=5)
    room.band_layout.cache_clear()
    for seed in range(3):
        A = random_steps(Sparsity(sparsity.csr), 4, seed, shift=4.0)  # equal patterns, not the same
        assert_solves(Substitution(A, B, 4), A, B, 4)
    assert room.band_layout.cache_info().misses == 1


@pytest.mark.parametrize("bad, what", [(0.0, "singular"), (float("nan"), "finite"), (float("inf"), "finite")])
@pytest.mark.parametrize("width", [1, 2, 7])
def test_a_bad_step_is_named(bad, what, width):
    A, B = random_steps(Sparsity.banded(20, width), 5, shift=20.0), random_steps(Sparsity.banded(20), 1)
    A.values[3] *= bad
    with pytest.raises(StepFailure, match=what) as caught:
        Substitution(A, B, 5)
    assert caught.value.row == 3


def test_memory_stays_flat():
    import resource

    A, B = random_steps(Sparsity.banded(100), 60, shift=4.0), random_steps(Sparsity.banded(100), 1)
    r = randn(60, 100)

    def solve(times):
        for _ in range(times):
            sweeps = Substitution(A, B, 60)
            sweeps.backward(sweeps.forward(r))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = solve(10)
    assert solve(200) - before < 4096  # kB; a leak of the triangles alone would be 200 times 1.2 MB


@pytest.mark.parametrize("batch", [1, 5])
def test_substitution_takes_multigrid_in_space(options, batch):
    options(step_pc_type="gamg", step_ksp_rtol=1e-13)
    A, B = heat_steps(30, batch)
    sweeps, r = substitution(A, B, 5, np.array([0, 3])), randn(5, 30)
    assert isinstance(sweeps, StagedSubstitution)
    dense_B = densify(B).expand(5, -1, -1).clone()
    dense_B[[0, 3]] = 0.0
    K = coupled(densify(A).expand(5, -1, -1), dense_B)
    assert torch.allclose(sweeps.forward(r).ravel(), torch.linalg.solve(K, r.ravel()), atol=1e-9)
    assert torch.allclose(sweeps.backward(r).ravel(), torch.linalg.solve(K.T, r.ravel()), atol=1e-9)


@pytest.mark.parametrize("n, starts", [(1, (0,)), (2, (0, 3)), (3, (0,)), (8, (0, 1))])
@pytest.mark.parametrize("alike", [True, False])
def test_few_unknowns_a_step_are_one_band(n, starts, alike):
    batch = 6
    A = random_steps(random_pattern(n, n, 0.5, 1, diagonal=True), 1 if alike else batch, shift=3.0)
    B = random_steps(random_pattern(n, n, 0.5, 2), 1 if alike else batch, seed=5)
    sweeps = substitution(A, B, batch, np.array(starts))
    assert isinstance(sweeps, CoupledBand)
    assert_solves(sweeps, A, B, batch, starts)


@pytest.mark.parametrize("entry", [0.0, np.nan])
def test_a_step_of_few_unknowns_that_cannot_be_solved_is_named(entry):
    A = random_steps(random_pattern(2, 2, 1.0, 1, diagonal=True), 5, shift=3.0)
    A.values[3] = entry
    with pytest.raises(StepFailure) as failure:
        substitution(A, random_steps(random_pattern(2, 2, 1.0, 2), 5, seed=5), 5)
    assert failure.value.row == 3
