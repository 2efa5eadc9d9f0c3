"""A constraint of two blocks that has no time in it: the lasso, by all ways of ADMM."""

from itertools import pairwise

import pytest
import torch
from mpi4py import MPI

from pdeopt.core.monitor import Reason, SplitRecord
from pdeopt.optimize.splitting import ADMM, Couplings, Pair, PairedConstraint, SplitWork


class Lasso(PairedConstraint):
    """min |A x - b|^2 / 2 + weight |y|_1 subject to x = y."""

    def __init__(self, A, b, weight, beta=0.5):
        self.A, self.b, self.weight, self.work = A, b, weight, SplitWork()
        zero, places = (
            torch.zeros(1, A.shape[1], dtype=A.dtype),
            Couplings(MPI.COMM_SELF, range(1), 2, lambda rows: rows),
        )
        self.pair = Pair(zero, zero, places, beta)

    def sweep(self, iteration):
        return "x", "y"

    def update(self, block):
        c, s = self.pair.pull(block == "x")[0], 2 * self.pair.beta
        if block == "x":
            matrix = self.A.T @ self.A + s * torch.eye(len(c), dtype=c.dtype)
            self.pair.move_first(torch.linalg.solve(matrix, self.A.T @ self.b - c)[None])
        else:
            self.pair.move_second(torch.nn.functional.softshrink(-c / s, self.weight / s)[None])

    def ascend(self):
        self.pair.ascend()

    def lagrangian(self):
        return self.objective() + self.pair.penalty()

    def objective(self):
        x, y = self.pair.first[0], self.pair.second[0]
        return float(0.5 * (self.A @ x - self.b).square().sum() + self.weight * y.abs().sum())

    def residuals(self):
        return self.pair.residuals()

    def design(self):
        return self.pair.second[0].clone()

    def memory(self):
        return self.pair.memory()

    def recall(self, memory):
        self.pair.recall(memory)


def lasso(beta=0.5):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(30, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, 1, 12).double()
    return Lasso(A, A[:, ::3].sum(1) + torch.randn(30, generator=generator).double(), 5.0, beta)


@pytest.fixture(scope="module")
def plain():
    return ADMM(lasso(), rtol=1e-9, max_it=3000).solve()


@pytest.mark.parametrize(
    "settings, share",
    [({}, 1.0), ({"relax": 1.7}, 0.7), ({"penalty": "spectral"}, 0.3), ({"anderson": 10}, 0.1)],
    ids=["plain", "relaxed", "spectral", "accelerated"],
)
def test_the_lasso_satisfies_its_conditions(plain, settings, share):
    """A'(A y - b) = -weight sign(y) where y is not zero, and at most the weight elsewhere."""
    problem = lasso()
    result = ADMM(problem, rtol=1e-9, max_it=3000, **settings).solve()
    assert result.reason == Reason.CONVERGED_OPTIMALITY and isinstance(result.history[-1], SplitRecord)
    assert result.iterations <= share * plain.iterations
    y = result.design
    gradient = problem.A.T @ (problem.A @ y - problem.b)
    on = y != 0
    assert 0 < int(on.sum()) < len(y)
    assert torch.allclose(gradient[on], -problem.weight * y[on].sign(), rtol=0, atol=1e-6)
    assert bool((gradient[~on].abs() <= problem.weight + 1e-6).all())


def test_no_block_raises_the_augmented_lagrangian():
    problem = lasso()
    values = [problem.lagrangian()]
    for iteration in range(3):
        for block in problem.sweep(iteration):
            problem.update(block)
            values.append(problem.lagrangian())
    assert all(after <= before + 1e-9 for before, after in pairwise(values))


def test_a_pair_remembers():
    whole, other = lasso(), lasso()
    ADMM(whole, max_it=3).solve()
    other.recall(whole.memory())
    assert other.objective() == whole.objective() and other.residuals() == whole.residuals()
    assert torch.equal(other.pair.sides(), whole.pair.sides())
