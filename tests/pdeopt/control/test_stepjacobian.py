import pytest
import torch
from torch.func import hessian, jacfwd

from pdeopt.control.stepjacobian import SparseStepJacobian, StepJacobian
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.steps.sparse import StepPattern
from pdeopt.steps.sparsity import Sparsity
from tests.helpers import examples
from tests.helpers.matrices import densify

CONSTRAINTS = ["dense", "layer", "burgers", "burgers theta", "burgers nodal", "heat"]


def dense_derivatives(c, where, steps, i, lam=None):
    """Of step i alone: [B A C F_p], or the Hessian of lam.F."""
    sizes = [c.state_dim, c.state_dim, c.control_dim, c.param_dim]
    y = torch.cat([*(part[i] for part in where), steps.p])

    def residual(y):
        u_old, u_new, z, p = y.split(sizes)
        return c.residual(u_old[None], u_new[None], z[None], steps[i : i + 1].with_parameters(p))[0]

    if lam is None:
        return jacfwd(residual)(y)
    return hessian(lambda y: lam @ residual(y))(y)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_products_are_those_of_the_dense_step_jacobians(name):
    c, where, steps, randn = examples.step_point(name)
    J, dp = c.linearize(*where, steps), randn(c.param_dim)
    d, w = [torch.randn_like(part) for part in where], randn(len(steps), c.state_dim)
    found, back = J.jvp(*d, dp), J.vjp(w)
    sums = torch.zeros(c.param_dim, dtype=torch.float64)
    for i in range(len(steps)):
        D = dense_derivatives(c, where, steps, i)
        assert torch.allclose(found[i], D @ torch.cat([*(part[i] for part in d), dp]), atol=1e-12)
        *expected, p_part = (D.T @ w[i]).split([part.shape[1] for part in where] + [c.param_dim])
        for rows, row in zip(back, expected):
            assert torch.allclose(rows[i], row, atol=1e-12)
        sums += p_part
    assert torch.allclose(back[3], sums, atol=1e-12)


def filled(parts, like):
    """With zeros for None."""
    return [torch.zeros_like(x) if part is None else part for part, x in zip(parts, like)]


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_second_derivatives_are_those_of_the_dense_hessians(name):
    c, where, steps, randn = examples.step_point(name)
    J, dp, lam = c.linearize(*where, steps), randn(c.param_dim), randn(len(steps), c.state_dim)
    d = [torch.randn_like(part) for part in where]
    found, sums = filled(J.hvp(lam, *d, dp), (*d, dp)), torch.zeros(c.param_dim, dtype=torch.float64)
    for i in range(len(steps)):
        H = dense_derivatives(c, where, steps, i, lam[i])
        *expected, p_part = (H @ torch.cat([*(part[i] for part in d), dp])).split(
            [part.shape[1] for part in where] + [c.param_dim]
        )
        for rows, row in zip(found, expected):
            assert torch.allclose(rows[i], row, atol=1e-11)
        sums += p_part
    assert torch.allclose(found[3], sums, atol=1e-11)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_no_direction_is_the_zero_direction(name):
    c, where, steps, randn = examples.step_point(name)
    J, lam = c.linearize(*where, steps), randn(len(steps), c.state_dim)
    zero = [torch.zeros_like(part) for part in where]
    assert torch.equal(J.jvp(), torch.zeros_like(where[1]))
    assert torch.allclose(J.jvp(d_new=lam), J.jvp(zero[0], lam, zero[2], torch.zeros(c.param_dim, dtype=lam.dtype)))
    for part in filled(J.hvp(lam), (*where, steps.p)):
        assert torch.equal(part, torch.zeros_like(part))


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_step_solves_invert_A_and_its_transpose(name):
    c, where, steps, randn = examples.step_point(name)
    J, r = c.linearize(*where, steps), randn(len(steps), c.state_dim)
    assert torch.allclose(J.jvp(d_new=J.solve(r)), r, atol=1e-11)
    assert torch.allclose(J.vjp(J.solve_adjoint(r))[1], r, atol=1e-11)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_sweeps_invert_the_coupled_steps(name):
    c, where, steps, randn = examples.step_point(name)
    J, r = c.linearize(*where, steps), randn(len(steps), c.state_dim)
    x, y = J.forward_sweep(r), J.backward_sweep(r)
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    after = torch.cat([J.vjp(y)[0][1:], torch.zeros_like(y[:1])])
    assert torch.allclose(J.jvp(before, x), r, atol=1e-10 * float(x.abs().max()))
    assert torch.allclose(J.vjp(y)[1] + after, r, atol=1e-10 * float(y.abs().max()))


