"""A network as the constraint of a control problem: features are the state, weights the control, layers the steps.

    u_i - u_{i-1} - dt F(u_{i-1}; z_i) = 0,   u_0 = features of the samples, or opening(samples; p)

so that every solver of pdeopt trains it: reduced methods by the gradient, the inexact SQP with features and weights
as unknowns at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nn_adapters.layers.batching import NOTHING_GIVEN, batched, with_parameters
from nn_adapters.layers.blocks import Direct
from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.stepjacobian import StepJacobian
from pdeopt.core.errors import InputError
from pdeopt.steps.timegrid import Steps


class LayerConstraint(TimeDependentConstraint):
    """Layers u_i = u_{i-1} + dt F(u_{i-1}; z_i) as a `TimeDependentConstraint`, dt the length of a step.

    The state u_i is the features of all samples, flat, (state_dim,); the control z_i is the parameters of F in their
    order, flat, (control_dim,). With an opening, u_0 is what it makes of the samples; its parameters, and those of a
    head that a loss reads, are the global parameters p, in this order, flat, (param_dim,). Everything is computed in
    double precision; the modules themselves are not changed.

    Args:
        block: the module F; `Direct(F)` for u_i = F(u_{i-1}).
        features: u_0 of all samples, (samples, ...); with an opening, its inputs.
        opening: a module before the layers that is trained; None for none.
        head: a module after them that is trained, see `classification_loss`; None for none.
        smooth: whether a step's control is followed by what it differs by from that of the layer before, as `Jumps`
            makes it and `SmoothCost` prices it; control_dim is twice as large then.

    Attributes:
        shape: of the features of all samples after a layer, (samples, ...).
        weights: parameters of a layer.
        is_smooth: whether steps see by how much they differ.

    Raises:
        InputError: no samples; a block with buffers or random numbers.

    Example:
        >>> constraint = LayerConstraint(dense(4), x, opening=nn.Linear(2, 4), head=nn.Linear(4, 5))
        >>> objective = classification_loss(constraint, None, labels) + ControlCost(1e-4)
        >>> problem = ControlProblem(constraint, objective, TimeGrid.uniform(num_layers, Tf))
    """

    pattern = None  # matrix-free: a step couples all features of a sample
    parameter_pattern = None

    def __init__(
        self,
        block: nn.Module,
        features: Tensor,
        opening: nn.Module | None = None,
        head: nn.Module | None = None,
        smooth: bool = False,
    ) -> None:
        if features.numel() == 0:
            raise InputError("features of LayerConstraint", f"shape {tuple(features.shape)}", "at least one sample")
        self.block, self.opening, self.head = block, opening, head
        self.features = features.double()
        self.shapes = [p.shape for p in block.parameters()]
        self.sizes = [shape.numel() for shape in self.shapes]
        ends = [[] if part is None else list(part.parameters()) for part in (opening, head)]
        self._end_shapes = [p.shape for part in ends for p in part]
        self._end_sizes, self._opening_count = [shape.numel() for shape in self._end_shapes], len(ends[0])
        self._opening = None if opening is None else with_parameters(opening)
        self._head = None if head is None else with_parameters(head)
        self.is_smooth, self.weights = smooth, sum(self.sizes)
        self.param_dim, self.control_dim = sum(self._end_sizes), self.weights * (1 + smooth)
        self._value, self._is_direct = batched(block), isinstance(block, Direct)
        first = self._entry(torch.zeros(self.param_dim, dtype=torch.float64))
        self.shape, self.state_dim = first.shape, first.numel()

    def initial_state(self, p: Tensor) -> Tensor:
        return self._entry(p).reshape(-1)

    def _entry(self, p: Tensor) -> Tensor:
        if self._opening is None:
            return self.features
        return self._opening(self.features, *self.ends(p)[0])

    def ends(self, p: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of the opening and of the head, from the global parameters (param_dim,)."""
        parts = [part.reshape(shape) for part, shape in zip(p.split(self._end_sizes), self._end_shapes)]
        return parts[: self._opening_count], parts[self._opening_count :]

    def scores(self, u: Tensor, p: Tensor) -> Tensor:
        """What the head makes of flat features, (state_dim,); the features themselves where there is none."""
        features = u.reshape(self.shape)
        return features if self._head is None else self._head(features, *self.ends(p)[1])

    def first_parameters(self) -> Tensor:
        """p of the modules as they are, (param_dim,)."""
        parts = [p for part in (self.opening, self.head) if part is not None for p in part.parameters()]
        found = [p.detach().double().reshape(-1) for p in parts]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)

    def parameters(self, z: Tensor) -> list[Tensor]:
        """The parameters of each step's module, (steps, ...), from controls (steps, control_dim)."""
        parts = z[:, : self.weights].split(self.sizes, 1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes)]

    def layer(self, u_old: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """The features after the layers, (steps, state_dim)."""
        u = u_old.reshape(-1, *self.shape)
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


def control_of(stack: nn.ModuleList) -> Tensor:
    """The controls, (layers, control_dim), for which the constraint is the network of these modules.

    Args:
        stack: modules of one kind, such as `LayerStack(...).layers`.
    """
    return torch.stack([torch.cat([p.detach().double().reshape(-1) for p in layer.parameters()]) for layer in stack])
