"""Hierarchical matrices: the dense ones, to a tolerance; their factors; what PETSc sees; any number of ranks."""

import numpy as np
import pytest
import scipy.linalg
from petsc4py import PETSc

from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.lowrank import (
    ClusterTree,
    Gaussian,
    HierarchicalKernel,
    HierarchicalPC,
    HierarchicalSettings,
    KernelMatrix,
    Laplace,
    Matern,
    Polynomial,
    SymmetricFactor,
)
from tests.helpers.parallel_kernels import N, numbers, points
from tests.helpers.support import python, relative


def dense(H, operator):
    """The matrix of a linear map of values by slots."""
    return H.to_points(operator(H.from_points(np.eye(H.tree.n))))


@pytest.mark.parametrize("n, leaf", [(1, 8), (7, 8), (300, 8), (301, 40), (257, 2)])
def test_a_tree_has_every_point_once_and_few_empty_slots(n, leaf):
    tree = ClusterTree(np.random.default_rng(0).random((n, 3)), leaf)
    assert sorted(tree.order[tree.order >= 0]) == list(range(n))
    assert tree.leaf <= leaf and len(tree.order) == tree.leaf << tree.depth
    assert (tree.real == 0).sum() == len(tree.order) - n < 1 << tree.depth


def test_clusters_are_cut_across_their_longest_direction():
    generator = np.random.default_rng(0)
    for d in (2, 30):  # by eigenvectors, and by the power method
        x = generator.standard_normal((200, d))
        x[:, 1] *= 20.0
        order = ClusterTree(x, 100).order
        assert x[order[:100], 1].max() < x[order[100:], 1].min() or x[order[:100], 1].min() > x[order[100:], 1].max()


@pytest.mark.parametrize(
    "kernel, d",
    [
        (Gaussian(0.4), 1),
        (Gaussian(0.4), 2),
        (Matern(0.5, 1.5), 2),
        (Laplace(0.5), 1),
        (Laplace(0.5), 2),
        (Polynomial(1.0, 3), 2),
    ],
)
def test_a_tight_tolerance_gives_the_dense_matrix_symmetric_and_its_solution(kernel, d):
    x = np.random.default_rng(d).random((403, d))
    x[100:110] = x[0]  # equal points
    K = kernel.block(x, x)
    H = HierarchicalKernel(kernel, x, leaf=60, rtol=1e-12)
    found = dense(H, H.product)
    assert np.linalg.norm(found - K) <= 1e-11 * np.linalg.norm(K)
    assert np.linalg.norm(found - found.T) <= 1e-14 * np.linalg.norm(K)
    assert np.allclose(H.to_points(H.diagonal()), K.diagonal(), rtol=1e-14)
    b = np.random.default_rng(0).standard_normal((403, 2))
    S, shifted = SymmetricFactor(H, 0.1), K + 0.1 * np.eye(403)
    assert relative(H.to_points(S.solve(H.from_points(b))), np.linalg.solve(shifted, b)) < 1e-8
    assert np.isclose(S.log_determinant(), np.linalg.slogdet(shifted)[1], rtol=1e-9)


def test_a_looser_tolerance_gives_lower_ranks_and_the_error_that_was_asked_for():
    x = np.random.default_rng(0).random((600, 2))
    K = Gaussian(0.3).block(x, x)
    found = [HierarchicalKernel(Gaussian(0.3), x, leaf=40, rtol=rtol) for rtol in (1e-3, 1e-6, 1e-9)]
    for rtol, H in zip((1e-3, 1e-6, 1e-9), found):
        error = np.linalg.norm(dense(H, H.product) - K)
        assert error <= 2 * rtol * np.linalg.norm(K) and H.error <= 2 * rtol * np.linalg.norm(K)
    assert found[0].ranks < found[1].ranks < found[2].ranks and found[0].nbytes < found[2].nbytes < K.nbytes