@pytest.mark.parametrize("name", ["dense", "burgers", "heat"])
def test_sparse_and_matrix_free_jacobians_agree(name):
    c, where, steps, randn = examples.step_point(name)
    sparse, free = c.linearize(*where, steps), StepJacobian(c, *where, steps)
    assert isinstance(sparse, SparseStepJacobian)
    r = randn(len(steps), c.state_dim)
    for verb in ("solve", "solve_adjoint", "forward_sweep", "backward_sweep"):
        assert torch.allclose(getattr(sparse, verb)(r), getattr(free, verb)(r), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad, what", [(0.0, "singular"), (float("nan"), "not finite")])
@pytest.mark.parametrize("kind", ["sparse", "free"])
def test_a_step_that_cannot_be_solved_is_named_with_its_time(kind, bad, what):
    c, where, steps, randn = examples.step_point("burgers")
    J = c.linearize(*where, steps)
    J.blocks["A"].values[1] *= bad
    if kind == "free":
        A, J = densify(J.blocks["A"]), StepJacobian(c, *where, steps)
        J.A = A
    with pytest.raises(SolveFailure, match=rf"{what}: step {int(steps.index[1])}, to t = {float(steps.t_new[1]):.6g}"):
        (J.forward_sweep if kind == "sparse" else J.solve)(randn(len(steps), c.state_dim))


def test_colored_differentiation_gives_the_coded_jacobian():
    c, where, steps, _ = examples.step_point("burgers nodal")
    found, coded = SparseStepJacobian.colored(c, *where, steps, c.pattern), c.linearize(*where, steps)
    for block in "ABC":
        assert torch.allclose(found.blocks[block].values, coded.blocks[block].values, atol=1e-15)


@pytest.mark.parametrize("missing", "ABC")
def test_a_pattern_that_misses_derivatives_is_refused(missing):
    c, where, steps, _ = examples.step_point("burgers")
    blocks = {name: getattr(c.pattern, name).csr.tolil() for name in "ABCW"}
    row, col = (k[0] for k in blocks[missing].nonzero())
    blocks[missing][row, col] = 0
    pattern = StepPattern(**{name: Sparsity(block.tocsr()) for name, block in blocks.items()})
    with pytest.raises(InputError, match="misses"):
        SparseStepJacobian.colored(c, *where, steps, pattern)


def test_sparse_derivatives_in_a_field_of_parameters_are_those_of_differentiation():
    c, steps = examples.conductor().constraint, examples.conductor().grid.steps
    draw = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    N, n, P = len(steps), c.state_dim, c.param_dim
    steps = steps.with_parameters(randn(P))
    where = randn(N, n), randn(N, n), randn(N, 0)
    sparse, free = c.linearize(*where, steps), StepJacobian(c, *where, steps)
    d, dp, lam = [randn(N, n), randn(N, n), randn(N, 0)], randn(P), randn(N, n)
    for _ in range(2):  # the second products have entries
        found = [sparse.jvp(*d, dp), sparse.vjp(lam)[3], *sparse.hvp(lam, *d, dp)]
        for part, expected in zip(found, [free.jvp(*d, dp), free.vjp(lam)[3], *free.hvp(lam, *d, dp)]):
            assert torch.allclose(part, expected, rtol=1e-12, atol=1e-12)
    assert sparse.F_p is not None and sparse.F_p.sparsity.nnz == 2 * n
    assert sparse.F_p.sparsity.coloring.number == 2


def test_a_pattern_that_misses_derivatives_in_the_parameters_is_refused():
    problem = examples.conductor()
    c = problem.constraint
    c.parameter_pattern = c.parameter_pattern._replace(F=Sparsity.empty(c.state_dim, c.param_dim))
    zero = torch.zeros(len(problem.grid.steps), c.state_dim, dtype=torch.float64)
    J = c.linearize(zero, zero + 1, zero[:, :0], problem.grid.steps.with_parameters(torch.ones(c.param_dim).double()))
    with pytest.raises(InputError, match="parameter_pattern"):
        _ = J.F_p
