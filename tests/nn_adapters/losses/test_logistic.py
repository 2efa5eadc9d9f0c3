"""Logistic regression: the loss and its script."""

import json

import numpy as np
import pytest
import scipy.sparse
import torch

from nn_adapters.losses.logistic import LogisticLoss
from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import Costs
from pdeopt.functions.subsampling import NestedSample, inclusion, uniform_numbers
from problems import logistic as script
from problems.benchmarks import sampling as benchmark
from tests.helpers.logistic import logistic_loss, logistic_samples, newton_optimum
from tests.helpers.support import python, relative


def formula(A, y, regularization, weights=None):
    """f, written down again."""
    A, y = torch.as_tensor(A), torch.as_tensor(y)
    weights = torch.full((len(y),), 1.0 / len(y), dtype=torch.float64) if weights is None else weights

    def f(x):
        return (weights * torch.log(1.0 + torch.exp(-y * (A @ x)))).sum() + 0.5 * regularization * x @ x

    return f


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor, scipy.sparse.csr_matrix])
def test_value_gradient_and_hessian_products_are_those_of_the_formula(make):
    A, y = logistic_samples()
    f, expected = LogisticLoss(make(A), y), formula(A, y, 1 / 40)
    x, d = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()
    value, g = f.value_and_gradient(x)
    assert value == f.value(x) == pytest.approx(float(expected(x)), rel=1e-14)
    assert relative(g, torch.func.grad(expected)(x)) < 1e-13
    assert relative(f.hvp(x, d), torch.func.hessian(expected)(x) @ d) < 1e-13


def test_large_margins_neither_overflow_nor_vanish():
    f = LogisticLoss(np.array([[1.0]]), [1.0], regularization=0.0)
    for x, expected in ((1000.0, 0.0), (-1000.0, 1000.0), (30.0, np.log1p(np.exp(-30.0)))):
        assert f.value(torch.tensor([x]).double()) == pytest.approx(expected, rel=1e-14)
    assert float(f.value_and_gradient(torch.tensor([-1000.0]).double())[1]) == -1.0


def test_a_subset_is_the_mean_over_its_samples_with_the_same_regularizer():
    A, y = logistic_samples()
    f, x = logistic_loss(), torch.ones(6).double()
    for indices in (torch.arange(5, 15), torch.tensor([3, 1, 7, 7])):
        part = f.subset(indices)
        expected = formula(A[indices.numpy()], y[indices.numpy()], 1 / 40)
        assert part.value(x) == pytest.approx(float(expected(x)), rel=1e-14)
        assert relative(part.value_and_gradient(x)[1], torch.func.grad(expected)(x)) < 1e-13
    assert np.shares_memory(f.subset(torch.arange(5, 15)).rows, f.rows)
    nested = f.subset(torch.arange(10, 30)).subset(torch.tensor([0, 4]))
    assert nested.value(x) == pytest.approx(f.subset(torch.tensor([10, 14])).value(x), rel=1e-14)
    factors = torch.tensor([2.0, 5.0]).double()
    weighted = formula(A[[4, 9]], y[[4, 9]], 1 / 40, factors / 40)
    assert f.subset(torch.tensor([4, 9]), factors).value(x) == pytest.approx(float(weighted(x)), rel=1e-14)


def test_calls_of_subsets_count_by_their_samples_and_new_points_cost_a_product():
    f, x = logistic_loss(costs=Costs(0.5, 1.0, 1.0)), torch.ones(6).double()
    part = f.subset(torch.arange(10))
    part.value_and_gradient(x)
    part.hvp(x, x)
    assert f.tally.work == pytest.approx(0.5) and (f.tally.gradients, f.tally.hessian_products) == (1, 1)
    part.hvp(2 * x, x)  # takes the margins there
    part.hvp(2 * x, x)
    assert f.tally.work == pytest.approx(0.5 + 0.375 + 0.25)


def test_samples_of_all_sizes_are_nested_and_their_hessian_is_right_in_the_mean():
    f, x = logistic_loss(N=60, n=3), torch.ones(3).double()
    q = f.importance(x)
    p = inclusion(q, 12)
    assert float(p.sum()) == pytest.approx(12.0) and float(p.max()) <= 1.0
    assert relative(p[p < 1] / q[p < 1], (p[p < 1] / q[p < 1]).mean().expand(int((p < 1).sum()))) < 1e-12
    generator = torch.Generator().manual_seed(0)
    nested = NestedSample(f, "curvature", uniform_numbers(60, generator))
    rows = [{tuple(row) for row in nested.of_size(size, x).rows} for size in (5, 12, 30)]
    assert [len(each) for each in rows] == [5, 12, 30] and rows[0] < rows[1] < rows[2]
    assert nested.of_size(60, x) is f
    d = torch.tensor([1.0, -2.0, 0.5]).double()
    draws = [NestedSample(f, "curvature", uniform_numbers(60, generator)).of_size(12, x).hvp(x, d) for _ in range(3000)]
    assert relative(torch.stack(draws).mean(0), f.hvp(x, d)) < 0.03


