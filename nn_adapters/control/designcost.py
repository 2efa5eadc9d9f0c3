"""What an objective says of weights alone: a price of the layers' weights, and one of opening and head."""

from __future__ import annotations

import torch
from torch import Tensor

from pdeopt.control.objective import ControlCost, Objective, Rows, Sum, TerminalLoss
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import real_number
from pdeopt.steps.timegrid import Steps


class ParameterCost(TerminalLoss):
    """weight/2 |p|^2: the price of the global parameters, as those of opening and head are.

    Args:
        weight: > 0.

    Raises:
        InputError: a weight that is not a finite number > 0.
    """

    is_convex = is_quadratic = True

    def __init__(self, weight: float) -> None:
        self.weight = real_number(weight, "weight of ParameterCost", "a finite number > 0", above=0.0)
        super().__init__(lambda u, p: 0.5 * self.weight * p.square().sum())

    def gradient(self, u: Tensor, z: Tensor, steps: Steps) -> Rows:
        return torch.zeros_like(u), torch.zeros_like(z), self.weight * steps.has_last * steps.p


class DesignCost:
    """The quadratic terms of an objective in the design [z | p] of a network, as functions of its flat entries.

    Args:
        problem: of one control a step.
        control: alpha of sum_k dt_k alpha/2 |z_k|^2.
        parameters: weight of |p|^2 / 2.

    Attributes:
        layers: the Hessian by a layer's weights, (n_local, 1, 1).
        ends: that by a parameter of opening or head.
    """

    def __init__(self, problem: ControlProblem, control: float, parameters: float) -> None:
        self.grid, layout = problem.grid, problem.layout
        self.layers = (control * problem.grid.steps.dt)[:, None, None]
        self.ends = parameters
        z = (self.layers[:, 0] * torch.ones(problem.m, dtype=torch.float64)).reshape(-1)
        self._diagonal = torch.cat([z, torch.full((layout.param_size,), parameters, dtype=torch.float64)])

    @classmethod
    def of(cls, problem: ControlProblem, loss: Objective) -> DesignCost | None:
        """That of all terms but `loss`; None where there is one that it does not know."""
        objective = problem.objective
        terms = objective.terms if isinstance(objective, Sum) else [objective]
        found = {"control": 0.0, "parameters": 0.0}
        for term in terms:
            if type(term) is ControlCost and term.mass is None:
                found["control"] += term.control_weight
            elif type(term) is ParameterCost:
                found["parameters"] += term.weight
            elif term is not loss:
                return None
        return cls(problem, **found)

    def value(self, x: Tensor) -> float:
        """Its value at a design, (size,). Collective."""
        return 0.5 * float(self.grid.sum((self._diagonal * x) @ x))

    def gradient(self, x: Tensor) -> Tensor:
        """Its gradient."""
        return self._diagonal * x

    def product(self, d: Tensor) -> Tensor:
        """Its Hessian times a direction."""
        return self._diagonal * d
