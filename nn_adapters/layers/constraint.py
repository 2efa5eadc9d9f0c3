"""A network as the constraint of a control problem: features are the state, weights the control, layers the steps.

    u_i - u_{i-1} - dt F(u_{i-1}; z_i) = 0,   u_0 = features of the samples

so that every solver of pdeopt trains it: reduced methods by the gradient, the inexact SQP with features and weights
as unknowns at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nn_adapters.layers.batching import NOTHING_GIVEN, batched
from nn_adapters.layers.blocks import Direct
from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.objective import Objective, TerminalLoss
from pdeopt.control.stepjacobian import StepJacobian
from pdeopt.steps.timegrid import Steps


class LayerConstraint(TimeDependentConstraint):
    """Layers u_i = u_{i-1} + dt F(u_{i-1}; z_i) as a `TimeDependentConstraint`, dt the length of a step.

    The state u_i is the features of all samples, flat, (state_dim,); the control z_i is the parameters of F in their
    order, flat, (control_dim,). Everything is computed in double precision; the module itself is not changed.

    Args:
        block: the module F; `Direct(F)` for u_i = F(u_{i-1}).
        features: u_0 of all samples, (samples, ...).

    Raises:
        InputError: a block with buffers or random numbers.

    Example:
        >>> constraint = LayerConstraint(dense(4), features)
        >>> objective = classification_loss(constraint, head, labels) + ControlCost(1e-4)
        >>> problem = ControlProblem(constraint, objective, TimeGrid.uniform(num_layers, Tf))
    """

    pattern = None  # matrix-free: a step couples all features of a sample

    def __init__(self, block: nn.Module, features: Tensor) -> None:
        self.features = features.double()
        self.shapes = [p.shape for p in block.parameters()]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.state_dim, self.control_dim = features.numel(), sum(self.sizes)
        self._value, self._is_direct = batched(block), isinstance(block, Direct)

    def initial_state(self, p: Tensor) -> Tensor:
        return self.features.reshape(-1)

    def parameters(self, z: Tensor) -> list[Tensor]:
        """The parameters of each step's module, (steps, ...), from controls (steps, control_dim)."""
        return [part.reshape(-1, *shape) for part, shape in zip(z.split(self.sizes, 1), self.shapes)]

    def layer(self, u_old: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """The features after the layers, (steps, state_dim)."""
        u = u_old.reshape(-1, *self.features.shape)
        value = self._value(u, self.parameters(z), NOTHING_GIVEN).reshape(u_old.shape)
        return value if self._is_direct else u_old + steps.dt[:, None] * value

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return u_new - self.layer(u_old, z, steps)

    def advance(self, u_old: Tensor, z: Tensor, steps: Steps, guess: Tensor | None = None) -> Tensor:
        return self.layer(u_old, z, steps)

    def linearize(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> StepJacobian:
        return LayerJacobian(self, u_old, u_new, z, steps)


class LayerJacobian(StepJacobian):
    """Derivatives of layers: A = dF/du_new is the identity, so solves with it are for free."""

    def solve(self, r: Tensor) -> Tensor:
        return r

    def solve_adjoint(self, r: Tensor) -> Tensor:
        return r

    def _one(self, i: int) -> StepJacobian:
        u_old, u_new, z, _ = self.point
        rows = slice(i, i + 1)
        return LayerJacobian(self.constraint, u_old[rows], u_new[rows], z[rows], self.steps[rows])


def classification_loss(constraint: LayerConstraint, head: Callable[[Tensor], Tensor], labels: Tensor) -> Objective:
    """The mean cross-entropy of `head(features)` after the last layer, as an objective of a control problem.

    Args:
        constraint: the layers.
        head: features (samples, ...) to scores (samples, classes), in double precision; not trained.
        labels: classes, (samples,).
    """

    def loss(u: Tensor, p: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(u.reshape(constraint.features.shape)), labels)

    return TerminalLoss(loss)


def regression_loss(constraint: LayerConstraint, head: Callable[[Tensor], Tensor], targets: Tensor) -> Objective:
    """Half the mean square of `head(features) - targets` after the last layer, as an objective of a control problem.

    Args:
        constraint: the layers.
        head: features (samples, ...) to outputs, in double precision; not trained.
        targets: of the shape of the outputs.
    """

    def loss(u: Tensor, p: Tensor) -> Tensor:
        return 0.5 * (head(u.reshape(constraint.features.shape)) - targets).square().mean()

    return TerminalLoss(loss)


def control_of(stack: nn.ModuleList) -> Tensor:
    """The controls, (layers, control_dim), for which the constraint is the network of these modules.

    Args:
        stack: modules of one kind, such as `LayerStack(...).layers`.
    """
    return torch.stack([torch.cat([p.detach().double().reshape(-1) for p in layer.parameters()]) for layer in stack])