@pytest.mark.parametrize(
    "words, match",
    [
        (dict(rows=np.zeros((3, 2)), labels=[1.0, -1.0]), "labels"),
        (dict(rows=np.zeros((2, 2)), labels=[0.0, 1.0]), "-1 and 1"),
        (dict(rows=np.full((2, 2), np.nan), labels=[1.0, -1.0]), "not finite"),
        (dict(rows=np.zeros((2, 2), dtype=np.float32), labels=[1.0, -1.0]), "double"),
        (dict(rows=np.zeros((0, 2)), labels=[]), "at least one"),
    ],
)
def test_bad_samples_are_named(words, match):
    with pytest.raises(InputError, match=match):
        LogisticLoss(**words)


def test_an_empty_subset_is_named():
    with pytest.raises(InputError, match="subset"):
        logistic_loss().subset(torch.empty(0, dtype=torch.int64))


SMALL = ["-data", "generated", "-samples", "200", "-features", "20"]


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=pytest.mark.slow) if name == "sarah" else name for name in script.OPTIMIZERS]
)
def test_every_optimizer_finds_the_optimum_of_newtons_method(optimizer, tmp_path):
    file = tmp_path / "s.json"
    more = ["-rtol", "1e-3", "-mlvr_step_size", "0.02", "-mlvr_batch", "4", "-mlvr_steps", "50"]
    words = [*SMALL, "-optimizer", optimizer, "-summary", str(file), *(more if optimizer in ("svrg", "sarah") else [])]
    found = script.main(words)
    f = LogisticLoss(*script.generate(200, 20, 1.25, 0.05, 0))
    best = f.value(newton_optimum(f))
    summary = json.loads(file.read_text())
    assert summary["reason"] == "CONVERGED_OPTIMALITY" and summary["loss"] == found
    assert 0 <= found - best + 1e-14 < (1e-3 if more[1] in words else 1e-12)
    assert summary["accuracy"] > 0.7 and len(summary["history"]) == summary["iterations"] + 1


def test_files_in_the_format_of_libsvm(tmp_path):
    A, y = logistic_samples()
    rows = (" ".join(f"{k}:{v!r}" for k, v in enumerate(row.tolist(), 1)) for row in A)
    lines = (f"{label:.0f} {row}" for label, row in zip(y, rows))
    (tmp_path / "data").write_text("\n".join(lines) + "\n")
    f = logistic_loss()
    assert script.main(["-data", str(tmp_path / "data")]) == pytest.approx(f.value(newton_optimum(f)), rel=1e-12)
    (tmp_path / "data").write_text("1 1:1\n2 1:2\n3 1:2\n")
    with pytest.raises(InputError, match="3 classes"):
        script.main(["-data", str(tmp_path / "data")])


def test_a_sparse_file_stays_sparse(tmp_path):
    (tmp_path / "data").write_text("1 134217728:2 9000000000:1\n-1 1:1\n-1 7:0.5 134217728:-1\n")
    x, y = script.read_two_classes(str(tmp_path / "data"))
    dense = np.array([[0, 0, 2, 1], [1, 0, 0, 0], [0, 0.5, -1, 0]])  # the features that samples have
    assert scipy.sparse.issparse(x) and np.array_equal(x.toarray(), dense) and y.tolist() == [1, -1, -1]
    f = LogisticLoss(dense, y)
    assert script.main(["-data", str(tmp_path / "data")]) == pytest.approx(f.value(newton_optimum(f)), rel=1e-12)


@pytest.mark.parametrize("words", [["-data", "nowhere"], ["-data", "australian"], ["-decay", "-1"], ["-bogus", "1"]])
def test_bad_options_are_named(words):
    with pytest.raises(InputError, match=words[0] if words[1] != "australian" else "-data_dir"):
        script.main([*SMALL[2:], *words])


@pytest.mark.mpi
def test_ranks_solve_the_same_problem_each():
    done = python("-m", "problems.logistic", *SMALL, ranks=2)
    assert done.returncode == 0 and done.stdout.count("converged optimality") == 1, done.stderr


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    rows = benchmark.main(["-quick", "-sets", "generated", "-seeds", "1", "-plot", str(tmp_path / "p.png")])
    assert all(row.measured is not None for row in rows if row.met is not None)
    assert (tmp_path / "p.png").stat().st_size > 1000
