"""Problems that break down: where solvers must return a reason."""

from __future__ import annotations

import torch
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.objective import ControlCost, Tracking
from pdeopt.control.problem import ControlProblem
from pdeopt.steps.timegrid import Steps, TimeGrid


class BlowUp(TimeDependentConstraint):
    """u' = u^2 / 4 + z by implicit Euler: no state for a large control. NaN above `limit`, and in the end.

    Args:
        limit: the residual is NaN where a state is larger.
        evaluations: after so many evaluations the residual is NaN for ever.
    """

    state_dim = control_dim = 2

    def __init__(self, limit: float = float("inf"), evaluations: float = float("inf")) -> None:
        self.limit, self.left = limit, evaluations

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.tensor([0.5, 0.3], dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        self.left -= 1
        F = u_new - u_old - steps.dt[:, None] * (0.25 * u_new**2 + 0.1 * u_new.flip(-1) + z)
        bad = torch.nan if self.left < 0 else 0.0
        return torch.where(u_new.abs() > self.limit, torch.nan, F) + bad


class Singular(BlowUp):
    """A_i = 0 wherever the control is negative."""

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return torch.relu(z.sum(-1, keepdim=True)) * u_new - 0 * u_old - z


def blow_up(target: float = 2.0, alpha: float = 1e-2, **words: float) -> ControlProblem:
    return _problem(BlowUp(**words), target, alpha)


def singular() -> ControlProblem:
    return _problem(Singular(), 1.0, 1e-2)


def _problem(constraint: TimeDependentConstraint, target: float, alpha: float) -> ControlProblem:
    objective = Tracking([target, target]) + ControlCost(alpha)
    return ControlProblem(constraint, objective, TimeGrid.uniform(6, 1.0))
