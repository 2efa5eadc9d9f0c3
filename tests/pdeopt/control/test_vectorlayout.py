import torch

from pdeopt.control.verify import randomize
from tests.helpers.support import entries


def test_splitting_and_joining_are_inverse(problem, x):
    assert problem.join(*problem.split(x)).equal(x)
    k, lam = problem.create_kkt(), randomize(problem.create_multiplier(), 3)
    problem.layout.join_kkt(x, lam, k)
    y, mu = problem.create_primal(), problem.create_multiplier()
    problem.layout.split_kkt(k, y, mu)
    assert y.equal(x) and mu.equal(lam)
    assert problem.layout.pack(problem.create_primal(), *problem.fields(x)).equal(x)


def test_fields_of_vectors_are_written_back_as_they_were(problem):
    layout = problem.layout
    k = randomize(layout.create_kkt(), 5)
    (u, z, p), lam = layout.kkt_fields(k)
    assert u.shape == lam.shape == (problem.grid.n_local, problem.n) and len(p) == problem.param_dim
    assert layout.pack(layout.create_kkt(), u, z, p, lam).equal(k)
    design = randomize(layout.create_design(), 6)
    assert torch.equal(torch.cat(layout.design_fields(design)), entries(design))
    x, mu = layout.create_primal(), layout.create_multiplier()
    layout.split_kkt(k, x, mu)
    assert torch.equal(layout.rows(mu), lam) and all(map(torch.equal, layout.fields(x), (u, z, p)))
