"""A network as the constraint of a control problem."""

import numpy as np
import pytest
import torch
from torch import nn

from nn_adapters.control.scoreloss import classification_loss, regression_loss
from nn_adapters.layers.blocks import LayerStack, conv, dense
from nn_adapters.layers.constraint import LayerConstraint, control_of
from pdeopt.control.objective import ControlCost
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.control.verify import adjoint_error, taylor_rates, taylor_remainders
from pdeopt.functions.petsc import PetscFunction
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.optimize.tao import TaoSolver
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers.support import entries, random_design

LAYERS, SAMPLES = 5, 4
BLOCKS = {
    "dense": (lambda: dense(3), (SAMPLES, 3)),
    "two layers": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (SAMPLES, 3)),
    "convolution": (lambda: conv(1), (2, 1, 3, 3)),
}


def network(name="dense", seed=0):
    block, shape = BLOCKS[name]
    torch.manual_seed(seed)
    stack = LayerStack(block, LAYERS, 1.0).double()
    features = torch.randn(shape, dtype=torch.float64)
    return stack, features


def problem(name="dense", gamma=1e-3):
    stack, features = network(name)
    torch.manual_seed(3)
    head = nn.Linear(features[0].numel(), 2).double().requires_grad_(False)
    constraint = LayerConstraint(stack.layers[0], features)
    labels = torch.arange(len(features)) % 2
    loss = classification_loss(constraint, lambda u: head(u.flatten(1)), labels)
    grid = TimeGrid.uniform(LAYERS, 1.0)
    control = ControlProblem(constraint, loss + ControlCost(gamma), grid)
    return control, stack, head, features, labels


def at(control, stack):
    z = control.create_design()
    z.setArray(control_of(stack.layers).reshape(-1).numpy())
    return z


@pytest.mark.parametrize("name", BLOCKS)
def test_the_state_is_what_the_network_computes(name):
    control, stack, _, features, _ = problem(name)
    state = entries(control.solve_state(at(control, stack))).reshape(LAYERS, *features.shape)
    assert torch.allclose(state[-1], stack(features), atol=1e-14)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_reduced_gradient_is_that_of_autograd(name):
    control, stack, head, features, labels = problem(name, gamma=1e-3)
    reduced, z = ReducedObjective(control), at(control, stack)
    gradient = z.duplicate()
    value = PetscFunction(reduced).value_and_gradient(z, gradient)
    loss = nn.functional.cross_entropy(head(stack(features).flatten(1)), labels)
    dt = 1.0 / LAYERS
    penalty = sum(p.square().sum() for p in stack.parameters())
    total = loss + 0.5 * 1e-3 * dt * penalty
    found = torch.autograd.grad(total, list(stack.parameters()))
    count = len(list(stack.layers[0].parameters()))
    rows = torch.cat([torch.stack(found[k::count]).reshape(LAYERS, -1) for k in range(count)], 1)
    assert value == pytest.approx(float(total.detach()), rel=1e-12)
    assert torch.allclose(entries(gradient).reshape(LAYERS, -1), rows, atol=1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_taylor_rates_and_adjoints(name):
    control, stack, *_ = problem(name)
    reduced, z = ReducedObjective(control), at(control, stack)
    remainders = taylor_remainders(reduced, z, random_design(control, 2))
    for order, name_of in enumerate(("value", "gradient", "hessian"), start=1):
        assert np.min(taylor_rates(remainders[name_of])[-2:]) >= order - 0.15
    lin = control.at(control.join(control.solve_state(z), z))
    assert adjoint_error(lin.jvp, lin.vjp, control.create_primal(), control.create_multiplier()) < 1e-13


def test_quasi_newton_and_sqp_train_it_to_the_same_weights():
    """One more constraint: features and weights are found at once, or weights alone."""
    stack, features = network()
    constraint = LayerConstraint(stack.layers[0], features)
    targets = torch.tanh(features @ torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3))
    objective = regression_loss(constraint, lambda u: u, targets) + ControlCost(1e-2)
    control = ControlProblem(constraint, objective, TimeGrid.uniform(LAYERS, 1.0))
    z = at(control, stack)
    by_tao = TaoSolver(ReducedObjective(control)).solve(z)
    near = by_tao.design.copy()
    near.scale(1.1)  # its linear solves have no preconditioner: a few iterations are enough here
    by_sqp = SQPSolver(control, opt_tol=1e-4, feas_tol=1e-6).solve(control.join(control.solve_state(near), near))
    assert by_sqp.converged, by_sqp.message
    assert by_sqp.objective == pytest.approx(by_tao.objective, rel=1e-6)