def test_the_factor_of_full_rank_is_a_root_as_cholesky_is():
    x = np.random.default_rng(1).random((300, 2))
    H = HierarchicalKernel(Gaussian(0.3), x, leaf=40, rtol=1e-13)
    S = SymmetricFactor(H, 0.1)
    shifted = Gaussian(0.3).block(x, x) + 0.1 * np.eye(300)
    root, transposed = dense(H, S.product), dense(H, lambda y: S.product(y, transpose=True))
    assert np.allclose(root @ root.T, shifted, rtol=0, atol=1e-11) and np.allclose(root.T, transposed, atol=1e-13)
    rotation = np.linalg.solve(np.linalg.cholesky(shifted), root)  # two roots differ by a rotation
    assert np.allclose(rotation @ rotation.T, np.eye(300), rtol=0, atol=1e-8)
    half = dense(H, S.half_solve)
    assert np.allclose(half @ root, np.eye(300), rtol=0, atol=1e-9)
    assert np.allclose(dense(H, lambda y: S.half_solve(y, transpose=True)), half.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rank, cut", [(1, 0.0), (4, 0.0), (0, 0.1)])
def test_a_factor_of_any_rank_is_positive_definite_and_better_with_more(rank, cut):
    x = np.random.default_rng(1).random((300, 2))
    H = HierarchicalKernel(Gaussian(0.3), x, leaf=20, rtol=1e-13)
    shifted = H.kernel.block(x, x) + 1e-3 * np.eye(300)

    def condition(S):
        P = dense(H, lambda y: S.product(S.product(y, transpose=True)))
        assert np.isclose(S.log_determinant(), np.linalg.slogdet(P)[1], rtol=1e-9)
        values = scipy.linalg.eigvalsh(shifted, P)
        assert values[0] > 0.0 and max(S.ranks) < max(H.ranks)
        return values[-1] / values[0]

    better = condition(SymmetricFactor(H, 1e-3, rank + 15 if rank else 0, 0.1 * cut))
    assert better < 0.5 * condition(SymmetricFactor(H, 1e-3, rank, cut)) and better < 0.1 * np.linalg.cond(shifted)


@pytest.mark.parametrize("x", [np.zeros((1, 2)), np.zeros((50, 2)), np.linspace(0, 1, 50)[:, None] * [1.0, 0.0]])
def test_one_point_equal_points_and_a_constant_feature_are_points_too(x):
    H = HierarchicalKernel(Gaussian(0.3), x, leaf=8, rtol=1e-12)
    b = np.random.default_rng(0).standard_normal(len(x))
    found = H.to_points(SymmetricFactor(H, 0.1).solve(H.from_points(b)))
    assert relative(found, np.linalg.solve(H.kernel.block(x, x) + 0.1 * np.eye(len(x)), b)) < 1e-9


def test_a_matrix_that_is_too_coarse_is_not_factored():
    x = np.random.default_rng(0).random((600, 2))
    H = HierarchicalKernel(Gaussian(0.3), x, leaf=40, rtol=1e-2)
    with pytest.raises(SolveFailure, match="hier_rtol"):
        SymmetricFactor(H, 1e-6)


def test_petsc_solves_with_the_matrix():
    x, b = points()
    found = numbers(PETSc.COMM_SELF)
    shifted = Gaussian(0.3).block(x, x) + 0.05 * np.eye(N)
    assert relative(found["product"], shifted @ b) < 1e-10
    for name in ("rank 0", "rank 6", "centers 60"):
        assert relative(found[f"solution, {name}"], np.linalg.solve(shifted, b)) < 1e-7
    assert found["steps, rank 0"] <= 2 < found["steps, rank 6"] <= 40
    assert found["steps, centers 60"] <= 10


def test_the_preconditioner_asks_for_its_matrix():
    pc = PETSc.PC().create(PETSc.COMM_SELF)
    matrix = PETSc.Mat().createAIJ((2, 2), nnz=1, comm=PETSc.COMM_SELF)
    matrix.assemble()
    pc.setOperators(matrix)
    pc.setType("python")
    pc.setPythonContext(HierarchicalPC())
    with pytest.raises(InputError, match="KernelMatrix"):
        pc.getPythonContext().update(pc)


@pytest.mark.mpi
@pytest.mark.parametrize("most", [2, pytest.param(4, marks=pytest.mark.slow)])  # of 3 ranks, one has no leaves
def test_the_same_on_any_number_of_ranks(most, tmp_path):
    done = python("-m", "tests.helpers.parallel_kernels", tmp_path / "found.npz", ranks=most)
    assert done.returncode == 0, done.stderr
    found, expected = dict(np.load(tmp_path / "found.npz")), numbers(PETSc.COMM_SELF)
    assert len(found) == most * len(expected)
    for ranks in range(1, most + 1):
        for name, value in expected.items():
            error = relative(found[f"{ranks}: {name}"], value)
            assert error <= (1e-7 if "solution" in name else 0 if "steps" in name else 1e-10), (ranks, name, error)


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: HierarchicalKernel(Gaussian(1.0), [[0.0], [float("nan")]]), "points"),
        (lambda: HierarchicalKernel(Gaussian(1.0), np.zeros(3)), "points"),
        (lambda: HierarchicalKernel(Gaussian(1.0), np.zeros((3, 1)), rtol=0.0), "rtol"),
        (lambda: HierarchicalKernel(Gaussian(1.0), np.zeros((3, 1)), leaf=1), "leaf"),
        (lambda: HierarchicalKernel(Gaussian(1.0), np.zeros((3, 1)), most_rank=-1), "most_rank"),
        (lambda: HierarchicalKernel(Gaussian(1.0), np.zeros((3, 1))).from_points(np.zeros(4)), "values"),
        (lambda: KernelMatrix(Gaussian(1.0), np.zeros((3, 1)), 0.0, HierarchicalSettings()), "shift"),
    ],
)
def test_bad_input_is_named(make, what):
    with pytest.raises(InputError, match=what):
        make()
