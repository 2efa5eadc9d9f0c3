import pytest
import torch
from petsc4py import PETSc

from pdeopt.control.controlmap import ControlMap, Jumps, SmoothCost
from pdeopt.control.problem import ControlProblem
from pdeopt.core.errors import InputError
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples


def test_a_step_sees_the_nodes_at_both_ends():
    grid = TimeGrid.uniform(3, 1.0)
    z = torch.arange(8.0, dtype=torch.float64)  # z_0 .. z_3 of two components
    rows = ControlMap.nodal(grid, 2)(z).reshape(3, 4)
    assert torch.equal(rows, torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]], dtype=torch.float64))


def test_a_step_sees_its_control_and_the_jump_to_it():
    z = torch.tensor([[1.0, 2.0], [4.0, 8.0], [5.0, 0.0]], dtype=torch.float64)
    rows = Jumps(TimeGrid.uniform(3, 1.0), 2)(z.reshape(-1)).reshape(3, 4)
    jumps = [[0, 0], [3, 6], [1, -8]]
    assert torch.equal(rows, torch.cat([z, torch.tensor(jumps, dtype=torch.float64)], 1))
    with pytest.raises(InputError, match="even number"):
        SmoothCost(1.0, 1.0).check(4, 3, TimeGrid.uniform(3, 1.0))


@pytest.mark.parametrize("E", [ControlMap.nodal(TimeGrid.uniform(5, 1.0), 3), Jumps(TimeGrid.uniform(6, 1.0), 3)])
def test_the_adjoint_is_the_transpose(E):
    draw = torch.Generator().manual_seed(0)
    z, w = (torch.randn(k, generator=draw, dtype=torch.float64) for k in reversed(E.matrix.getSize()))
    assert float(E(z) @ w - z @ E.adjoint(w)) == pytest.approx(0, abs=1e-13)


def test_weights_shared_by_all_steps():
    """E = (I, ..., I)': one control for all steps; its gradient is the sum over the steps."""
    base = examples.dense()
    n_rows, m = base.layout.control_size, base.m
    matrix = PETSc.Mat().createAIJ((n_rows, m), nnz=1, comm=base.grid.comm)
    for k in range(n_rows):
        matrix.setValue(k, k % m, 1.0)
    matrix.assemble()
    shared = ControlProblem(base.constraint, base.objective, base.grid, ControlMap(matrix))
    x, y = base.create_primal(), shared.create_primal()
    x.set(0.3), y.set(0.3)
    assert shared.at(y).value == pytest.approx(base.at(x).value, rel=1e-14)
    by_step = base.at(x).gradient_fields[1].reshape(-1, m)
    assert torch.allclose(shared.at(y).gradient_fields[1], by_step.sum(0))


def test_rows_that_are_not_the_steps_are_refused():
    base = examples.dense()
    with pytest.raises(InputError, match="control map"):
        ControlProblem(base.constraint, base.objective, base.grid, ControlMap.nodal(base.grid, 3))


@pytest.mark.parametrize("matrix", [torch.eye(3), PETSc.Mat(), None])
def test_a_control_map_is_a_matrix_of_petsc(matrix):
    with pytest.raises(InputError, match="control map"):
        ControlMap(matrix)
