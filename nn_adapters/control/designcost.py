"""What an objective says of weights alone: a price of the layers' weights, and one of opening and head."""

from __future__ import annotations

import torch
from torch import Tensor

from pdeopt.control.controlmap import SmoothCost
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
        smoothness: gamma of gamma/2 sum_i |(z_i - z_{i-1}) / dt_i|^2, see `SmoothCost`.

    Attributes:
        layers: the Hessian's diagonal by a layer's weights, (n_local, 1, 1).
        ends: that by a parameter of opening or head.
    """

    def __init__(self, problem: ControlProblem, control: float, parameters: float, smoothness: float = 0.0) -> None:
        self.grid, layout, dt = problem.grid, problem.layout, problem.grid.steps.dt
        self._jumps = smoothness / dt[:, None].square()
        if self.grid.is_first:
            self._jumps[0] = 0.0  # the first layer has none before it
        both = self._jumps + self.grid.shift_adjoint(self._jumps)[0]
        self.layers = (control * dt[:, None] + both)[:, :, None]
        self.ends, self._is_smooth = parameters, smoothness > 0.0
        self._size = layout.control_size
        z = (control * dt[:, None]).expand(-1, self._size // self.grid.n_local).reshape(-1)
        self._diagonal = torch.cat([z, torch.full((layout.param_size,), parameters, dtype=torch.float64)])

    @classmethod
    def of(cls, problem: ControlProblem, loss: Objective) -> DesignCost | None:
        """That of all terms but `loss`; None where there is one that it does not know."""
        objective = problem.objective
        terms = objective.terms if isinstance(objective, Sum) else [objective]
        found = {"control": 0.0, "parameters": 0.0, "smoothness": 0.0}
        for term in terms:
            if type(term) is ControlCost and term.mass is None:
                found["control"] += term.control_weight
            elif type(term) is SmoothCost:
                found["control"] += term.control_weight
                found["smoothness"] += term.smoothness
            elif type(term) is ParameterCost:
                found["parameters"] += term.weight
            elif term is not loss:
                return None
        return cls(problem, **found)

    def value(self, x: Tensor) -> float:
        """Its value at a design, (size,). Collective."""
        return 0.5 * float(self.grid.sum(self.product(x) @ x))

    def gradient(self, x: Tensor) -> Tensor:
        """Its gradient. Collective."""
        return self.product(x)

    def product(self, d: Tensor) -> Tensor:
        """Its Hessian times a direction. Collective."""
        found = self._diagonal * d
        if self._is_smooth:
            rows = d[: self._size].view(self.grid.n_local, -1)
            pulled = self._jumps * (rows - self.grid.shift(rows))
            found[: self._size] += (pulled - self.grid.shift_adjoint(pulled)[0]).reshape(-1)
        return found
