import numpy as np
import pytest
import torch

from pdeopt.core.errors import SolveFailure
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.windows import Windows
from tests.helpers.matrices import densify, randn
from tests.helpers.parallel_time import RANKS, check

n, N = 4, 5
WEIGHT = torch.tensor([0.3, 0.5, 0.5, 2.0, 0.1], dtype=torch.float64)


def spd(batch, seed=0):
    """Symmetric, dominant diagonals, on a tridiagonal pattern."""
    pattern, draw = Sparsity.banded(n), torch.Generator().manual_seed(seed)
    values = torch.rand(batch, pattern.nnz, generator=draw, dtype=torch.float64)
    matrix = densify(StepMatrix(pattern, values))
    matrix = matrix + matrix.mT + 4 * torch.eye(n, dtype=torch.float64)
    return StepMatrix(pattern, matrix[:, pattern.rows, pattern.cols])


def whole(form):
    return densify(form.spread()).expand(N, -1, -1)


@pytest.fixture(params=["one matrix", "one a step"])
def form(request):
    return InnerProduct(WEIGHT, spd(1 if request.param == "one matrix" else N))


def test_the_form_is_weight_times_matrix(form):
    expected, x = WEIGHT[:, None, None] * densify(form.matrix), randn(N, n)
    assert torch.allclose(whole(form), expected, atol=1e-15)
    assert torch.allclose(form.multiply(x), (expected @ x[..., None])[..., 0], atol=1e-14)
    assert torch.allclose(form.row_sums(), expected.abs().sum(2), atol=1e-14)
    assert torch.equal(whole(form.scaled(WEIGHT)), whole(InnerProduct(WEIGHT * WEIGHT, form.matrix)))
    assert torch.equal(densify(form[1:3].spread()), whole(form)[1:3])


def test_solving_inverts_multiplying(form):
    x = randn(N, n)
    assert torch.allclose(form.solve(form.multiply(x)), x, rtol=1e-12)


@pytest.mark.parametrize("weight", [WEIGHT, -WEIGHT, torch.zeros_like(WEIGHT)])
def test_multiples_of_one_matrix_are_recognized(weight):
    model = spd(1)
    form = InnerProduct.from_values(model.sparsity, weight[:, None] * model.values)
    assert form.matrix.is_constant
    assert torch.allclose(whole(form), weight[:, None, None] * densify(model), atol=1e-15)


@pytest.mark.parametrize("change", [1e-9, 1.0])
def test_other_entries_are_kept_as_they_are(change):
    values = WEIGHT[:, None] * spd(1).values
    values[2, 3] += change
    form = InnerProduct.from_values(Sparsity.banded(n), values)
    assert not form.matrix.is_constant
    assert torch.equal(form.spread().values, values)


@pytest.mark.parametrize("batch", [1, N])
def test_forms_add_up_on_the_union_of_their_patterns(form, batch):
    corner = Sparsity(np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]))
    other = InnerProduct(WEIGHT.flip(0), StepMatrix(corner, randn(batch, 4)))
    assert torch.allclose(whole(form + other), whole(form) + whole(other), atol=1e-14)
    assert torch.allclose(whole(other + form), whole(form) + whole(other), atol=1e-14)


def test_nothing_changes_where_zero_is_added(form):
    zero = InnerProduct.zero(n, N)
    assert (form + zero) is form and (zero + form) is form
    assert bool(zero.zero_rows().all()) and not bool(form.zero_rows().any())
    assert torch.equal(zero.multiply(randn(N, n)), torch.zeros(N, n))


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_sums_over_windows(form, size):
    found = form.sum(Windows(TimeGrid.uniform(N, 1.0), size))
    expected = torch.stack([whole(form)[k : k + size].sum(0) for k in range(0, N, size)])
    assert torch.allclose(densify(found.spread()), expected, atol=1e-14)


def test_a_step_without_weight_cannot_be_solved():
    weight = WEIGHT.clone()
    weight[2] = 0.0
    with pytest.raises(SolveFailure, match="row 2"):
        InnerProduct(weight, spd(1)).solve(randn(N, n))


def test_a_singular_matrix_cannot_be_solved():
    with pytest.raises(SolveFailure, match="singular"):
        InnerProduct(WEIGHT, StepMatrix(Sparsity.banded(n), torch.ones(1, 3 * n - 2, dtype=torch.float64) * 0)).solve(
            randn(N, n)
        )


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_agree_on_a_form_of_which_each_sees_a_part(ranks):
    """Patterns that differ from rank to rank, multiples of one matrix and others, and their sums over windows."""
    check("innerproduct", ranks)
