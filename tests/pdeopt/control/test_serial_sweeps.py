import pytest
import torch
from torch.func import jacfwd

from pdeopt.control.serial_sweeps import substitute_backward, substitute_forward
from pdeopt.core.errors import SolveFailure
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries


def setting(name, seed=0):
    problem = examples.EXAMPLES[name]()
    draw = torch.Generator().manual_seed(seed)
    x = problem.create_primal()
    x.setArray(0.5 * torch.randn(x.getLocalSize(), generator=draw, dtype=torch.float64).numpy())
    r = torch.randn(problem.grid.n_local, problem.n, generator=draw, dtype=torch.float64)
    F_u = jacfwd(Oracle(problem).F)(entries(x))[:, : problem.layout.state_size]
    return problem, problem.at(x).jacobian, r, F_u


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_forward_inverts_the_state_jacobian(name):
    problem, jacobian, r, F_u = setting(name)
    expected = torch.linalg.solve(F_u, r.ravel())
    assert torch.allclose(substitute_forward(problem.grid, jacobian, r).ravel(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_backward_inverts_its_transpose(name):
    problem, jacobian, r, F_u = setting(name)
    expected = torch.linalg.solve(F_u.T, r.ravel())
    assert torch.allclose(substitute_backward(problem.grid, jacobian, r).ravel(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_forward_and_backward_are_adjoint(name):
    problem, jacobian, r, _ = setting(name)
    w = r.flip(0) + 1
    x, y = substitute_forward(problem.grid, jacobian, r), substitute_backward(problem.grid, jacobian, w)
    assert abs(float((x * w).sum() - (r * y).sum())) <= 1e-12 * float(x.norm() * w.norm() + r.norm() * y.norm())


def test_a_singular_step_is_a_solve_failure():
    problem, jacobian, r, _ = setting("dense")
    jacobian.blocks["A"].values[2] = 0.0
    for sweep in (substitute_forward, substitute_backward):
        with pytest.raises(SolveFailure, match="singular"):
            sweep(problem.grid, jacobian, r)
